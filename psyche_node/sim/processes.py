"""The simulation's processes: started in their own sessions, and none of them outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from psyche_node.endings import how_it_ended
from psyche_node.exits import Exit

_PR_SET_PDEATHSIG = 1
# Loaded here: between fork and exec, a library could not be loaded safely beside other threads.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """Ask Linux to send SIGTERM when the simulation dies, even by SIGKILL. Elsewhere Ctrl-C still ends everything."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class ProcessEnded(Exception):
    """A process ended, or said nothing, where it should have gone on.

    Attributes:
        code: its exit status; None if it was ended for its silence.
        words: the message without the path of its log, for where that is not kept; of one that knew what was wrong, its
            last words alone.
    """

    def __init__(self, name: str, code: int | None, log: Path, last_words: str, silence: str = "") -> None:
        how = silence or how_it_ended(code)
        super().__init__(f"{last_words}\n({name}: {how}, log {log})")
        self.code = code
        self.words = last_words if self.explained else f"{last_words}\n({name}: {how})"

    @property
    def explained(self) -> bool:
        """Whether its last words say what was wrong: it knew. An uncaught exception ends Python with 1."""
        return self.code is not None and self.code > Exit.UNEXPECTED


class Managed:
    """A process of the simulation whose standard error goes to a log file."""

    def __init__(self, name: str, module: str, arguments: list[str], log: Path, *, pipe: bool = False) -> None:
        self.name, self.log = name, log
        self._orphans: list[psutil.Process] = []
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipe else errors,
                stderr=errors,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    async def first_line(self, timeout: float, remedy: str = "") -> str:
        """Return the first line of standard output.

        Raises ProcessEnded with the end of the log if there is none, and with the remedy if it took more than
        ``timeout`` seconds.
        """
        assert self.process.stdout is not None, "started without pipe=True"
        try:
            line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), timeout)
        except TimeoutError:
            await self.stop()
            silence = f"ended, because it was not ready after {timeout:g} s{remedy}"
            raise ProcessEnded(self.name, None, self.log, self.tail(), silence) from None
        if not line:
            code = self.process.poll() or await self.stop()
            # One that knew what was wrong has said so in a line; of any other the whole traceback may be needed.
            known = code > Exit.UNEXPECTED
            raise ProcessEnded(self.name, code, self.log, said(self.tail()) if known else self.tail(60))
        return line.decode()

    async def wait(self) -> int:
        return await asyncio.to_thread(self.process.wait)

    def kill(self) -> None:
        """SIGKILL the process itself; what it started ends by itself, at ``stop`` at the latest."""
        with contextlib.suppress(psutil.Error):
            self._orphans += psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()

    async def stop(self, grace: float = 15.0) -> int:
        """SIGTERM; SIGKILL for the whole session if that does not help, and at once when this is cancelled.

        Return the exit status.
        """
        try:
            if self.running:
                self.process.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.wait(), grace)
        finally:
            if self.running:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            for orphan in self._orphans:
                with contextlib.suppress(psutil.Error):
                    orphan.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return self.process.returncode

    def tail(self, lines: int = 12) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class MemoryWatch:
    """Samples the resident memory of this process and of the process trees it is told to watch."""

    def __init__(self) -> None:
        self.peak = self.now = 0
        self.peaks: dict[str, int] = {}
        self._roots: dict[str, int] = {}

    def watch(self, name: str, pid: int) -> None:
        self._roots[name] = pid

    def sample(self) -> None:
        """Measure now; ``peak`` is all together, ``peaks`` each tree, in bytes."""
        total = _resident(psutil.Process())
        for name, pid in self._roots.items():
            try:
                process = psutil.Process(pid)
                tree = _resident(process) + sum(_resident(child) for child in process.children(recursive=True))
            except psutil.Error:
                continue
            self.peaks[name] = max(self.peaks.get(name, 0), tree)
            total += tree
        self.now, self.peak = total, max(self.peak, total)


def said(tail: str) -> str:
    """What a log's lines say to a person: of what was logged, the messages that warn; all else as it is."""
    words = []
    for line in tail.splitlines():
        try:
            logged = json.loads(line) if line.startswith("{") else None
        except ValueError:
            logged = None
        if logged is None:
            words.append(line)
        elif logged.get("level") not in ("DEBUG", "INFO"):
            words.append(str(logged.get("msg", line)))
    return "\n".join(words) or tail


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
