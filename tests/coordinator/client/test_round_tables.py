"""What is read of the rounds, and how often; and that reading less gives the same."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from ledger_process import Ledger
from runs import TERMS, UPDATE_BYTES, joined, limits, take_part
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.client import CoordinatorClient
from coordinator.state import Commitment, Phase, Round
from coordinator.tables import RoundTables


def state(phase: Phase, round: int, *, final: int = 0, committed: int = 0, members: int = 4) -> Any:
    run = SimpleNamespace(phase=phase, round=round, final_rounds=final, terms=TERMS)
    return SimpleNamespace(run=run, header=SimpleNamespace(committed=committed, members=members, active=members))


@dataclass
class Chain:
    """Rounds as the chain has them; what was read of it is written down."""

    members: int = 4
    committed: int = 0
    closed: int = 0

    def __post_init__(self) -> None:
        self.reads: list[tuple[int, bool]] = []

    async def round(self, number: int, slots: int, update_bytes: int, *, commitments: bool) -> Round | None:
        self.reads.append((number, commitments))
        await asyncio.sleep(0)
        closed = number < self.closed
        count = (self.members if closed else self.committed) if commitments else 0
        return Round(
            round=number,
            start_slot=0,
            active=frozenset(range(self.members)),
            witnesses=(0,),
            ranges=((0, 8),),
            slices={},
            commitments={m: Commitment(m, bytes(32), update_bytes, 0, 0, 0) for m in range(count)},
            attestations={},
            closed=closed,
            final=False,
            eligible=frozenset(),
            included=frozenset(),
            expected=frozenset(),
            close_slot=0,
            final_slot=0,
        )


@pytest.mark.parametrize(("members", "readings"), [(1, 1), (4, 4), (16, 4), (17, 2), (64, 2), (65, 1), (256, 1)])
def test_commitments_are_read_in_a_few_lots(members: int, readings: int) -> None:
    async def run() -> None:
        chain = Chain(members)
        tables = RoundTables(chain)
        for committed in range(members + 1):
            chain.committed = committed
            known = await tables.refresh(state(Phase.ROUND_TRAIN, 0, committed=committed, members=members))
            assert set(known) == {0}
        assert chain.reads[0] == (0, False), "first what is fixed when the round begins"
        assert chain.reads.count((0, True)) == readings
        assert len(known[0].commitments) == members, "the last commitment of all is not waited for"
        chain.closed = 1
        for _ in range(3):
            known = await tables.refresh(state(Phase.ROUND_WITNESS, 0, committed=members, members=members))
        assert known[0].closed
        assert len(chain.reads) == readings + 1, "what is complete is not read again"

    asyncio.run(run())


def test_a_round_that_closes_before_everybody_has_committed_is_read_once_more() -> None:
    async def run() -> None:
        chain = Chain(8, committed=6)
        tables = RoundTables(chain)
        await tables.refresh(state(Phase.ROUND_TRAIN, 0, committed=6, members=8))
        chain.closed, chain.members = 1, 7
        known = await tables.refresh(state(Phase.ROUND_WITNESS, 0, committed=7, members=8))
        assert known[0].closed
        assert len(known[0].commitments) == 7
        assert chain.reads == [(0, True), (0, True)]

    asyncio.run(run())


def test_a_round_found_closed_is_known_in_full_whatever_was_asked_for() -> None:
    async def run() -> None:
        chain = Chain(4, closed=1)
        tables = RoundTables(chain)
        now = state(Phase.ROUND_TRAIN, 0)
        assert len((await tables.refresh(now))[0].commitments) == 4
        tables = RoundTables(chain)
        record = await tables.record(0, now, closed=False)
        assert record is not None
        assert len(record.commitments) == 4

    asyncio.run(run())


def test_what_is_closed_is_never_read_again_and_what_is_over_is_forgotten() -> None:
    async def run() -> None:
        chain = Chain(closed=9)
        tables = RoundTables(chain)
        known = await tables.refresh(state(Phase.ROUND_WITNESS, 8, final=7))
        assert sorted(known) == [7, 8]
        assert await tables.record(7, state(Phase.ROUND_WITNESS, 8, final=7), closed=True) is known[7]
        known = await tables.refresh(state(Phase.ROUND_TRAIN, 11, final=11))
        assert sorted(known) == [8, 11]
        assert chain.reads == [(7, True), (8, True), (11, False)]
        assert await tables.refresh(state(Phase.COOLDOWN, 12, final=12)) == {11: known[11]}

    asyncio.run(run())


def test_two_tasks_that_want_the_same_round_read_it_once() -> None:
    async def run() -> None:
        chain = Chain(closed=1)
        tables = RoundTables(chain)
        now = state(Phase.ROUND_WITNESS, 0)
        await asyncio.gather(*(tables.record(0, now, closed=True) for _ in range(5)), tables.refresh(now))
        assert chain.reads == [(0, True)]

    asyncio.run(run())


def test_a_part_of_a_round_says_what_the_whole_says(ledger: Ledger, program: tuple[Keypair, Pubkey]) -> None:
    async def run() -> None:
        wallet, address = program
        async with CoordinatorClient([ledger.rpc], address, None, wallet) as owner:
            addresses = await owner.create_run("parts", limits(), TERMS)
        async with CoordinatorClient([ledger.rpc], address, addresses, wallet) as reader:
            nodes = [await joined([ledger.rpc], addresses.run) for _ in range(3)]
            await asyncio.gather(*(take_part(node) for node in nodes))
            for whole in await reader.rounds():
                given = {m: replace(one, tokens=0, fingerprint=0, slot=0) for m, one in whole.commitments.items()}
                cut = replace(whole, commitments=given)
                for slots in (1, 3, 256):
                    part = await reader.round(whole.round, slots, UPDATE_BYTES)
                    assert part is not None
                    assert replace(part, slices=cut.slices) == cut
                    assert [part.positions(slot) for slot in range(3)] == [whole.positions(slot) for slot in range(3)]
                    bare = await reader.round(whole.round, slots, UPDATE_BYTES, commitments=False)
                    assert bare == replace(part, commitments={})
            assert await reader.round(77, 3, UPDATE_BYTES) is None
            for node in nodes:
                await node.close()

    asyncio.run(asyncio.wait_for(run(), 300))
