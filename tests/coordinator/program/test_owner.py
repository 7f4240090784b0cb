"""What a run's owner can do: pause, resume, finish, change, pay for and close it, and move it to a new version."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from program_harness import TERMS, Chain, RunDriver, program_bytes, upgrade
from test_membership import long_run, play

from coordinator import instructions as ix
from coordinator import layout
from coordinator.errors import ErrorCode
from coordinator.state import UNKNOWN_SLOT, MemberStatus, Phase, Request, decode_requeue

VERSION_1 = Path(__file__).resolve().parent.parent.parent / "vectors" / "coordinator-v1.so"


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("moment", [Phase.ROUND_TRAIN, Phase.ROUND_WITNESS])
def test_pause_closes_the_round_and_resume_needs_no_joining(overlap: int, moment: Phase) -> None:
    run = long_run(overlap=overlap)
    run.start()
    play(run)
    if moment is Phase.ROUND_WITNESS:
        run.train(range(4))
    run.must(run.pause())
    assert run.run.request is Request.PAUSE
    number = run.run.round
    if moment is Phase.ROUND_TRAIN:
        run.train(range(4))
    while run.run.phase is Phase.ROUND_WITNESS:
        for late in range(max(number - overlap, 0), number + 1):
            entry = run.rounds[late]
            if not entry.final:
                for witness in set(entry.witnesses) - set(entry.attestations):
                    run.must(run.attest(witness, late, entry.commitments))
        run.tick_when_due()
    assert (run.run.phase, run.run.final_rounds) == (Phase.COOLDOWN, number + 1)
    assert run.run.tokens == 400 * (number + 1), "nothing is discarded"
    root = b"\x99" * 32
    for member in range(3):
        run.must(run.checkpoint(member, root))
    run.tick_when_due()
    assert (run.run.phase, run.run.resume_phase, run.run.request) == (Phase.PAUSED, Phase.ROUND_TRAIN, Request.NONE)
    assert run.run.checkpoint_root == root
    assert run.header.due_slot == UNKNOWN_SLOT
    run.chain.advance(10**6)
    assert run.tick().code == ErrorCode.NOT_DUE
    assert all(member.status is MemberStatus.ACTIVE for member in run.members.values())
    run.must(run.resume())
    assert (run.run.phase, run.run.round) == (Phase.ROUND_TRAIN, number + 1)
    play(run)
    assert run.members[0].credit >= 100 * (number + 1)


@pytest.mark.parametrize("phase", [Phase.WAITING_FOR_MEMBERS, Phase.WARMUP])
def test_pause_before_training(phase: Phase) -> None:
    run = RunDriver(Chain())
    run.must(run.create())
    for member in range(4):
        run.must(run.join(member))
    if phase is Phase.WARMUP:
        run.tick_when_due()
        run.must(run.ready(0))
    run.must(run.pause())
    run.must(run.tick())
    assert (run.run.phase, run.run.resume_phase) == (Phase.PAUSED, phase)
    run.must(run.leave(3))
    run.must(run.join(3))
    if phase is Phase.WARMUP:
        run.must(run.ready(1))
        assert run.header.ready == 2
    else:
        assert run.ready(1).code == ErrorCode.WRONG_PHASE
    run.must(run.resume())
    assert run.run.phase is phase
    if phase is Phase.WAITING_FOR_MEMBERS:
        run.tick_when_due()
        for member in (0, 1):
            run.must(run.ready(member))
    for member in (2, 3):
        run.must(run.ready(member))
    run.tick_when_due()
    assert run.header.active == 4


def test_a_pause_can_be_taken_back() -> None:
    run = long_run(overlap=0)
    run.start()
    run.must(run.pause())
    run.must(run.resume())
    play(run)
    assert (run.run.phase, run.run.round) == (Phase.ROUND_TRAIN, 1)


def test_finish_ends_with_a_checkpoint_and_close_returns_the_rent() -> None:
    run = long_run(overlap=1)
    run.start()
    play(run)
    run.must(run.finish())
    for member in range(4):
        run.must(run.commit(member))
    run.tick_when_due()
    for number in (0, 1):
        for witness in set(run.rounds[number].witnesses) - set(run.rounds[number].attestations):
            run.must(run.attest(witness, number, range(4)))
    run.tick_when_due()
    assert run.run.phase is Phase.COOLDOWN
    for member in range(3):
        run.must(run.checkpoint(member, b"\x31" * 32))
    run.tick_when_due()
    assert (run.run.phase, run.run.checkpoint_round, run.run.checkpoint_root) == (Phase.FINISHED, 2, b"\x31" * 32)
    svm = run.chain.svm
    held = sum(svm.get_balance(address) or 0 for address in vars_of(run))
    before = svm.get_balance(run.owner) or 0
    run.must(run.by_owner(ix.close_run))
    assert svm.get_balance(run.owner) == before + held
    assert all(svm.get_account(address) is None for address in vars_of(run))
    run.must(run.create())
    assert run.run.phase is Phase.WAITING_FOR_MEMBERS, "the name is free again"


def vars_of(run: RunDriver) -> list:  # type: ignore[type-arg]
    return [run.addresses.run, run.addresses.members, run.addresses.rounds]


def test_finish_of_a_run_that_never_began() -> None:
    run = RunDriver(Chain())
    run.must(run.create())
    run.must(run.finish())
    run.must(run.tick())
    assert run.by_owner(ix.close_run).code == ErrorCode.NOT_FINISHED, "not in the slot that made it"
    run.chain.advance()
    run.must(run.by_owner(ix.close_run))


def test_config_changes_hold_from_the_next_round_and_nobody_reconnects() -> None:
    run = long_run(overlap=0)
    run.start()
    run.must(run.set_config(batch=128, witnesses=2))
    assert (run.run.limits.batch, run.run.next_limits.batch, run.run.config_version) == (64, 128, 0)
    assert run.rounds[0].ranges == ((0, 64),)
    play(run)
    assert (run.run.limits.batch, run.run.next_limits, run.run.config_version) == (128, None, 1)
    assert run.rounds[1].ranges == ((64, 128),)
    assert len(run.rounds[1].witnesses) == 2
    assert run.rounds[1].active == {0, 1, 2, 3}


def test_config_changes_hold_at_once_while_no_round_is_open() -> None:
    run = RunDriver(Chain(), init_min_members=8)
    run.must(run.create())
    for member in range(4):
        run.must(run.join(member))
    assert run.header.due_slot == UNKNOWN_SLOT
    run.must(run.set_config(init_min_members=4))
    assert run.header.due_slot < UNKNOWN_SLOT
    run.tick_when_due()
    assert run.run.phase is Phase.WARMUP


@pytest.mark.parametrize("change", [{"overlap": 0}, {"overlap": 1}])
def test_overlap_changes_between_rounds(change: dict[str, int]) -> None:
    run = long_run(overlap=1 - change["overlap"])
    run.start()
    play(run)
    run.must(run.set_config(**change))
    number = run.train(range(4))
    for late in (number - 1, number):
        for witness in set(run.rounds[late].witnesses) - set(run.rounds[late].attestations):
            if not run.rounds[late].final:
                run.must(run.attest(witness, late, range(4)))
    run.tick_when_due()
    assert run.run.phase is Phase.COOLDOWN, "not while two rounds are open"
    for member in range(3):
        run.must(run.checkpoint(member, b"\x31" * 32))
    run.tick_when_due()
    play(run, 4)
    entry = run.run
    assert entry.limits.overlap == change["overlap"]
    assert entry.final_rounds == entry.round - change["overlap"]
    assert [kept.round for kept in entry.inclusion] == list(range(entry.final_rounds))
    assert not any(kept.void for kept in entry.inclusion)


def test_another_model_makes_everybody_warm_up_again() -> None:
    run = long_run(overlap=0)
    run.start()
    run.train([0, 1])
    run.attest_all(0, range(4), [0, 1])
    run.tick_when_due()
    run.must(run.pause())
    run.train([2, 3])
    run.attest_all(1, range(4), [2, 3])
    run.tick_when_due()
    run.tick_when_due()
    assert run.run.phase is Phase.PAUSED
    assert decode_requeue(run.data(run.addresses.rounds))
    fresh = replace(TERMS, model_root=b"\x77" * 32, data_manifest=b"\x78" * 32)
    run.must(run.by_owner(ix.set_model, replace(run.terms, peak_lr_bits=0x3B83126F)))
    assert decode_requeue(run.data(run.addresses.rounds)), "the same data goes on where it was"
    run.must(run.by_owner(ix.set_model, fresh))
    state = run.run
    assert (state.cursor, state.checkpoint_root, state.checkpoint_round) == (0, b"\x77" * 32, state.round)
    assert (state.model_round, state.terms, state.resume_phase) == (2, fresh, Phase.WAITING_FOR_MEMBERS)
    assert decode_requeue(run.data(run.addresses.rounds)) == ()
    run.must(run.resume())
    run.tick_when_due()
    assert run.ready(0, TERMS.model_root).code == ErrorCode.WRONG_MODEL_ROOT
    for slot, member in run.members.items():
        if member.live:
            run.must(run.ready(slot))
    run.tick_when_due()
    assert run.rounds[2].ranges == ((0, 64),)


def test_a_round_grows_to_the_batch_over_the_ramp() -> None:
    run = long_run(replace(TERMS, ramp_batch=10, ramp_rounds=4), overlap=0)
    run.start()
    sizes = []
    for number in range(6):
        sizes.append(sum(count for _, count in run.rounds[number].ranges))
        play(run)
    assert sizes == [10, 23, 37, 50, 64, 64]
    # No position is left out or assigned twice.
    assert run.run.cursor == sum(sizes) + 64


def test_a_ramp_begins_again_under_new_terms_and_never_exceeds_the_batch() -> None:
    run = long_run(overlap=0)
    run.start()
    play(run)
    run.must(run.pause())
    play(run)
    run.tick_when_due()
    run.must(run.by_owner(ix.set_model, replace(run.terms, ramp_batch=1000, ramp_rounds=2, z_loss_bits=1)))
    assert (run.run.terms.ramp_batch, run.run.terms.ramp_rounds, run.run.terms.z_loss_bits) == (1000, 2, 1)
    run.must(run.by_owner(ix.set_model, replace(run.terms, ramp_batch=8, ramp_rounds=2)))
    run.must(run.resume())
    run.tick_when_due()
    for slot in range(4):
        run.must(run.ready(slot))
    run.tick_when_due()
    for number, size in ((2, 8), (3, 36), (4, 64)):
        assert sum(count for _, count in run.rounds[number].ranges) == size
        play(run)


def test_rewards_accrue_at_the_rate_of_their_time_and_are_paid_once() -> None:
    run = long_run(overlap=0)
    run.start()
    svm = run.chain.svm
    for member in range(4):
        svm.airdrop(run.wallet(member), 10**9)
    play(run)
    run.must(run.by_owner(ix.set_reward_rate, 3 * 10**9))
    play(run)
    run.must(run.by_owner(ix.set_reward_rate, 0))
    play(run)
    each = 100 * 3 * 10**9 // 10**6
    assert [run.members[slot].reward for slot in range(4)] == [each] * 4
    assert run.run.reward_earned == 4 * each
    assert run.claim(0).code == ErrorCode.REWARDS_UNFUNDED
    svm.airdrop(run.addresses.run, each + each // 2)
    before = svm.get_balance(run.wallet(0))
    run.must(run.claim(0))
    assert svm.get_balance(run.wallet(0)) == before + each
    assert run.claim(0).code == ErrorCode.NOTHING_TO_CLAIM
    run.must(run.claim(1))
    assert run.members[1].reward_claimed == each // 2, "what there is"
    assert run.claim(1).code == ErrorCode.REWARDS_UNFUNDED
    run.must(run.leave(3))
    play(run)
    outcome, receipt = run.archive(3)
    run.must(outcome)
    svm.airdrop(run.addresses.run, 2 * each)
    before = svm.get_balance(run.wallet(3))
    run.must(run.claim(3, receipt))
    assert svm.get_balance(run.wallet(3)) == before + each
    assert run.claim(3, receipt).code == ErrorCode.NOTHING_TO_CLAIM
    run.must(run.claim(1))
    assert run.run.reward_paid == 3 * each
    rent = svm.minimum_balance_for_rent_exemption(1536)
    assert svm.get_balance(run.addresses.run) == rent + each // 2
    # what is owed keeps the run from being closed, for 30 days
    run.must(run.finish())
    run.train([0, 1, 2])
    run.attest_all(run.run.round, range(3), range(3))
    run.tick_when_due()
    run.tick_when_due()
    assert run.by_owner(ix.close_run).code == ErrorCode.REWARDS_OWED
    run.chain.advance(6_480_000)
    run.must(run.by_owner(ix.close_run))


def test_a_live_run_moves_to_the_next_version_of_the_program() -> None:
    """A run begun under the program before goes on, in the middle of a round, under this one."""
    chain = Chain(program=VERSION_1.read_bytes())
    run = long_run_of(chain)
    run.must(run.create_as_before())
    for member in range(4):
        run.must(run.join_as_before(member))
    run.chain.set_slot(run.before_due())
    run.must(run.tick())
    for member in range(4):
        run.must(run.ready(member, TERMS.model_root))
    run.must(run.tick())
    run.must(run.commit(0, 0))
    accounts = run.snapshot()
    upgrade(chain, program_bytes("v3"))
    assert run.commit(1, 0).code == ErrorCode.WRONG_ACCOUNT_VERSION
    assert run.snapshot() == accounts
    migrate = ix.migrate(run.addresses, chain.program, run.wallet(1))  # anyone may: there is nothing to choose
    run.must(chain.send(migrate))
    assert chain.send(migrate).code == ErrorCode.WRONG_ACCOUNT_VERSION
    assert run.run.limits == run.limits
    assert run.rounds[0].commitments[0].tokens == 100
    for member in (1, 2, 3):
        run.must(run.commit(member, 0))
    run.tick_when_due()
    run.attest_all(0, range(4), range(4))
    run.tick_when_due()
    run.must(run.join(4))
    run.must(run.ready(4))
    play(run, 2)
    assert [run.members[slot].credit for slot in range(5)] == [300, 300, 300, 300, 100]


class OlderRun(RunDriver):
    """Two instructions had fewer bytes in version 1."""

    def create_as_before(self):  # type: ignore[no-untyped-def]
        rent = self.chain.svm.minimum_balance_for_rent_exemption
        *created, init = ix.create_run_instructions(
            self.chain.program, self.owner, self.run_id, self.limits, self.terms, rent, self.chain.payer.pubkey()
        )
        shorter = type(init)(init.program_id, init.data[: -32 - layout.COURSE.size], init.accounts)
        return self.chain.send([*created, shorter])

    def join_as_before(self, member: int):  # type: ignore[no-untyped-def]
        made = ix.join(self.addresses, self.chain.program, self.wallet(member), self.node(member))
        return self.chain.send(type(made)(made.program_id, made.data[:-4], made.accounts))

    def before_due(self) -> int:
        return self.chain.slot + self.limits.join_grace


def long_run_of(chain: Chain) -> OlderRun:
    return OlderRun(chain, rounds_per_epoch=100, total_rounds=100, overlap=0)


def test_receipts_and_grants_are_of_one_run_and_not_of_its_name() -> None:
    """A closed run's name can be used again. What is left of the first run is worth nothing in the second one."""
    chain = Chain()
    run = RunDriver(chain, overlap=0, rounds_per_epoch=1, total_rounds=1)
    run.join_authority = run.owner
    run.must(run.create())
    run.must(run.authorize(None))
    grant = run.grant(None)
    for member in range(4):
        run.must(run.join(member, grant=grant))
        chain.svm.airdrop(run.wallet(member), 10**9)
    run.must(run.by_owner(ix.set_reward_rate, 10**9))
    run.tick_when_due()
    for member in range(4):
        run.must(run.ready(member))
    run.tick_when_due()
    play(run)
    run.must(run.leave(3))
    outcome, receipt = run.archive(3)
    run.must(outcome)
    payer = chain.payer.pubkey()
    early = chain.send(ix.reclaim(run.addresses.run, chain.program, payer, receipt))
    assert early.code == ErrorCode.NOT_CLOSED
    run.tick_when_due()
    chain.advance(6_480_000)
    run.must(run.by_owner(ix.close_run))
    run.must(run.create())
    assert run.join(3, grant=grant).code == ErrorCode.ACCOUNT_MISMATCH
    run.must(run.by_owner(ix.set_config, run.limits, None))
    run.must(run.join(3))
    assert run.restore(3, receipt).code == ErrorCode.ACCOUNT_MISMATCH
    chain.svm.airdrop(run.addresses.run, 10**9)
    assert run.claim(3, receipt).code == ErrorCode.ACCOUNT_MISMATCH
    for record, heir in ((receipt, payer), (grant, run.owner)):
        stranger = chain.send(ix.reclaim(run.addresses.run, chain.program, run.wallet(0), record))
        assert stranger.code == ErrorCode.NOT_OWNER
        before = chain.svm.get_balance(heir) or 0
        run.must(chain.send(ix.reclaim(run.addresses.run, chain.program, heir, record)))
        assert (chain.svm.get_balance(heir) or 0) > before - 20_000
        assert chain.svm.get_account(record) is None


@pytest.mark.parametrize("put_out", ["kick", "ban"])
def test_leaving_is_no_way_around_being_put_out(put_out: str) -> None:
    run = long_run(overlap=0)
    run.start()
    for member in range(4):
        run.must(run.commit(member))
    run.must(run.leave(3))
    run.must(run.kick(3) if put_out == "kick" else run.ban(run.wallet(3)))
    assert run.members[3].status is MemberStatus.EJECTED
    assert run.kick(3).code == ErrorCode.MEMBER_NOT_ACTIVE
    run.tick_when_due()
    run.attest_all(0, range(3), range(4))
    run.tick_when_due()
    assert run.run.inclusion_set(0).members == {0, 1, 2}
    assert (run.members[3].credit, run.run.tokens) == (0, 300)
