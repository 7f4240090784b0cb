"""The write-ahead log of a running ledger: many changes per write, one fsync for all of them, then the answers.

Changes are gathered while the write before them is under way. What was promised to be called when they are durable is
called then, in order; after an error it never is.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from coordinator.ledger.bank import Change
from coordinator.ledger.logfile import change_bytes, frame, header, log_path

log = logging.getLogger(__name__)


class Journal:
    """Appends to the log in `folder`.

    Args:
        folder: where the files are.
        first: number of the first change of the file to append to.
        index: number of the next change.
        size: bytes of that file that are in order; what is after them is cut off. 0: the file is begun.
        fail: called once, with the error (OSError, or a defect of the ledger), when the log is not written any more.
    """

    def __init__(self, folder: Path, first: int, index: int, size: int, fail: Callable[[BaseException], None]) -> None:
        self.index = index
        self._folder = folder
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "journal")
        self._file = _open(folder, first, size)
        self._pending: list[bytes] = []
        self._pending_first = index
        self._rotate_at: list[int] = []
        self._calls: list[Callable[[], None]] = []
        self._calls_under_way: list[Callable[[], None]] = []
        self._reached: set[asyncio.Future[None]] = set()
        self._scheduled = False
        self._under_way = False
        self.failed = False

    def append(self, change: Change) -> None:
        """Take in the next change; it is durable when a function given to `when_durable` after this is called."""
        self._pending.append(change_bytes(change))
        self.index += 1
        self._schedule()

    def when_durable(self, function: Callable[[], None]) -> None:
        """Call it when everything appended so far is durable: now, if it is."""
        if self._pending or self._scheduled:
            self._calls.append(function)
        elif self._under_way:
            self._calls_under_way.append(function)
        elif not self.failed:
            function()

    def rotate(self) -> None:
        """The next change begins a new file."""
        self._rotate_at.append(self.index)
        self._schedule()

    async def durable(self) -> None:
        """Until everything appended so far is. Raises OSError if it never will be."""
        if self.failed:
            raise OSError("the log cannot be written")
        reached: asyncio.Future[None] = self._loop.create_future()
        self._reached.add(reached)
        reached.add_done_callback(self._reached.discard)
        self.when_durable(lambda: None if reached.done() else reached.set_result(None))
        await reached

    async def close(self) -> None:
        if not self.failed:
            await self.durable()
        self._thread.shutdown()
        if self._file >= 0:
            os.close(self._file)

    # ------------------------------------------------------------------ writing

    def _schedule(self) -> None:
        if not (self._scheduled or self._under_way or self.failed):
            self._scheduled = True
            # Everything that this turn of the event loop still brings goes into the same write.
            self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        try:
            jobs = self._jobs()
        except Exception as error:
            self._scheduled = False
            self._end(error)
            return
        self._calls_under_way, self._calls = self._calls, []
        self._scheduled, self._under_way = False, True
        self._loop.run_in_executor(self._thread, self._write, jobs).add_done_callback(self._written)

    def _jobs(self) -> list[bytes | int]:
        """What to write: frames, and numbers of changes that begin a new file."""
        jobs: list[bytes | int] = []
        start, first = 0, self._pending_first
        for number, rotates in (*((number, True) for number in self._rotate_at), (self.index, False)):
            part = self._pending[start : number - first]
            if part:
                jobs.append(frame(first + start, len(part), b"".join(part)))
            start = number - first
            if rotates:
                jobs.append(number)
        self._pending, self._pending_first, self._rotate_at = [], self.index, []
        return jobs

    def _write(self, jobs: list[bytes | int]) -> None:
        """In the journal's own thread."""
        for job in jobs:
            if isinstance(job, bytes):
                _write_all(self._file, job)
            else:
                _sync(self._file)
                old, self._file = self._file, -1
                os.close(old)
                self._file = _open(self._folder, job, 0)
        _sync(self._file)

    def _written(self, done: asyncio.Future[None]) -> None:
        self._under_way = False
        error = done.exception()
        if error is not None:
            self._end(error)
            return
        calls, self._calls_under_way = self._calls_under_way, []
        if self._pending or self._rotate_at or self._calls:
            self._begin()
        for call in calls:
            call()

    def _end(self, error: BaseException) -> None:
        # After a failed fsync nobody knows what is on disk: nothing more is acknowledged.
        self.failed = True
        self._fail(error)
        for reached in tuple(self._reached):
            reached.set_exception(OSError("the log cannot be written"))


def _open(folder: Path, first: int, size: int) -> int:
    """The file that begins with change `first`, cut to `size` bytes (0: its header is written), ready to append to."""
    path = log_path(folder, first)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
        os.lseek(descriptor, size, os.SEEK_SET)
        if not size:
            _write_all(descriptor, header())
        os.fsync(descriptor)
        sync_folder(folder)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync(descriptor: int) -> None:
    # macOS has no fdatasync.
    getattr(os, "fdatasync", os.fsync)(descriptor)


def sync_folder(folder: Path) -> None:
    """Make names that were created or removed in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
