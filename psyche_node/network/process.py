"""The network process from its first message to its end."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import threading
import time
from typing import NoReturn

import trio

from psyche_node.identity import IdentityError
from psyche_node.ipc import BlockingChannel, Failure, IpcError, Message, serve
from psyche_node.log import configure as configure_log
from psyche_node.network.addresses import NetworkError
from psyche_node.network.corelog import CoreLog
from psyche_node.network.health import PartDied
from psyche_node.network.memory import keep_freed_pieces
from psyche_node.network.messages import Configure
from psyche_node.network.node import NetworkNode
from psyche_node.network.server import ServerUnavailable
from psyche_node.network.statements import Malformed

log = logging.getLogger(__name__)
EXIT_SECONDS = 2.0
_REFUSED = (IdentityError, Malformed, NetworkError, ServerUnavailable, ValueError, OSError)


def main() -> None:
    """Run until the supervisor is gone or says so.

    Exits with 2 when it cannot be configured, with 3 when a part of libp2p has died (only a new process cures that),
    and with 1 when it breaks in another way.
    """
    parser = argparse.ArgumentParser(prog="python -m psyche_node.network", description="A node's network process.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the supervisor")
    parser.add_argument("--log-level", default="INFO")
    arguments = parser.parse_args()
    core = CoreLog()
    keep_freed_pieces()
    configure_log("network", "WARNING")
    logging.getLogger("psyche_node").setLevel(arguments.log_level)
    _silence_libraries()
    channel = BlockingChannel(arguments.fd)
    try:
        frame = channel.receive()
    except IpcError as error:
        log.error("the supervisor's first message cannot be read: %s", error)
        sys.exit(2)
    if frame is None:
        return
    request_id, message = frame
    process = _Process(channel, request_id)
    if not isinstance(message, Configure):
        problem = IpcError(f"the first message must be Configure, not {type(message).__name__}")
        process.refuse(Failure.of("Configure", problem))
    try:
        node = NetworkNode(message, process.emit)
        core.refused, core.probed = node.intake.handshake_refused, node.intake.probed
        trio.run(process.run, node)
    except (Exception, BaseExceptionGroup) as error:
        if (died := _find(error, PartDied)) is not None:
            log.critical("%s; this process ends, for libp2p cannot be started again within one", died)
            sys.exit(3)
        refusal = _find(error, *_REFUSED)
        if process.ready or refusal is None:
            log.critical("the network process failed", exc_info=True)
            sys.exit(1)
        process.refuse(Failure.of("Configure", refusal))


def _find(error: BaseException, *kinds: type[BaseException]) -> BaseException | None:
    """Return ``error`` if it is of one of these kinds, without the groups that trio may have put around it, or None."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, kinds) else None


def _silence_libraries() -> None:
    # libp2p reports each peer that goes away as an error, in several places; what matters of that is in this log.
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    # One of its modules sets its own level.
    logging.getLogger("libp2p.network.auto_connector").setLevel(logging.CRITICAL)
    logging.getLogger("grpc").setLevel(logging.ERROR)


class _Process:
    """The conversation with the supervisor."""

    def __init__(self, channel: BlockingChannel, configure_id: int) -> None:
        self._channel, self._configure_id = channel, configure_id
        self.ready = False

    def emit(self, message: Message) -> None:
        self._reply(0, message)

    def refuse(self, failure: Failure) -> NoReturn:
        """Answer ``Configure`` with it and end."""
        log.debug("%s", failure)  # the supervisor says it, as its own error
        self._reply(self._configure_id, failure)
        sys.exit(2)

    async def run(self, node: NetworkNode) -> None:
        token = trio.lowlevel.current_trio_token()
        async with node.running() as ready:
            self._reply(self._configure_id, ready)
            self.ready = True
            threading.Thread(target=self._converse, args=(node, token), name="ipc", daemon=True).start()
            await node.stopping.wait()
            threading.Thread(target=_exit_anyway, name="exit", daemon=True).start()

    def _converse(self, node: NetworkNode, token: trio.lowlevel.TrioToken) -> None:
        """Answer the supervisor until it closes its end, then end the process."""

        def handle(message: Message) -> Message:
            return trio.from_thread.run(node.handle, message, trio_token=token)

        try:
            serve(self._channel, handle)
        except (IpcError, OSError) as error:
            log.error("the conversation with the supervisor broke: %s", error)
        finally:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(node.stopping.set)

    def _reply(self, request_id: int, message: Message) -> None:
        try:
            self._channel.reply(request_id, message)
        except OSError as error:
            # It is gone; the reading thread finds out, and ends the process.
            log.debug("the supervisor is gone: %s", error)


def _exit_anyway() -> None:
    time.sleep(EXIT_SECONDS)
    log.info("connections are still open after %.0f s; leaving them to their peers", EXIT_SECONDS)
    logging.shutdown()
    os._exit(0)
