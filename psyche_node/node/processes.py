"""A node's child processes: started with one end of a socket pair, ended with the node."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

from psyche_node.ipc import Endpoint, Message

log = logging.getLogger(__name__)
_GRACE_SECONDS = 10.0


class Child:
    """One child process and the endpoint to talk to it. It ends by itself when this process closes the endpoint."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], endpoint: Endpoint) -> None:
        self.name, self.process, self.endpoint = name, process, endpoint

    @classmethod
    async def start(
        cls, name: str, module: str, on_event: Callable[[Message], None], environment: dict[str, str] | None = None
    ) -> Child:
        """Run ``python -m module --fd N``."""
        ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", module, "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
            )
        finally:
            theirs.close()
        return cls(name, process, await Endpoint.over(name, ours, on_event))

    async def stop(self) -> None:
        """Close the endpoint, wait, and kill what has not ended by then."""
        await self.endpoint.close()
        try:
            await asyncio.to_thread(self.process.wait, _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the %s process did not end within %.0f s; killing it", self.name, _GRACE_SECONDS)
            self.process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(self.process.wait)
