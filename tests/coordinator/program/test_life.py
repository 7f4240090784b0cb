"""Whole runs, from the first instruction to Finished, on the real virtual machine."""

from __future__ import annotations

import pytest
from program_harness import Chain, RunDriver

from coordinator.errors import ErrorCode
from coordinator.state import UNKNOWN_SLOT, MemberStatus, Phase


def finish_round(run: RunDriver, number: int, members: list[int]) -> None:
    run.attest_all(number, members, members)


@pytest.mark.parametrize("arch", ["v3", "v0"])
@pytest.mark.parametrize("overlap", [0, 1])
def test_whole_life(arch: str, overlap: int) -> None:
    run = RunDriver(Chain(arch), overlap=overlap)
    everybody = list(range(4))
    run.must(run.create())
    assert run.run.phase is Phase.WAITING_FOR_MEMBERS
    assert run.header.due_slot == UNKNOWN_SLOT
    for member in everybody:
        run.must(run.join(member))
        if member < 3:
            assert run.header.due_slot == UNKNOWN_SLOT
    joined_at = run.chain.slot
    assert run.header.due_slot == joined_at + run.limits.join_grace
    run.tick_when_due()
    assert run.run.phase is Phase.WARMUP
    for member in everybody:
        assert run.header.due_slot > run.chain.slot
        run.must(run.ready(member))
    assert run.header.due(run.chain.slot)
    run.tick_when_due()
    assert {member.status for member in run.members.values()} == {MemberStatus.ACTIVE}

    covered: list[int] = []
    seeds = {run.run.seed}
    for number in range(run.limits.total_rounds):
        state = run.run
        assert (state.phase, state.round, state.epoch) == (Phase.ROUND_TRAIN, number, number // 3)
        first = number % 3 == 0
        assert state.final_rounds == (number if first else number - overlap)
        assert state.epoch_round == number - number % 3
        entry = run.rounds[number]
        assert sorted(entry.witnesses) == everybody
        covered += [position for member in everybody for position in entry.positions(member)]
        run.train(everybody)
        assert run.run.phase is Phase.ROUND_WITNESS
        drains = number % 3 == 2
        assert run.header.draining == drains
        if overlap and number and not first:
            # attestations of round n-1 are complete only now: they decide when round n's witness phase ends
            finish_round(run, number - 1, everybody)
        if overlap == 0 or drains:
            assert run.header.due_slot == run.chain.slot + run.limits.round_witness_time
            finish_round(run, number, everybody)
        assert run.header.due(run.chain.slot)
        run.tick_when_due()
        seeds.add(run.run.seed)
        if not drains:
            continue
        assert (run.run.phase, run.run.round, run.run.final_rounds) == (Phase.COOLDOWN, number + 1, number + 1)
        assert run.header.due_slot == run.chain.slot + run.limits.cooldown_time
        root = bytes([number]) * 32
        for member in everybody[:3]:
            assert not run.header.checkpoint_agreed
            run.must(run.checkpoint(member, root))
        assert run.header.checkpoint_agreed
        run.tick_when_due()
        assert (run.run.checkpoint_root, run.run.checkpoint_round) == (root, number + 1)

    final = run.run
    assert (final.phase, final.round, final.member_count) == (Phase.FINISHED, run.limits.total_rounds, 4)
    assert len(seeds) == run.limits.total_rounds + 1, "every round has a seed of its own"
    assert sorted(covered) == list(range(64 * run.limits.total_rounds)), "every position exactly once"
    assert final.tokens == 100 * 4 * run.limits.total_rounds
    for member in run.members.values():
        assert (member.credit, member.updates_included) == (100 * run.limits.total_rounds, run.limits.total_rounds)
    assert [kept.round for kept in final.inclusion] == list(range(run.limits.total_rounds))
    assert all(kept.members == frozenset(everybody) and not kept.void for kept in final.inclusion)
    assert run.header.due_slot == UNKNOWN_SLOT
    run.chain.advance(10**6)
    assert run.tick().code == ErrorCode.RUN_FINISHED


def test_a_member_that_dies_costs_one_adaptive_deadline_per_round_until_it_is_dropped() -> None:
    run = RunDriver(Chain(), rounds_per_epoch=10, total_rounds=10)
    run.start()
    alive, everybody = [0, 1, 3], [0, 1, 2, 3]
    assert run.train(everybody) == 0
    run.tick_when_due()
    for number in (1, 2):
        start = run.rounds[number].start_slot
        for member in alive:
            run.chain.advance(4)
            run.must(run.commit(member))
        # the median is commit 2 of 4, after 8 slots; 1.5 x 8 and the grace of 4 make 16
        assert run.header.due_slot == start + 12 + run.limits.adaptive_grace
        run.tick_when_due()
        assert run.members[2].missed == number
        run.attest_all(number - 1, alive, everybody if number == 1 else alive)
        run.tick_when_due()
    assert run.members[2].status is MemberStatus.DROPPED
    assert (run.header.active, run.header.members, run.run.active_count) == (3, 3, 3)
    assert 2 not in run.rounds[3].active
    # round 3 first takes what the dead member left of round 1, and needs only three to close
    lost = run.rounds[1].positions(2)
    assert run.rounds[3].ranges[0] == (lost[0], len(lost))
    run.train(alive)
    assert run.header.committed == 3


def test_one_member_alone() -> None:
    run = RunDriver(
        Chain(), init_min_members=1, min_members=1, rounds_per_epoch=1, total_rounds=2, overlap=1, batch=7, join_grace=0
    )
    run.start(1)
    for number in range(2):
        run.train([0])
        run.must(run.attest(0, number, [0]))
        run.tick_when_due()
        assert run.run.phase is Phase.COOLDOWN
        run.must(run.checkpoint(0, bytes([number]) * 32))
        run.tick_when_due()
    assert run.run.phase is Phase.FINISHED
    assert run.members[0].credit == 200


def test_cooldown_without_a_checkpoint_quorum_goes_on_when_time_is_up() -> None:
    run = RunDriver(Chain(), rounds_per_epoch=1, total_rounds=2)
    run.start()
    run.train(range(4))
    run.attest_all(0, range(4), range(4))
    run.tick_when_due()
    for member in range(4):
        run.must(run.checkpoint(member, bytes([member]) * 32))
    assert not run.header.checkpoint_agreed
    assert run.header.due_slot == run.run.phase_slot + run.limits.cooldown_time
    run.tick_when_due()
    assert (run.run.phase, run.run.checkpoint_root, run.run.checkpoint_round) == (
        Phase.ROUND_TRAIN,
        run.terms.model_root,
        0,
    )


def test_too_few_members_drain_the_round_and_wait_for_others() -> None:
    run = RunDriver(Chain(), rounds_per_epoch=50, total_rounds=50)
    run.start()
    run.train(range(4))
    run.tick_when_due()
    run.must(run.leave(0))
    assert run.header.active == 3
    run.must(run.leave(1))
    assert (run.header.active, run.header.members) == (2, 2)
    for member in (2, 3):
        run.chain.advance()
        run.must(run.commit(member))
    assert run.header.due(run.chain.slot), "nobody waits for those who left"
    run.tick_when_due()
    assert run.header.draining
    # of the four elected in round 0 two are left: no quorum can come any more, so nobody waits and the rounds are void
    run.attest_all(0, (2, 3), range(4))
    run.attest_all(1, (2, 3), (2, 3))
    assert run.header.due(run.chain.slot)
    run.tick_when_due()
    assert run.run.phase is Phase.COOLDOWN
    voids = {kept.round: (kept.void, kept.members) for kept in run.run.inclusion}
    assert voids[0] == (True, frozenset())
    assert voids[1] == (True, frozenset())
    root = b"\x44" * 32
    for member in (2, 3):
        run.must(run.checkpoint(member, root))
    run.tick_when_due()
    assert (run.run.phase, run.run.epoch) == (Phase.WAITING_FOR_MEMBERS, 1)
    assert run.header.due_slot == UNKNOWN_SLOT
    run.must(run.join(0))
    run.must(run.join(7))
    assert run.members[0].status is MemberStatus.PENDING, "who comes back takes its old slot"
    assert run.members[1].status is MemberStatus.LEFT
    assert run.members[4].wallet == run.wallet(7), "others take an empty slot while there is one"
    run.tick_when_due()
    assert {run.members[slot].status for slot in (0, 2, 3, 4)} == {MemberStatus.PENDING}
    for member in (0, 2, 3, 7):
        run.must(run.ready(member, root))
    run.tick_when_due()
    assert (run.run.phase, run.run.round) == (Phase.ROUND_TRAIN, 2)
    assert run.rounds[2].ranges == ((0, 64),), "the positions of void rounds come back before anything new"


def test_warmup_goes_on_without_those_who_are_not_ready() -> None:
    run = RunDriver(Chain())
    run.must(run.create())
    for member in range(5):
        run.must(run.join(member))
    run.tick_when_due()
    for member in range(3):
        assert run.header.due_slot == run.run.phase_slot + run.limits.warmup_time
        run.must(run.ready(member))
    run.must(run.ready(4))
    run.must(run.leave(4))
    assert run.header.ready == 3
    run.must(run.join(9))
    run.tick_when_due()
    assert run.rounds[0].active == {0, 1, 2}
    assert run.members[3].status is MemberStatus.PENDING
    assert run.members[4].status is MemberStatus.LEFT
    assert run.members[5].status is MemberStatus.PENDING
    assert (run.header.members, run.header.active) == (5, 3)
