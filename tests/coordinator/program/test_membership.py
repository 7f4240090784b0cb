"""Members come and go at any round: joining while others train, being put out, shares, slots given to others."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from program_harness import TERMS, Chain, RunDriver

from coordinator import instructions as ix
from coordinator import layout
from coordinator.errors import ErrorCode
from coordinator.state import MemberStatus, Phase, Terms


def long_run(terms: Terms = TERMS, **limits: int) -> RunDriver:
    return RunDriver(Chain(), terms=terms, **{"rounds_per_epoch": 100, "total_rounds": 100, **limits})


def play(run: RunDriver, rounds: int = 1, guests: Mapping[int, int] | None = None) -> None:
    """Whole rounds in which everybody who can does everything. Member n is in slot n, apart from the guests: slot ->
    member."""
    name = {slot: slot for slot in range(256)} | dict(guests or {})
    for _ in range(rounds):
        number = run.header.round
        for slot in sorted(run.rounds[number].expected):
            run.chain.advance()
            run.must(run.commit(name[slot], number))
        run.tick_when_due()
        for witness in run.rounds[number].witnesses:
            if run.members[witness].status is MemberStatus.ACTIVE:
                run.must(run.attest(name[witness], number, run.rounds[number].commitments))
        run.tick_when_due()


@pytest.mark.parametrize("phase", [Phase.ROUND_TRAIN, Phase.ROUND_WITNESS, Phase.COOLDOWN, Phase.PAUSED])
def test_a_joiner_is_active_from_the_round_after_it_is_ready(phase: Phase) -> None:
    run = long_run(overlap=0, rounds_per_epoch=2, witnesses=1)
    run.start()
    if phase in (Phase.COOLDOWN, Phase.PAUSED):
        if phase is Phase.PAUSED:
            run.must(run.pause())
        while run.run.phase not in (Phase.COOLDOWN, Phase.PAUSED):
            play(run)
        if phase is Phase.PAUSED:
            run.tick_when_due()
    elif phase is Phase.ROUND_WITNESS:
        run.train(range(4))
    assert run.run.phase is phase
    run.must(run.join(4, share=500))
    assert run.members[4].status is MemberStatus.PENDING
    refused = run.commit(4)
    assert not refused.ok
    run.must(run.ready(4))
    assert (run.header.members, run.header.active, run.header.ready) == (5, 4, 1)
    if phase is Phase.PAUSED:
        run.must(run.resume())
    elif phase is Phase.COOLDOWN:
        run.tick_when_due()
    elif phase is Phase.ROUND_WITNESS:
        run.attest_all(0, run.rounds[0].witnesses, range(4))
        run.tick_when_due()
    else:
        play(run)
    assert run.run.phase is Phase.ROUND_TRAIN
    entry = run.rounds[run.run.round]
    assert entry.active == {0, 1, 2, 3, 4}
    assert 0 < entry.slices[4][1] < entry.slices[0][1], "half the share, about half the positions"
    play(run)
    assert run.members[4].credit == 100


def test_who_is_never_ready_makes_room() -> None:
    run = long_run(overlap=0, warmup_time=30, max_members=5)
    run.start()
    run.must(run.join(4))
    assert run.join(5).code == ErrorCode.RUN_FULL
    joined = run.chain.slot
    while run.chain.slot - joined <= 30:
        assert run.members[4].status is MemberStatus.PENDING
        run.chain.advance(4)
        play(run)
    assert run.members[4].status is MemberStatus.DROPPED
    assert (run.header.members, run.header.active) == (4, 4)
    run.must(run.join(5))


def test_a_desynced_member_that_does_not_come_back_is_dropped() -> None:
    run = long_run(overlap=0, warmup_time=10)
    run.start()
    run.train(range(4), {3: 99})
    run.attest_all(0, range(4), range(3))
    run.tick_when_due()
    assert run.members[3].status is MemberStatus.DESYNCED
    run.chain.advance(11)
    play(run)
    assert run.members[3].status is MemberStatus.DROPPED


def test_a_warmup_that_too_few_reach_ends_and_makes_room() -> None:
    run = RunDriver(Chain(), max_members=4)
    run.must(run.create())
    for member in range(4):
        run.must(run.join(member))
    run.tick_when_due()
    run.must(run.ready(0))
    run.chain.advance(50)
    run.must(run.leave(1))
    run.must(run.join(4))
    run.tick_when_due()
    assert run.run.phase is Phase.WAITING_FOR_MEMBERS
    by_wallet = {member.wallet: member.status for member in run.members.values()}
    assert by_wallet[run.wallet(0)] is MemberStatus.PENDING
    assert by_wallet[run.wallet(4)] is MemberStatus.PENDING, "who came late has had no time yet"
    assert by_wallet[run.wallet(2)] is by_wallet[run.wallet(3)] is MemberStatus.DROPPED
    assert (run.header.members, run.header.ready) == (2, 1), "who was ready need not say so again"
    run.must(run.join(2))
    run.must(run.join(3))
    run.tick_when_due()
    for member in (2, 3, 4):
        run.must(run.ready(member))
    run.tick_when_due()
    assert run.header.active == 4


@pytest.mark.parametrize("banned", [False, True])
def test_who_is_put_out_in_training_does_not_count(banned: bool) -> None:
    run = long_run(overlap=1, init_min_members=5)
    run.start(5)
    run.train(range(5))
    run.attest_all(0, range(4), range(5))
    run.tick_when_due()
    for member in (0, 1, 2, 4):
        run.chain.advance()
        run.must(run.commit(member))
    assert run.header.committed == 4
    run.must(run.ban(run.node(4)) if banned else run.kick(4))
    assert run.members[4].status is MemberStatus.EJECTED
    assert (run.header.active, run.header.members, run.header.committed) == (4, 4, 3)
    assert not run.header.due(run.chain.slot)
    assert run.commit(4).code == ErrorCode.MEMBER_NOT_ACTIVE
    run.must(run.commit(3))
    assert run.header.due(run.chain.slot), "nobody waits for it"
    again = run.join(4)
    assert again.code == (ErrorCode.BANNED if banned else None)
    run.tick_when_due()
    assert run.rounds[1].eligible == {0, 1, 2, 3}
    run.attest_all(1, range(4), range(5))
    run.tick_when_due()
    assert run.run.inclusion_set(0).members == {0, 1, 2, 3}, "nor does what was not final when it was put out"
    play(run)
    assert run.run.inclusion_set(1).members == {0, 1, 2, 3}
    assert run.members[4].credit == 0
    if banned:
        assert run.join(9, node=4).code == ErrorCode.BANNED
        assert run.membership.banned == (run.node(4),)
        run.must(run.ban(run.node(4), lift=True))
        run.must(run.join(4))
        assert run.membership.banned == ()


def test_a_slot_with_work_in_flight_is_not_given_away() -> None:
    run = long_run(overlap=1, init_min_members=4, max_members=4)
    run.start()
    for member in range(4):
        run.must(run.commit(member))
    run.must(run.leave(3))
    run.must(run.join(9))
    assert run.members[4].wallet == run.wallet(9)
    run.tick_when_due()
    run.attest_all(0, range(3), range(4))
    run.tick_when_due()
    play(run, 1)
    assert run.members[3].wallet == run.wallet(3)
    assert run.members[3].credit == 100, "the credit is of who did the work"


def test_a_full_table_takes_joiners_as_long_as_credit_can_be_archived() -> None:
    """More members over a run's life than slots: credit goes to receipts and comes back, and is never lost."""
    run = long_run(overlap=0, max_members=8, batch=16)
    run.start()
    receipts = {}
    for generation in range(3):
        leaver = 3 + generation
        play(run, guests={3: leaver})
        run.must(run.leave(leaver))
        play(run)  # the round in which it left is final now
        for slot in range(4, 256):  # as if the whole table were taken
            run.patch(run.addresses.members, record_at(slot), taken(slot))
        assert run.join(leaver + 1).code == ErrorCode.RUN_FULL
        outcome, receipts[leaver] = run.archive(3)
        run.must(outcome)
        assert 3 not in run.members
        run.must(run.join(leaver + 1))
        assert run.members[3].wallet == run.wallet(leaver + 1)
        for slot in range(4, 256):
            run.patch(run.addresses.members, record_at(slot), bytes(layout.MEMBER.size))
        run.must(run.ready(leaver + 1))
        play(run)
        play(run, guests={3: leaver + 1})
        kept = sum(member.credit for member in run.members.values())
        assert kept + run.membership.archived_credit == run.run.tokens
    assert run.membership.archived_members == 3
    run.must(run.join(3))
    payer = run.chain.payer.pubkey()
    before = run.chain.svm.get_balance(payer) or 0
    archived = run.membership.archived_credit
    run.must(run.restore(3, receipts[3]))
    mine = next(m for m in run.members.values() if m.wallet == run.wallet(3))
    assert mine.credit == archived - run.membership.archived_credit > 0
    assert (run.chain.svm.get_balance(payer) or 0) > before, "the deposit goes back to who paid it"
    assert run.chain.svm.get_account(receipts[3]) is None
    assert not run.restore(3, receipts[3]).ok, "once"


def record_at(slot: int) -> int:
    return layout.MEMBERS.offsets["member"] + slot * layout.MEMBER.size


def taken(slot: int) -> bytes:
    return layout.MEMBER.pack(wallet=bytes([slot]) * 32, node_key=bytes([slot]) * 32, status=5, credit=1)


def test_shares_follow_set_share_and_are_halved_by_a_miss() -> None:
    run = long_run(overlap=0, batch=80, max_missed=5)
    run.start()
    run.must(run.set_share(0, 3000))
    assert run.members[0].share == 1000
    play(run)
    assert run.members[0].share == 2000, "by doubling"
    play(run)
    assert run.members[0].share == 3000
    assert run.rounds[2].slices[0][1] in (39, 40, 41), "half of the batch"
    run.train([1, 2, 3])
    run.attest_all(2, range(4), [1, 2, 3])
    run.tick_when_due()
    assert run.members[0].share == 1500
    run.must(run.set_share(0, 9000))
    run.train([1, 2, 3])
    run.attest_all(3, range(4), [1, 2, 3])
    run.tick_when_due()
    assert run.members[0].share == 750, "asking for more does not help who misses rounds"
    play(run)
    assert run.members[0].share == 750
    run.must(run.set_share(0, 9000))
    play(run)
    assert run.members[0].share == 1500
    run.must(run.set_config(max_share=1200))
    play(run)
    assert run.members[0].share == 1200, "a bound that is lowered holds for everybody"


def test_newcomers_take_no_more_than_the_others_and_nobody_is_idle() -> None:
    run = long_run(overlap=0, batch=64, min_members=1)
    run.start()
    run.must(run.join(4, share=1_000_000))
    run.must(run.ready(4))
    play(run)
    assert run.members[4].share == 1000
    assert max(count for _, count in run.rounds[1].slices.values()) <= 14
    run.must(run.join(5, share=1))
    run.must(run.ready(5))
    play(run)
    assert run.rounds[2].slices[5][1] == 1, "who has nothing to do could stay for ever without doing anything"
    for number in (2, 3):
        run.train([0, 1, 2, 3, 4])
        run.attest_all(number, range(5), range(5))
        run.tick_when_due()
    assert run.members[5].status is MemberStatus.DROPPED
    run.must(run.join(5, share=1))
    assert run.members[5].missed == 2, "coming back does not make it forgotten"


def test_silence_does_not_stop_a_run() -> None:
    """Three of seven commit and never attest: the first rounds are void, then they are out of it."""
    run = long_run(overlap=0, min_members=2, init_min_members=7)
    run.start(7)
    while run.run.round < 4:
        number = run.train(sorted(run.rounds[run.run.round].expected))
        run.attest_all(number, range(4), run.rounds[number].commitments)
        run.tick_when_due()
    assert [run.run.inclusion_set(number).void for number in range(4)] == [True, True, False, False]
    assert {slot for slot, member in run.members.items() if member.live} == {0, 1, 2, 3}
    assert all(run.members[slot].excluded == 0 for slot in range(4))


@pytest.mark.parametrize(("most", "silent"), [(1, 0), (2, 1), (3, 2)])
def test_who_is_out_of_sync_is_not_dropped_for_what_it_missed_before(most: int, silent: int) -> None:
    """With the false fingerprint it has missed `most` rounds: it is desynced, and may come back once."""
    run = long_run(overlap=0, max_missed=most)
    run.start()
    for number in range(silent):
        run.train(range(3))
        run.attest_all(number, range(3), range(3))
        run.tick_when_due()
    run.train(range(4), {3: 99})
    assert (run.members[3].status, run.members[3].missed) == (MemberStatus.DESYNCED, most)
    run.attest_all(silent, range(3), range(3))
    run.must(run.ready(3))
    run.tick_when_due()
    assert run.members[3].status is MemberStatus.ACTIVE
    run.train(range(4))
    assert run.members[3].missed == 0, "on the right weights everything is forgiven"


def test_who_comes_back_on_wrong_weights_again_and_again_is_dropped() -> None:
    run = long_run(overlap=0, max_missed=2)
    run.start()
    for number in range(3):
        run.train(range(4), {3: 99})
        run.attest_all(number, range(3), [0, 1, 2])
        assert run.members[3].missed == number + 1
        if number < 2:
            assert run.members[3].status is MemberStatus.DESYNCED
            run.must(run.ready(3))
        run.tick_when_due()
    assert run.members[3].status is MemberStatus.DROPPED


def test_who_is_back_in_sync_and_then_silent_has_missed_too_much() -> None:
    run = long_run(overlap=0, max_missed=2)
    run.start()
    run.train(range(4), {3: 99})
    run.attest_all(0, range(3), range(3))
    run.must(run.ready(3))
    run.tick_when_due()
    run.train(range(3))
    assert (run.members[3].status, run.members[3].missed) == (MemberStatus.DROPPED, 2)


def test_many_with_little_to_do_do_not_set_the_pace() -> None:
    run = long_run(overlap=0, init_min_members=8, batch=64, adaptive_grace=2)
    run.start(8, [1000] * 4 + [100] * 4)
    for member in (4, 5, 6, 7):
        run.must(run.commit(member))
    assert run.header.due_slot == run.run.phase_slot + run.limits.max_round_train_time
    run.chain.advance(20)
    for member in (0, 1):
        run.must(run.commit(member))
    assert run.header.due_slot == run.run.phase_slot + run.limits.max_round_train_time
    run.must(run.commit(2))
    assert run.header.due_slot == run.run.phase_slot + 30 + 2, "two thirds of the positions, too"


def test_grants_admit_and_revocation_puts_out() -> None:
    chain = Chain()
    authority = RunDriver.wallet(70)
    chain.svm.airdrop(authority, 10**10)
    run = RunDriver(chain, join_authority=authority, init_min_members=2, min_members=1)
    run.must(run.create())
    run.must(run.authorize(run.wallet(0)))
    site = run.grant(run.wallet(0))
    run.must(chain.send(ix.delegate(run.addresses, chain.program, run.wallet(0), site, run.wallet(1))))
    for member in (0, 1):
        run.must(run.join(member, grant=site))
    assert run.join(2, grant=site).code == ErrorCode.NOT_AUTHORIZED
    run.must(run.authorize(None))
    anyone = run.grant(None)
    run.must(run.join(2, grant=anyone))
    before = chain.svm.get_balance(authority)
    run.must(chain.send(ix.revoke(run.addresses, chain.program, authority, anyone)))
    assert chain.svm.get_balance(authority) > before
    assert run.join(3, grant=anyone).code == ErrorCode.WRONG_ACCOUNT_OWNER
    assert run.members[2].status is MemberStatus.PENDING, "who is in stays in"
    run.must(chain.send(ix.revoke(run.addresses, chain.program, authority, site, eject=True)))
    assert {slot for slot, member in run.members.items() if member.live} == {2}
    assert [run.members[slot].grant for slot in range(3)] == [site, site, anyone]


@pytest.mark.parametrize("held", [890_880, 10**9])
def test_lamports_do_not_block_the_address_of_a_grant(held: int) -> None:
    chain = Chain()
    authority = RunDriver.wallet(70)
    chain.svm.airdrop(authority, 10**10)
    run = RunDriver(chain, join_authority=authority)
    run.must(run.create())
    chain.svm.airdrop(run.grant(run.wallet(1)), held)
    assert not run.authorize(run.wallet(1)).ok
    rent = chain.svm.minimum_balance_for_rent_exemption
    run.must(chain.send(ix.authorize(run.addresses, chain.program, authority, run.wallet(1), rent, held)))
    run.must(run.join(1, grant=run.grant(run.wallet(1))))


def test_votes_of_those_who_left_do_not_make_a_checkpoint() -> None:
    run = long_run(overlap=0, rounds_per_epoch=1, init_min_members=6, min_members=2)
    run.start(6)
    play(run)
    assert run.run.phase is Phase.COOLDOWN
    bad, good = b"\x66" * 32, b"\x67" * 32
    for member in (0, 1, 2):
        run.must(run.checkpoint(member, bad))
        run.must(run.leave(member))
    run.must(run.checkpoint(3, bad))
    assert not run.header.checkpoint_agreed, "one of the three who are active is no quorum"
    run.must(run.checkpoint(4, good))
    run.must(run.checkpoint(5, good))
    run.tick_when_due()
    assert run.run.checkpoint_root == good
