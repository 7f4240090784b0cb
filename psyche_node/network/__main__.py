"""``python -m psyche_node.network --fd N``: the network process, driven by the supervisor over the socket ``N``."""

from __future__ import annotations

import os

# Before grpc is imported: its C core would print what this process says in its own log.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import argparse
import contextlib
import logging
import signal
import sys
import threading
import time

import trio

from psyche_node.identity import IdentityError
from psyche_node.ipc import BlockingChannel, Failure, IpcError, Message, serve
from psyche_node.log import configure as configure_log
from psyche_node.network.messages import Configure
from psyche_node.network.node import NetworkError, NetworkNode
from psyche_node.network.server import ServerUnavailable
from psyche_node.network.statements import Malformed

log = logging.getLogger(__name__)
EXIT_SECONDS = 3.0
_REFUSED = (IdentityError, Malformed, NetworkError, ServerUnavailable, ValueError, OSError)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m psyche_node.network", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the supervisor")
    parser.add_argument("--log-level", default="INFO")
    arguments = parser.parse_args()
    # Ctrl-C in a terminal reaches the whole process group; when to end is the supervisor's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_log("network", "WARNING")
    logging.getLogger("psyche_node").setLevel(arguments.log_level)
    _silence_libraries()
    channel = BlockingChannel(arguments.fd)
    frame = channel.receive()
    if frame is None:
        return
    request_id, message = frame
    if not isinstance(message, Configure):
        channel.reply(request_id, Failure(reason=f"the first message must be Configure, not {type(message).__name__}"))
        sys.exit(2)
    try:
        node = NetworkNode(message, _Events(channel).emit)
        trio.run(_run, node, channel, request_id)
    except BaseException as error:
        reason = _refusal(error)
        if reason is None:
            log.critical("the network process failed", exc_info=True)
            sys.exit(1)
        log.error("%s", reason)
        channel.reply(request_id, Failure(reason=str(reason)))
        sys.exit(2)


def _refusal(error: BaseException) -> BaseException | None:
    """Return the foreseen error in ``error``, which trio may have wrapped in groups, or None."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, _REFUSED) else None


def _silence_libraries() -> None:
    # libp2p reports each peer that goes away as an error, in several places; what matters of that is in this log.
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    # One of its modules sets its own level.
    logging.getLogger("libp2p.network.auto_connector").setLevel(logging.CRITICAL)
    logging.getLogger("grpc").setLevel(logging.ERROR)


class _Events:
    """Sends events until the supervisor is gone."""

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel

    def emit(self, message: Message) -> None:
        try:
            self._channel.event(message)
        except OSError as error:
            log.debug("the supervisor is gone: %s", error)


async def _run(node: NetworkNode, channel: BlockingChannel, request_id: int) -> None:
    token = trio.lowlevel.current_trio_token()
    async with node.running() as ready:
        channel.reply(request_id, ready)
        thread = threading.Thread(target=_converse, args=(node, channel, token), name="ipc", daemon=True)
        thread.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_signal, node)
            await node.stopping.wait()
            nursery.cancel_scope.cancel()
        threading.Thread(target=_exit_anyway, name="exit", daemon=True).start()


def _converse(node: NetworkNode, channel: BlockingChannel, token: trio.lowlevel.TrioToken) -> None:
    """Answer the supervisor until it closes its end, then end the process."""

    def handle(message: Message) -> Message:
        return trio.from_thread.run(node.handle, message, trio_token=token)

    try:
        serve(channel, handle)
    except (IpcError, OSError) as error:
        log.error("the conversation with the supervisor broke: %s", error)
    finally:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(node.stopping.set)


async def _stop_on_signal(node: NetworkNode) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            node.stopping.set()


def _exit_anyway() -> None:
    time.sleep(EXIT_SECONDS)
    log.warning("still not ended after %.0f s; leaving", EXIT_SECONDS)
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
