"""The training processes of one node: a single one, or one for every rank, started, watched and ended together.

Rank 0 has the supervisor's socket. The ranks meet at a port of the loopback that this process opens and rank 0
inherits, so that nobody can take it in between. Started by torchrun, this node has one rank here, and torchrun the
others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from psyche_node.endings import how_it_ended
from psyche_node.ipc import IpcError, M, Message, RemoteFailure
from psyche_node.node.config import ConfigError
from psyche_node.node.processes import Child

log = logging.getLogger(__name__)
_MODULE = "psyche_node.trainer"
_LOOPBACK = "127.0.0.1"
_GRACE_SECONDS = 10.0
# After one rank, others end too, and a moment later it is known of all that did.
_SETTLE_SECONDS = 1.0
_TAIL_LINES = 12


class Trainer:
    """What requests of training are put to. Make one with ``start``."""

    def __init__(self, head: Child) -> None:
        self._head = head
        self._followers: dict[int, asyncio.subprocess.Process] = {}
        self._logs: dict[int, Path] = {}
        self._watch: asyncio.Task[None] | None = None
        self._last_words = ""

    @classmethod
    async def start(cls, ranks: int, logs: Path, on_event: Callable[[Message], None]) -> Trainer:
        """Start ``ranks`` processes. Rank 0 writes to this one's standard error, the others to files in ``logs``.

        Raises ConfigError if torchrun has started ranks already.
        """
        if ranks > 1 and os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError(
                f"{ranks} ranks are asked for, and WORLD_SIZE is {os.environ['WORLD_SIZE']}: torchrun has started the "
                "ranks of this node. Leave ranks and gpus out of its settings"
            )
        if ranks == 1:
            return cls(await Child.start("training", _MODULE, on_event))
        with socket.create_server((_LOOPBACK, 0)) as meeting:
            environment = {**os.environ, **_environment(ranks, meeting.getsockname()[1])}
            head = await Child.start(
                "training",
                _MODULE,
                on_event,
                arguments=["--store-fd", str(meeting.fileno())],
                inherit=[meeting.fileno()],
                environment={**environment, "RANK": "0", "LOCAL_RANK": "0"},
            )
        self = cls(head)
        try:
            logs.mkdir(parents=True, exist_ok=True)
            for rank in range(1, ranks):
                await self._follow(rank, logs / f"rank-{rank}.log", environment)
        except BaseException:
            await self.stop()
            raise
        self._watch = asyncio.create_task(self._end_together(), name="ranks")
        return self

    async def _follow(self, rank: int, path: Path, environment: dict[str, str]) -> None:
        self._logs[rank] = path
        with path.open("ab") as file:
            self._followers[rank] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", _MODULE),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )

    async def call(self, message: Message, expect: type[M]) -> M:
        """Send a request and wait for its reply. Raises RemoteFailure (it said no) or IpcError (a rank is gone)."""
        try:
            return await self._head.endpoint.call(message, expect)
        except RemoteFailure:
            raise
        except IpcError as error:
            raise IpcError(f"{error}. {await self._why()}") from error

    async def died(self) -> None:
        """Raise IpcError when the process, or one of its ranks, ends before the node does."""
        await self._head.endpoint.closed.wait()
        raise IpcError(f"the training process ended. {await self._why()}")

    async def stop(self) -> None:
        """End all ranks and wait for them; kill those that do not end by themselves, or when this is cancelled."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        try:
            await self._head.stop()
            if self._head.endpoint.heard:  # otherwise they are still being started, as it is
                async with asyncio.timeout(_GRACE_SECONDS):
                    await asyncio.gather(*(process.wait() for process in self._followers.values()))
        except TimeoutError:
            log.warning("ranks of the training process did not end within %.0f s; killing them", _GRACE_SECONDS)
        finally:
            await self._kill()

    async def _end_together(self) -> None:
        """When one rank has ended, say which and why, and end the others, who wait for it."""
        waiting = {asyncio.ensure_future(process.wait()): rank for rank, process in self._followers.items()}
        head = asyncio.ensure_future(self._head.endpoint.closed.wait())
        try:
            done, _ = await asyncio.wait([*waiting, head], return_when=asyncio.FIRST_COMPLETED)
            ended = [waiting[task] for task in done if task in waiting]
            if not ended:
                return  # rank 0, which tells its end itself; the others notice
            rank = ended[0]
            status = self._followers[rank].returncode
            self._last_words = (
                f"Rank {rank} of it ended first: {how_it_ended(status)}. The end of {self._logs[rank]}:\n"
                + _tail(self._logs[rank])
            )
            log.error("%s", self._last_words)
            self._head.process.kill()
            await self._kill()
        finally:
            for task in (*waiting, head):
                task.cancel()

    async def _kill(self) -> None:
        for process in self._followers.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _why(self) -> str:
        if self._watch is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._watch), _SETTLE_SECONDS)
        if self._last_words:
            return self._last_words
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._head.process.wait, _SETTLE_SECONDS)
        how = how_it_ended(self._head.process.returncode)
        return f"Cause: {how}. Its own last lines are in the log above. Start the node again"


def _environment(ranks: int, port: int) -> dict[str, str]:
    """What torch reads to bring together the ranks of one host."""
    loopback = _loopback_interface()
    interfaces = {} if loopback is None else {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    fair = max(1, (os.cpu_count() or 1) // ranks)
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(fair)),
        # Ranks talk among themselves without encryption or passwords: not over a network that others are on.
        **interfaces,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": _LOOPBACK,
        "MASTER_PORT": str(port),
    }


def _loopback_interface() -> str | None:
    return next(
        (name for name, held in psutil.net_if_addrs().items() if any(one.address == _LOOPBACK for one in held)), None
    )


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n".join(lines) or "(nothing. Exit status -9 is often the kernel's out-of-memory killer)"
    except OSError as error:
        return f"cannot be read: {error}"
