from __future__ import annotations

import errno
import os
import socket

import pytest

from psyche_node.exits import Exit, exit_for
from psyche_node.network.ports import PortUnavailable, check_ports


def test_a_taken_port_is_named_with_its_setting_and_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = rf"^bulk_port: 127\.0\.0\.1:{port} is taken by process {os.getpid()} \(.*choose another bulk_port"
        with pytest.raises(PortUnavailable, match=words) as said:
            check_ports("127.0.0.1", {"p2p_port": 0, "bulk_port": port})
        assert exit_for(said.value) is Exit.NETWORK
    check_ports("127.0.0.1", {"bulk_port": port})


def test_a_reserved_port_that_nobody_listens_on_can_be_had() -> None:
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        check_ports("127.0.0.1", {"p2p_port": reserved.getsockname()[1]})


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EADDRNOTAVAIL, "listen: 203.0.113.1 is no address of this machine"),
        (errno.EACCES, "grpc_port: 203.0.113.1:80 needs privileges"),
        (errno.ENETDOWN, "grpc_port: nothing can listen on 203.0.113.1:80: Network is down"),
    ],
)
def test_other_reasons_say_what_to_write_instead(monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    def refuse(address: tuple[str, int], family: int) -> socket.socket:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(PortUnavailable, match=words):
        check_ports("203.0.113.1", {"grpc_port": 80})
