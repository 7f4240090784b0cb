"""Notices that a part of libp2p has died without an error, which it can: a service that ended, a listener that is deaf.

py-libp2p cannot start a host a second time in one process, so the remedy is a new process: the supervisor's business.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping

import trio
from libp2p.tools.anyio_service import Service

log = logging.getLogger(__name__)
CHECK_EVERY = 5.0
# The listener is asked less often: each time costs the beginning of a handshake.
LISTEN_EVERY = 30.0
# Long, because a machine that has too much to do makes a healthy one slow, and a new process would make it slower.
LISTEN_SECONDS = 60.0
LISTEN_MISSES = 3


class PartDied(Exception):
    """A part of the network process is dead; the message says which."""


async def watch(services: Mapping[str, Service], ip: str, port: int) -> None:
    """Run until cancelled. Raises PartDied when a service has ended or the listener at ``ip``:``port`` is deaf."""
    misses, due = 0, trio.current_time() + LISTEN_EVERY
    while True:
        await trio.sleep(CHECK_EVERY)
        for name, service in services.items():
            if not service.manager.is_running:
                raise PartDied(f"libp2p's {name} has ended")
        if trio.current_time() < due:
            continue
        misses = 0 if await _answers(ip, port) else misses + 1
        if misses >= LISTEN_MISSES:
            raise PartDied(f"libp2p's listener on {ip} port {port} has not answered {misses} times")
        due = trio.current_time() + (LISTEN_EVERY if not misses else 0.0)


async def _answers(ip: str, port: int) -> bool:
    """Return whether whoever listens there does something with a connection: speaks as libp2p does, or ends it."""
    try:
        with trio.fail_after(LISTEN_SECONDS):
            async with await trio.open_tcp_stream(ip, port) as stream:
                # An end, even by a reset, is an answer: the machine is busy, and the listener alive.
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(b"\x13/multistream/1.0.0\n")
                    await stream.receive_some(32)
                return True
    except (OSError, trio.TooSlowError) as error:
        log.debug("the own listener did not answer: %r", error)
        return False
