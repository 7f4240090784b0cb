"""A node's child processes: started with one end of a socket pair, ended with the node."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from psyche_node.endings import how_it_ended
from psyche_node.ipc import Endpoint, Message

log = logging.getLogger(__name__)
_GRACE_SECONDS = 10.0


class Child:
    """One child process and the endpoint to talk to it. It ends by itself when this process closes the endpoint."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], endpoint: Endpoint) -> None:
        self.name, self.process, self.endpoint = name, process, endpoint

    @classmethod
    async def start(
        cls,
        name: str,
        module: str,
        on_event: Callable[[Message], None],
        patience: float | None = None,
        *,
        arguments: Sequence[str] = (),
        inherit: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        """Run ``python -m module --fd N`` with more ``arguments``. ``patience``: seconds that a reply may take; None
        waits for as long as it lives. ``inherit``: file descriptors; ``environment``: None is this process's own."""
        ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", module, "--fd", str(theirs.fileno()), *arguments],
                pass_fds=[theirs.fileno(), *inherit],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        try:
            return cls(name, process, await Endpoint.over(name, ours, on_event, patience))
        except BaseException:
            ours.close()
            _kill(process)
            raise

    async def stop(self) -> None:
        """Close the endpoint and wait; kill what has not ended by then, or at once when this is cancelled. One that is
        still being started, or loads its first model, has nothing to put in order, and is not waited for."""
        died = self.endpoint.closed.is_set()
        try:
            await self.endpoint.close()
            if self.endpoint.heard or died:
                await asyncio.to_thread(self.process.wait, _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the %s process did not end within %.0f s; killing it", self.name, _GRACE_SECONDS)
        finally:
            _kill(self.process)
        if died:
            # One that got SIGTERM before it could ignore it was asked to end, as this process is.
            level = logging.INFO if self.process.returncode == -signal.SIGTERM else logging.ERROR
            log.log(level, "the %s process had ended before: %s", self.name, how_it_ended(self.process.returncode))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Leave neither a process nor a zombie. A killed process ends at once, so this hardly blocks."""
    if process.poll() is None:
        process.kill()
        process.wait()
