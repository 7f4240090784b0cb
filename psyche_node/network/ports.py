"""Whether the ports that a node is told to listen on can be had. gRPC and libp2p do not say why one cannot."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Mapping

import psutil

from psyche_node.network.addresses import NetworkError
from psyche_node.network.statements import join_address


class PortUnavailable(NetworkError):
    """A port cannot be had; the message names the setting, the reason and what to write instead."""


def check_ports(host: str, ports: Mapping[str, int]) -> None:
    """Try to listen on each port at the address ``host``, which is given up again. 0 is any port, and not tried.

    ``ports``: by the name of the setting. Raises PortUnavailable.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for setting, port in ports.items():
        if not port:
            continue
        try:
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            raise PortUnavailable(_why(setting, host, port, error)) from error


def _why(setting: str, host: str, port: int, error: OSError) -> str:
    where = join_address(host, port)
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"{setting}: {where} is taken{_holder(port)}. Stop what listens there, or choose another {setting} "
                "(0: any free one)"
            )
        case errno.EADDRNOTAVAIL:
            return f"listen: {host} is no address of this machine. Write one of its own, or 0.0.0.0 for all of them"
        case errno.EACCES:
            return f"{setting}: {where} needs privileges that this process lacks. Choose a port from 1024 on"
        case _:
            return f"{setting}: nothing can listen on {where}: {error.strerror}. Choose another {setting}"


def _holder(port: int) -> str:
    # Of other users' processes the system may not say which they are.
    with contextlib.suppress(psutil.Error, OSError):
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr[1:] == (port,) and one.pid is not None:
                return f" by process {one.pid} ({psutil.Process(one.pid).name()})"
    return ""
