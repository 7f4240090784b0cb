"""What happens inside rounds: assignment, deadlines, quorums, requeue, credit, desync, drops."""

from __future__ import annotations

import pytest
from program_harness import Chain, RunDriver, digest_of
from program_model import assignment, eligible, included, next_seed

from coordinator.errors import ErrorCode
from coordinator.state import MemberStatus, Phase, decode_requeue


def long_run(**limits: int) -> RunDriver:
    return RunDriver(Chain(), **{"rounds_per_epoch": 100, "total_rounds": 100, **limits})


@pytest.mark.parametrize("witnesses", [0, 2])
def test_assignment_follows_seed_and_shares(witnesses: int) -> None:
    shares = [1, 1000, 250, 999_999, 31, 500_000, 7]
    run = long_run(witnesses=witnesses, batch=1000, overlap=0)
    run.start(len(shares), shares)
    rotations = set()
    for number in range(6):
        entry, seed = run.rounds[number], run.run.seed
        rotations.add(entry.slices[3][0])
        slices, elected = assignment(seed, dict(enumerate(shares)), 1000, run.limits)
        assert entry.slices == slices
        assert entry.witnesses == elected
        assert entry.ranges == ((1000 * number, 1000),)
        assert sorted(p for slot in slices for p in entry.positions(slot)) == list(
            range(1000 * number, 1000 * number + 1000)
        )
        # a member whose share of the batch is below one position has nothing to do, and nobody waits for it
        assert entry.expected == {slot for slot, (_, count) in slices.items() if count}
        run.train(sorted(entry.expected))
        run.attest_all(number, range(len(shares)), entry.expected)
        digests = {slot: kept.digest for slot, kept in run.rounds[number].commitments.items()}
        run.tick_when_due()
        assert run.run.seed == next_seed(seed, digests, digest_of("slot", run.chain.slot - 1))
    assert len(rotations) > 1, "the rotation changes with the seed"


def test_adaptive_deadline_and_the_hard_one() -> None:
    run = long_run(init_min_members=5, max_round_train_time=60)
    run.start(5)
    start = run.run.phase_slot
    assert run.header.due_slot == start + 60
    for member, elapsed in ((0, 3), (1, 9), (2, 21)):
        run.chain.set_slot(start + elapsed)
        run.must(run.commit(member))
        assert run.header.due_slot == start + 60, "three of five are no quorum"
    run.chain.set_slot(start + 22)
    run.must(run.commit(3))
    # commit 3 of 5 is the median: 21 slots; ceil(1.5 x 21) + 4 = 36
    assert run.header.due_slot == start + 36
    run.tick_when_due()
    assert run.rounds[0].commitments[2].slot == start + 21
    run.tick_when_due()
    start = run.run.phase_slot
    run.chain.set_slot(start + 50)
    for member in range(4):
        run.must(run.commit(member))
    assert run.header.due_slot == start + 60, "the adaptive deadline is never later than the hard one"
    run.must(run.commit(4))
    assert run.header.due_slot == start + 50, "all committed: due now"


def test_a_leaver_is_not_waited_for() -> None:
    run = long_run()
    run.start()
    run.must(run.commit(0))
    run.must(run.leave(0))
    for member in (1, 2):
        run.must(run.commit(member))
    assert not run.header.due(run.chain.slot)
    run.must(run.leave(3))
    assert run.header.due(run.chain.slot)
    run.tick_when_due()
    entry = run.rounds[0]
    assert entry.expected == {0, 1, 2}
    assert entry.eligible == {0, 1, 2}, "what was committed before leaving counts"


def test_nobody_commits_and_the_round_is_void() -> None:
    run = long_run(overlap=0)
    run.start()
    run.tick_when_due()
    assert run.header.due(run.chain.slot), "no witness can change the fate of nobody"
    run.tick_when_due()
    assert run.run.inclusion_set(0).void
    assert run.rounds[1].ranges == ((0, 64),)
    assert (run.run.cursor, run.run.tokens) == (64, 0)
    assert all(member.missed == 1 for member in run.members.values())


@pytest.mark.parametrize("overlap", [0, 1])
def test_quorum_includes_and_excludes(overlap: int) -> None:
    run = long_run(overlap=overlap)
    run.start()
    run.train(range(4))
    before = run.rounds[0]
    # members 0 and 1 reach 3 of 4 attestations, 2 has two, 3 has one
    for witness, named in ((0, [0, 1, 2, 3]), (1, [0, 1, 2]), (2, [0])):
        assert run.must(run.attest(witness, 0, named)).ok
        assert run.rounds[0].attestations[witness] == set(named)
    if overlap:
        run.tick_when_due()
        run.train(range(4))
    assert not run.header.due(run.chain.slot), "witness 3 can still include members 1 and 2"
    run.must(run.attest(3, 0, [1]))
    assert run.header.due(run.chain.slot)
    run.tick_when_due()
    final = run.run.inclusion_set(0)
    assert (final.members, final.void) == (frozenset({0, 1}), False)
    members = run.members
    assert [members[slot].credit for slot in range(4)] == [100, 100, 0, 0]
    assert [members[slot].excluded for slot in range(4)] == [0, 0, 1, 1]
    assert run.run.tokens == 200
    lost = sorted(before.positions(2) + before.positions(3))
    following = run.rounds[2 if overlap else 1]
    drawn = [p for start, count in following.ranges for p in range(start, start + count)]
    assert sorted(drawn[:32]) == lost, "what was not included is drawn first"
    assert len(drawn) == 64
    assert run.header.requeued == 0


def test_early_decision_does_not_wait_for_silent_witnesses() -> None:
    run = long_run(overlap=0)
    run.start()
    run.train(range(4))
    for witness in range(3):
        assert not run.header.due(run.chain.slot)
        run.must(run.attest(witness, 0, range(4)))
    assert run.header.due(run.chain.slot)
    assert run.attest(3, 0, [0]).ok, "accepted until final, but it cannot change anything"
    run.tick_when_due()
    assert run.run.inclusion_set(0).members == {0, 1, 2, 3}


def test_fewer_attestations_than_the_quorum_make_the_round_void() -> None:
    run = long_run(overlap=0)
    run.start()
    run.train(range(4))
    for witness in (0, 1):
        run.must(run.attest(witness, 0, range(4)))
    assert run.header.due_slot == run.run.phase_slot + run.limits.round_witness_time
    run.tick_when_due()
    assert run.run.inclusion_set(0).void
    assert run.run.tokens == 0
    assert run.rounds[1].ranges == ((0, 64),)
    assert [run.members[slot].excluded for slot in range(4)] == [0, 0, 1, 1], "those the round waited for in vain"


def test_members_whose_updates_are_never_included_are_dropped() -> None:
    run = long_run(overlap=0)
    run.start()
    for number in range(2):
        run.train(range(4))
        run.attest_all(number, range(4), [0, 1, 2])
        run.tick_when_due()
    assert run.members[3].status is MemberStatus.DROPPED
    assert run.rounds[2].active == {0, 1, 2}
    assert run.commit(3).code == ErrorCode.MEMBER_NOT_ACTIVE


def test_a_miss_is_forgiven_by_the_next_commitment() -> None:
    run = long_run(overlap=0)
    run.start()
    for number in range(5):
        run.train([0, 1, 2] if number % 2 else range(4))
        run.attest_all(number, range(4), run.rounds[number].commitments)
        run.tick_when_due()
    assert run.members[3].status is MemberStatus.ACTIVE
    assert run.members[3].credit == 300


def test_minority_fingerprint_is_out_of_sync_until_ready_again() -> None:
    run = long_run(overlap=0)
    run.start(5)
    number = run.train(range(5), {4: 8, 1: 9})
    entry = run.rounds[number]
    assert entry.eligible == eligible(entry) == {0, 2, 3}
    assert {slot for slot, m in run.members.items() if m.status is MemberStatus.DESYNCED} == {1, 4}
    assert (run.header.active, run.header.members) == (3, 5)
    run.attest_all(number, range(5), range(5))
    run.tick_when_due()
    assert run.run.inclusion_set(0).members == {0, 2, 3}
    assert run.rounds[1].active == {0, 2, 3}
    assert run.commit(1).code == ErrorCode.MEMBER_NOT_ACTIVE
    assert run.ready(1, b"\x55" * 32).code == ErrorCode.WRONG_MODEL_ROOT
    run.must(run.ready(1))
    assert run.ready(1).code == ErrorCode.ALREADY_READY
    assert run.commit(1).code == ErrorCode.MEMBER_NOT_ACTIVE, "only from the next round on"
    run.train([0, 2, 3])
    run.attest_all(1, range(5), [0, 2, 3])
    run.tick_when_due()
    assert run.rounds[2].active == {0, 1, 2, 3}
    assert run.header.active == 4


def test_no_strict_majority_convicts_nobody() -> None:
    run = long_run()
    run.start()
    run.train(range(4), {0: 1, 1: 1, 2: 2, 3: 2})
    assert run.rounds[0].eligible == {0, 1, 2, 3}
    assert all(member.status is MemberStatus.ACTIVE for member in run.members.values())


def test_attestations_of_the_last_round_arrive_while_the_next_one_trains() -> None:
    run = long_run()
    run.start()
    assert run.attest(0, 0, []).code == ErrorCode.ROUND_NOT_CLOSED
    run.train(range(4))
    run.must(run.attest(0, 0, range(4)))
    run.tick_when_due()
    assert run.run.phase is Phase.ROUND_TRAIN
    assert run.header.attested == 1
    run.must(run.attest(1, 0, range(4)))
    assert run.header.attested == 2
    assert run.run.inclusion_set(0) is None
    run.must(run.attest(2, 0, range(4)))
    run.train(range(4))
    assert run.header.due(run.chain.slot), "round 0 was decided during round 1"
    run.tick_when_due()
    assert run.run.final_rounds == 1
    assert run.attest(3, 0, range(4)).code == ErrorCode.ROUND_FINAL
    assert included(run.rounds[0]) == run.run.inclusion_set(0).members


def test_a_quorum_lost_while_witnessing_drains_before_the_cooldown() -> None:
    run = long_run(overlap=1, min_members=4)
    run.start()
    run.train(range(4))
    run.attest_all(0, range(3), range(4))
    run.tick_when_due()
    run.train(range(4))
    assert not run.header.draining
    run.must(run.leave(0))
    run.tick_when_due()
    assert (run.run.phase, run.run.round, run.header.draining) == (Phase.ROUND_WITNESS, 1, True)
    assert run.run.inclusion_set(0).members == {0, 1, 2, 3}
    assert run.members[0].credit == 100, "credit of a member that left is kept"
    run.tick_when_due()
    assert (run.run.phase, run.run.final_rounds) == (Phase.COOLDOWN, 2)


def test_a_torn_queue_never_overflows() -> None:
    """Every second of 64 members stays out of every round: the batch tears into more ranges than a round can draw,
    until the crowded queue is drawn range by range. No position may be lost or doubled meanwhile."""
    run = long_run(overlap=1, init_min_members=64, min_members=8, batch=256, max_missed=255, witnesses=1, join_grace=0)
    run.start(64)
    kept: set[int] = set()
    crowded = longest = 0
    for number in range(40):
        entry = run.rounds[number]
        order = sorted((slot for slot in entry.expected), key=lambda slot: entry.slices[slot][0])
        few = len(entry.expected) < len(entry.active)
        crowded += few
        taken = order if few else order[::2]
        for member in taken:
            run.must(run.commit(member, tokens=0))
        if few and number % 2:
            taken = []
        run.tick_when_due()
        for witness in entry.witnesses:
            run.must(run.attest(witness, number, taken))
        run.tick_when_due()
        for final in run.run.inclusion:
            if final.round == number - 1:
                kept |= {p for slot in final.members for p in run.rounds[final.round].positions(slot)}
        queue = decode_requeue(run.data(run.addresses.rounds))
        longest = max(longest, len(queue))
        flying = [p for n in (number, number + 1) for s in run.rounds[n].slices for p in run.rounds[n].positions(s)]
        waiting = [p for start, count in queue for p in range(start, start + count)]
        assert sorted([*kept, *flying, *waiting]) == list(range(run.run.cursor)), number
        assert run.header.requeued == len(waiting)
    assert longest <= 512
    assert crowded > 3, "the test must reach the crowded queue"
