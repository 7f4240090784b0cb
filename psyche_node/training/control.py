"""How rank 0 tells the other ranks what to do, and hears how it went.

By keys in the store where the ranks met, and not by collectives: so it does not matter what the collectives of a
failed step are waiting for. Request n is under ``request/n``, what became of it on rank r under ``outcome/n/r``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from psyche_node.ipc import Message, decode_frame, encode_frame
from psyche_node.training.errors import OutOfStep, RankFailed
from psyche_node.training.messages import Shutdown

log = logging.getLogger(__name__)
_PATIENCE = timedelta(seconds=30)
"""How long a rank that failed waits for the others to say how it went: if they do not, they wait for it elsewhere."""
_FOREVER = timedelta(days=3650)
_GOODBYE = timedelta(seconds=5)

Handle = Callable[[Message], Message]


class Control:
    """One rank's end."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size, self._number = store, rank, size, 0

    def send(self, request: Message) -> None:
        """Rank 0: tell the others."""
        self._number += 1
        self._store.set(f"request/{self._number}", encode_frame(0, request)[4:].decode())

    def receive(self) -> Message:
        """The others: wait for the next request. Raises OutOfStep when rank 0 is gone."""
        self._number += 1
        key = f"request/{self._number}"
        try:
            self._store.wait([key], _FOREVER)
            frame = self._store.get(key)
        except DistError as error:
            raise OutOfStep(f"rank 0 of this node is gone, and with it what rank {self._rank} should do") from error
        return decode_frame(frame)[1]

    def settle(self, failure: str | None, patience: timedelta | None = None) -> dict[int, str]:
        """Say how the request went here, and return what failed, by rank.

        Raises OutOfStep if others do not say how it went there: in time, if it failed here.
        """
        number = self._number
        keys = [f"outcome/{number}/{rank}" for rank in range(self._size)]
        try:
            self._store.set(keys[self._rank], failure or "")
            self._store.wait(keys, patience or (_FOREVER if failure is None else _PATIENCE))
            said = {rank: self._store.get(key).decode() for rank, key in enumerate(keys)}
        except DistError as error:
            raise OutOfStep(
                f"rank {self._rank} ended its step ({failure or 'well'}), and others are not heard of: they cannot go "
                "on together"
            ) from error
        if self._rank == 0:
            # All have been here, so nobody looks at the request before this one any more.
            for key in (f"request/{number - 1}", *(f"outcome/{number - 1}/{rank}" for rank in range(self._size))):
                self._store.delete_key(key)
        return {rank: words for rank, words in said.items() if words}

    def apart(self, failed: dict[int, str]) -> str | None:
        """What to say if a request failed on some ranks only: those have not done what the others did."""
        if len(failed) in (0, self._size):
            return None
        rank, words = next(iter(failed.items()))
        fine = next(rank for rank in range(self._size) if rank not in failed)
        return (
            f"failed on rank {rank} and not on rank {fine}, so that their weights may differ and all have to end. "
            f"Start the node again. What failed: {words}"
        )


class Lead:
    """Rank 0's handler of requests: all ranks handle them, and the reply is this one's.

    ``end`` is called when the ranks cannot go on together; the reply still goes out.
    """

    def __init__(self, handle: Handle, control: Control, end: Callable[[], None]) -> None:
        self._handle, self._control, self._end = handle, control, end

    def __call__(self, request: Message) -> Message:
        """Raises what failed on all ranks, or RankFailed, or OutOfStep."""
        if isinstance(request, Shutdown):
            return self._handle(request)
        self._control.send(request)
        failure: Exception | None = None
        try:
            reply = self._handle(request)
        except Exception as error:
            failure = error
        failed = self._settled(failure)
        if words := self._control.apart(failed):
            self._end()
            raise RankFailed(f"{type(request).__name__} {words}") from failure
        if failure is not None:
            if isinstance(failure, OutOfStep):
                self._end()
            raise failure
        return reply

    def _settled(self, failure: Exception | None) -> dict[int, str]:
        try:
            return self._control.settle(_words(failure))
        except OutOfStep:
            self._end()
            raise

    def close(self) -> None:
        """Let the other ranks end."""
        try:
            self._control.send(Shutdown())
            self._control.settle(None, _GOODBYE)
        except (OutOfStep, DistError) as error:
            log.warning("not all ranks said goodbye: %s", error)


def follow(handle: Handle, control: Control) -> None:
    """Handle what rank 0 says until it says Shutdown. Raises OutOfStep when this rank cannot go on with the others."""
    while not isinstance(request := control.receive(), Shutdown):
        failure: Exception | None = None
        try:
            handle(request)
        except Exception as error:
            log.info("%s failed", type(request).__name__, exc_info=True)
            failure = error
        failed = control.settle(_words(failure))
        if words := control.apart(failed):
            raise OutOfStep(f"{type(request).__name__} {words}") from failure
        if isinstance(failure, OutOfStep):
            raise failure
    with contextlib.suppress(OutOfStep):
        control.settle(None, _GOODBYE)  # rank 0 need not wait for this answer


def _words(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"
