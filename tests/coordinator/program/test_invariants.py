"""Random schedules of members who commit, stay silent, lie, leave and come back, checked against the model."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from program_harness import Chain, RunDriver
from program_model import assignment, decided, eligible, flatten, included

from coordinator.errors import ErrorCode
from coordinator.state import UNKNOWN_SLOT, MemberStatus, Phase, Round, decode_requeue

MEMBERS = 6
CHAIN = Chain()
LIVE = (MemberStatus.PENDING, MemberStatus.ACTIVE, MemberStatus.DESYNCED)


class Watched:
    """A run and what a bystander has seen of it: every round as it was when it became final."""

    def __init__(self, overlap: int, witnesses: int, shares: list[int]) -> None:
        CHAIN.advance()
        self.run = RunDriver(
            CHAIN,
            f"i{CHAIN.slot}",
            overlap=overlap,
            witnesses=witnesses,
            init_min_members=3,
            min_members=2,
            batch=23,
            rounds_per_epoch=4,
            total_rounds=9,
            max_round_train_time=30,
        )
        self.shares = shares
        self.final: dict[int, Round] = {}
        self.run.must(self.run.create())
        for member, share in enumerate(shares):
            self.run.must(self.run.join(member, share))

    def tick(self) -> None:
        run, chain = self.run, self.run.chain
        header, before = run.header, run.run
        if before.phase is Phase.FINISHED:
            assert run.tick().code == ErrorCode.RUN_FINISHED
            return
        if header.due_slot == UNKNOWN_SLOT or chain.slot < header.due_slot:
            assert run.tick().code == ErrorCode.NOT_DUE
            return
        rounds = run.rounds
        run.must(run.tick())
        self.check(rounds)

    def check(self, before: dict[int, Round]) -> None:
        run = self.run
        state, header, rounds, members = run.run, run.header, run.rounds, run.members
        for number, entry in rounds.items():
            if not entry.final or number in self.final:
                continue
            was = before[number]
            assert entry.included == included(was), "the inclusion set is the model's"
            assert entry.eligible == eligible(was)
            kept = state.inclusion_set(number)
            assert kept is not None
            assert (kept.members, kept.void) == (entry.included, not entry.included)
            self.final[number] = entry
        # every position below the cursor is in exactly one place
        trained = [p for entry in self.final.values() for slot in entry.included for p in entry.positions(slot)]
        flying = [p for entry in rounds.values() if not entry.final for p in flatten(entry.ranges)]
        queued = flatten(decode_requeue(run.data(run.addresses.rounds)))
        assert sorted([*trained, *flying, *queued]) == list(range(state.cursor))
        assert header.requeued == len(queued)
        # credit is conserved, and is what the inclusion sets say
        credit: Counter[int] = Counter()
        for entry in self.final.values():
            for slot in entry.included:
                credit[slot] += entry.commitments[slot].tokens
        assert {slot: member.credit for slot, member in members.items() if member.credit} == {
            slot: tokens for slot, tokens in credit.items() if tokens
        }
        assert state.tokens == sum(credit.values())
        # the header counts what the table says
        live = [member for member in members.values() if member.status in LIVE]
        active = [member for member in live if member.status is MemberStatus.ACTIVE]
        assert (header.members, header.active) == (len(live), len(active))
        assert (state.member_count, state.active_count) == (len(live), len(active))
        assert (header.phase, header.round) == (state.phase, state.round)
        assert all(number in self.final for number in range(state.final_rounds))
        if state.phase is Phase.ROUND_TRAIN and state.phase_slot == run.chain.slot and state.round not in before:
            entry = rounds[state.round]
            shares = {member.slot: member.share for member in active}
            slices, witnesses = assignment(state.seed, shares, 23, run.limits)
            assert (entry.slices, entry.witnesses) == (slices, witnesses)
            assert sum(count for _, count in entry.ranges) == 23
        if state.phase is Phase.ROUND_WITNESS:
            needed = [e for e in rounds.values() if e.closed and not e.final]
            speaking = {m.slot for m in live if m.status in (MemberStatus.ACTIVE, MemberStatus.DESYNCED)}
            if run.limits.overlap and not header.draining:
                needed = [e for e in needed if e.round < state.round]
            assert (
                header.due(run.chain.slot) == all(decided(entry, speaking) for entry in needed)
                or header.due_slot <= run.chain.slot
            )

    def act(self, choice: int) -> None:
        """One wave: most members do the usual thing, some do not. `choice` decides who and what."""
        run = self.run
        choice, kind = divmod(choice, 8)
        mask = choice & 63 if choice % 3 == 0 else (choice & 63) | (choice >> 6 & 63) | (choice >> 12 & 63)
        named = [member for member in range(MEMBERS) if mask >> member & 1]
        odd = choice >> 18
        if kind < 3:
            for member in named:
                entry = run.rounds.get(run.header.round)
                limit = 128 * entry.slices.get(member, (0, 0))[1] if entry else 0
                run.commit(member, tokens=limit - odd % (limit + 1), fingerprint=9 if odd == member * 9 else 7)
                run.chain.advance(odd % 2)
        elif kind < 5:
            for entry in run.rounds.values():
                if entry.closed and not entry.final:
                    vouched = [slot for slot in entry.commitments if odd % 5 or slot != odd % MEMBERS]
                    for member in named:
                        run.attest(member, entry.round, vouched)
        elif kind == 5:
            for member in named:
                run.checkpoint(member, bytes([odd == member]) * 32)
            run.chain.advance(1 + odd % 40)
        elif kind == 6:
            run.ready(odd % MEMBERS)
            if odd % 4 == 0:
                run.leave(odd // 4 % MEMBERS)
            run.join(odd % MEMBERS, self.shares[odd % MEMBERS % len(self.shares)])
        for _ in range(odd % 4):
            self.tick()


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    overlap=st.integers(0, 1),
    witnesses=st.sampled_from([0, 1, 2]),
    shares=st.lists(st.integers(1, 5000), min_size=3, max_size=MEMBERS),
    choices=st.lists(st.integers(0, 2**24 - 1), min_size=60, max_size=120),
)
def test_random_schedules(overlap: int, witnesses: int, shares: list[int], choices: list[int]) -> None:
    watched = Watched(overlap, witnesses, shares)
    run = watched.run
    run.chain.advance(20)
    watched.tick()
    for member in range(len(shares)):
        run.ready(member)
    watched.tick()
    assert run.run.phase is Phase.ROUND_TRAIN
    for choice in choices:
        watched.act(choice)
    # whatever happened, time alone leads on as long as enough members are left
    for _ in range(60):
        due = run.header.due_slot
        if due == UNKNOWN_SLOT:
            break
        run.chain.set_slot(max(run.chain.slot, due))
        watched.tick()
    assert run.run.phase in (Phase.FINISHED, Phase.WAITING_FOR_MEMBERS, Phase.WARMUP)
