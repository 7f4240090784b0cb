"""The rounds in flight, read as seldom and as little as a node can do with.

The entry of a round has 20 KB, and endpoints count requests and bytes. What is
fixed when the round begins is read once; commitments are read when there are enough new ones to be worth it, and when
the round is closed and some are missing, after which nothing that a node uses changes any more.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Final, Protocol

from coordinator.state import Phase, Round
from coordinator.values import Header, Run

# Up to this many members, updates are fetched as they come, in four lots; up to that many, in two; beyond it, in one.
_SMALL_RUN: Final = 16
_LARGE_RUN: Final = 64
_KEPT_ROUNDS: Final = 4


class State(Protocol):
    """What a pulse has."""

    @property
    def run(self) -> Run: ...
    @property
    def header(self) -> Header: ...


class Reader(Protocol):
    """What this needs of a client."""

    async def round(self, number: int, slots: int, update_bytes: int, *, commitments: bool) -> Round | None: ...


class RoundTables:
    """The rounds that are not final, as far as they have been read.

    Args:
        chain: reads one round.
    """

    def __init__(self, chain: Reader) -> None:
        self._chain = chain
        # How many slots of the member table are in use, as far as is known.
        self._slots = 0
        # Two tasks that want the same round shall not read it twice.
        self._reading = asyncio.Lock()
        self.rounds: dict[int, Round] = {}

    async def refresh(self, state: State) -> dict[int, Round]:
        """Read what is missing of the rounds that are open or await attestations; return what is known.

        Raises what the client raises.
        """
        run = state.run
        async with self._reading:
            self._close(state)
            for number in range(run.final_rounds, run.round + 1):
                if self._is_worth_reading(number, state):
                    early = not self._closed(number, state) and state.header.committed < _lot(state.header.active)
                    await self._read(number, state, commitments=not early)
        self.rounds = {number: kept for number, kept in self.rounds.items() if number > run.round - _KEPT_ROUNDS}
        return dict(self.rounds)

    async def record(self, number: int, state: State, *, closed: bool) -> Round | None:
        """A round, at least as it began, or as it was `closed`; None when the chain does not keep it any more."""
        async with self._reading:
            known = self.rounds.get(number)
            if known is not None and (known.closed or not closed):
                return known
            return await self._read(number, state, commitments=closed)

    async def _read(self, number: int, state: State, *, commitments: bool) -> Round | None:
        slots, update_bytes = max(self._slots, state.header.members), state.run.terms.update_bytes
        record = await self._chain.round(number, slots, update_bytes, commitments=commitments)
        if record is not None and record.closed and not commitments:
            # It was closed meanwhile, and what is closed counts as known in full.
            record = await self._chain.round(number, slots, update_bytes, commitments=True)
        if record is None:
            self.rounds.pop(number, None)
            return None
        self._slots = max(record.active, default=-1) + 1
        self.rounds[number] = record
        return record

    def _close(self, state: State) -> None:
        """Take note that the newest round is closed, if all that is committed in it is known."""
        known = self.rounds.get(state.run.round)
        if known is None or known.closed or not self._closed(known.round, state):
            return
        # Commitments are never taken back, so as many as there are means all that there are.
        if state.run.phase is Phase.ROUND_WITNESS and len(known.commitments) == state.header.committed:
            self.rounds[known.round] = replace(known, closed=True)

    def _is_worth_reading(self, number: int, state: State) -> bool:
        known = self.rounds.get(number)
        if known is None:
            return number < state.run.round or state.run.phase in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS)
        if known.closed:
            return False
        if self._closed(number, state):
            return True
        new = state.header.committed - len(known.commitments)
        return new > 0 and (new >= _lot(len(known.active)) or state.header.committed >= len(known.active))

    @staticmethod
    def _closed(number: int, state: State) -> bool:
        return number < state.run.round or state.run.phase is not Phase.ROUND_TRAIN


def _lot(members: int) -> int:
    """How many new commitments are worth a reading."""
    if members > _LARGE_RUN:
        return members
    return max(1, members // 4 if members <= _SMALL_RUN else -(-members // 2))
