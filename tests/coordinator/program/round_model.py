"""The state machine of a run in plain Python, written from the protocol, to check the program against: what members do,
and what a tick brings about. run_model.py adds the owner's instructions, grants and receipts.

Every instruction is a method; it returns None when it succeeds, or the number that the program must refuse it with. The
fields have the names of the decoded accounts. Sets and dicts stand for what the program keeps in bitmaps and rings.
"""

from __future__ import annotations

import hashlib

from model_parts import ACTIVE, DESYNCED, LIVE, PENDING, ModelGrant, ModelMember, ModelReceipt, ModelRound
from program_model import assignment, majority_of, next_seed, quorum
from solders.pubkey import Pubkey

from coordinator.addresses import RunAddresses
from coordinator.errors import ErrorCode as E
from coordinator.layout import INCLUSION_RING, MAX_DELEGATES, MAX_MEMBERS, MAX_SHARE, ROUND_RING
from coordinator.values import Commitment, InclusionSet, Limits, MemberStatus, Phase, Request, Terms

Result = E | None
MOST_RANGES = 15  # that a round draws from the queue


class RoundModel:
    """A run from its creation on. `slot` and `newest` (the newest slot hash) are set from outside, as the chain's."""

    def __init__(
        self,
        addresses: RunAddresses,
        owner: Pubkey,
        limits: Limits,
        terms: Terms,
        authority: Pubkey | None,
        slot: int,
        newest: bytes,
    ) -> None:
        self.addresses, self.owner, self.slot, self.newest = addresses, owner, slot, newest
        self.limits, self.terms, self.join_authority = limits, terms, authority
        self.next_limits: Limits | None = None
        self.phase, self.request, self.resume_phase = Phase.WAITING_FOR_MEMBERS, Request.NONE, Phase.UNINITIALIZED
        self.phase_slot = self.created_slot = slot
        self.revision, self.config_version = 1, 0
        self.model_round, self.schedule_rounds = 0, limits.total_rounds
        self.round = self.epoch = self.final_rounds = self.epoch_round = 0
        self.cursor = self.tokens = 0
        self.seed = hashlib.sha256(bytes(32) + bytes(addresses.run) + newest).digest()
        self.checkpoint_root, self.checkpoint_round = terms.model_root, 0
        self.inclusion_sets: dict[int, InclusionSet] = {}
        self.reward_rate = self.reward_earned = self.reward_paid = 0
        self.member_count = self.active_count = 0
        self.members: dict[int, ModelMember] = {}
        self.ring: dict[int, ModelRound] = {}
        self.queue: list[tuple[int, int]] = []
        self.banned: list[Pubkey] = []
        self.grants: dict[Pubkey, ModelGrant] = {}
        self.receipts: dict[Pubkey, ModelReceipt] = {}
        self.stale: dict[Pubkey, Pubkey] = {}  # records of closed runs of this name, and who gets their lamports
        self.votes: dict[int, bytes] = {}
        self.checkpoint_agreed: tuple[bytes, int] | None = None
        self.draining = False
        self.committed = self.attested = 0
        self.due_slot: int | None = None
        self.grace_slot: int | None = None
        self.vault = 0  # lamports of the run account above its rent
        self.closed = False
        # what only a bystander remembers
        self.trained: list[int] = []  # positions included since the data was last changed
        self.ever_included: dict[int, frozenset[int]] = {}

    # ------------------------------------------------------------------ what is counted

    @property
    def stage(self) -> Phase:
        return self.resume_phase if self.phase is Phase.PAUSED else self.phase

    def with_status(self, *statuses: MemberStatus) -> list[ModelMember]:
        return [member for member in self.members.values() if member.status in statuses]

    @property
    def ready_count(self) -> int:
        return sum(member.ready for member in self.members.values())

    def enough(self) -> bool:
        """For another round, in which those who are ready take part."""
        return len(self.with_status(ACTIVE)) + self.ready_count >= self.limits.min_members

    def find(self, wallet: Pubkey) -> int | None:
        return next((slot for slot, member in self.members.items() if member.wallet == wallet), None)

    def entry(self, number: int) -> ModelRound | None:
        found = self.ring.get(number % ROUND_RING)
        return found if found and found.round == number else None

    def open_rounds(self) -> list[ModelRound]:
        return [entry for entry in self.ring.values() if entry.in_flight]

    def missing(self, address: Pubkey) -> E:
        """What is said of a grant or a receipt that this run does not have."""
        return E.ACCOUNT_MISMATCH if address in self.stale else E.WRONG_ACCOUNT_OWNER

    def in_flight(self, slot: int) -> bool:
        return any(slot in entry.active for entry in self.open_rounds())

    def current(self) -> ModelRound:
        entry = self.entry(self.round)
        assert entry is not None
        return entry

    def undecided_before(self) -> ModelRound | None:
        """The round before, where it has closed and is not final."""
        entry = self.entry(self.round - 1)
        return entry if entry and entry.closed and not entry.final else None

    # ------------------------------------------------------------------ when the next tick is due

    def decided(self, entry: ModelRound) -> bool:
        speaking = {slot for slot, member in self.members.items() if member.status in (ACTIVE, DESYNCED)}
        missing = len([w for w in entry.witnesses if w not in entry.attestations and w in speaking])
        need = quorum(len(entry.witnesses))
        counts = [sum(slot in said for said in entry.attestations.values()) for slot in entry.eligible]
        return missing == 0 or all(count >= need or count + missing < need for count in counts)

    def schedule(self) -> None:
        limits, now, live = self.limits, self.slot, len(self.with_status(*LIVE))
        due: int | None = None
        if self.phase is Phase.WAITING_FOR_MEMBERS:
            if self.request:
                due = now
            elif live < limits.init_min_members:
                self.grace_slot = None
            else:
                self.grace_slot = now if self.grace_slot is None else self.grace_slot
                due = now if live >= limits.max_members else self.grace_slot + limits.join_grace
        elif self.phase is Phase.WARMUP:
            all_ready = self.ready_count >= limits.min_members and self.ready_count == live
            due = now if self.request or all_ready else self.phase_slot + limits.warmup_time
        elif self.phase is Phase.ROUND_TRAIN:
            due = self._train_due()
        elif self.phase is Phase.ROUND_WITNESS:
            needed = [self.undecided_before()]
            if not limits.overlap or self.draining:
                needed.append(self.current())
            waits = any(entry is not None and not self.decided(entry) for entry in needed)
            due = self.phase_slot + limits.round_witness_time if waits else now
        elif self.phase is Phase.COOLDOWN:
            due = now if self.checkpoint_agreed else self.phase_slot + limits.cooldown_time
        elif self.phase is Phase.PAUSED and self.request:
            due = now
        self.due_slot = due

    def _train_due(self) -> int:
        entry, limits = self.current(), self.limits
        expected, committed = len(entry.expected), len(entry.counting())
        if committed >= expected:
            return self.slot
        due = entry.start_slot + limits.max_round_train_time
        # half and two thirds are of the members and of the positions
        wanted = sum(entry.slices[slot][1] for slot in entry.expected)
        have = sum(entry.slices[slot][1] for slot in entry.counting())
        if entry.median is None and 2 * committed >= expected and 2 * have >= wanted:
            entry.median = self.slot - entry.start_slot
        if committed >= quorum(expected) and have >= quorum(wanted):
            assert entry.median is not None
            due = min(due, entry.start_slot + (3 * entry.median + 1) // 2 + limits.adaptive_grace)
        return due

    def publish_attested(self) -> None:
        entry = self.undecided_before() or self.entry(self.round)
        self.attested = len(entry.attestations) if entry else 0

    def publish(self) -> None:
        self.revision += 1
        self.member_count, self.active_count = len(self.with_status(*LIVE)), len(self.with_status(ACTIVE))
        self.publish_attested()
        self.schedule()

    # ------------------------------------------------------------------ members

    def join(self, wallet: Pubkey, node: Pubkey, share: int, grant: Pubkey | None) -> Result:
        if self.phase is Phase.FINISHED:
            return E.RUN_FINISHED
        if wallet in self.banned or node in self.banned:
            return E.BANNED
        if self.join_authority is None:
            grant = None
        elif refused := self._admit(wallet, grant):
            return refused
        if not 1 <= share <= (self.limits.max_share or MAX_SHARE):
            return E.BAD_SHARE
        own = self.find(wallet)
        for slot, member in self.members.items():
            if member.live and member.node_key == bytes(node):
                return E.ALREADY_A_MEMBER if slot == own else E.NODE_KEY_IN_USE
        rotates = own is not None and self.members[own].live
        if not rotates and len(self.with_status(*LIVE)) >= self.limits.max_members:
            return E.RUN_FULL
        by_it = [member for member in self.with_status(*LIVE) if grant and member.grant == grant]
        if not rotates and len(by_it) > MAX_DELEGATES and grant and self.grants[grant].grantee is not None:
            return E.GRANT_FULL
        place = min(set(range(MAX_MEMBERS)) - self.members.keys()) if own is None else own
        member = self.members.setdefault(place, ModelMember(wallet))
        member.node_key, member.grant, member.next_share = bytes(node), grant, share
        if not rotates:
            member.joined_round, member.joined_slot = self.round, self.slot
            member.become(PENDING, self.slot)
        self.schedule()
        return None

    def _admit(self, wallet: Pubkey, address: Pubkey | None) -> Result:
        if address is None:
            return E.NOT_PERMISSIONLESS
        grant = self.grants.get(address)
        if grant is None:
            return self.missing(address)
        if grant.authority != self.join_authority:
            return E.NOT_AUTHORIZED
        if grant.grantee in self.banned:
            return E.BANNED
        named = grant.grantee in (None, wallet) or wallet in grant.delegates
        return None if named else E.NOT_AUTHORIZED

    def ready(self, wallet: Pubkey, root: bytes) -> Result:
        if self.stage is Phase.FINISHED:
            return E.RUN_FINISHED
        if self.stage is Phase.WAITING_FOR_MEMBERS:
            return E.WRONG_PHASE
        slot = self.find(wallet)
        if slot is None:
            return E.NOT_A_MEMBER
        member = self.members[slot]
        if member.status not in (PENDING, DESYNCED):
            return E.MEMBER_NOT_ACTIVE
        if member.ready:
            return E.ALREADY_READY
        if root != self.checkpoint_root:
            return E.WRONG_MODEL_ROOT
        member.ready = True
        self.schedule()
        return None

    def _live(self, wallet: Pubkey) -> tuple[Result, int]:
        if self.phase is Phase.FINISHED:
            return E.RUN_FINISHED, -1
        slot = self.find(wallet)
        if slot is None:
            return E.NOT_A_MEMBER, -1
        return (None if self.members[slot].live else E.MEMBER_NOT_ACTIVE), slot

    def set_share(self, wallet: Pubkey, share: int) -> Result:
        refused, slot = self._live(wallet)
        if refused:
            return refused
        if not 1 <= share <= (self.limits.max_share or MAX_SHARE):
            return E.BAD_SHARE
        self.members[slot].next_share = share
        return None

    def leave(self, wallet: Pubkey) -> Result:
        refused, slot = self._live(wallet)
        if refused:
            return refused
        self.members[slot].become(MemberStatus.LEFT, self.slot)
        if self.phase is Phase.ROUND_TRAIN and slot not in self.current().commitments:
            self.current().expected.discard(slot)
        self.schedule()
        return None

    # ------------------------------------------------------------------ a round

    def commit(self, wallet: Pubkey, number: int, digest: bytes, size: int, tokens: int, fingerprint: int) -> Result:
        if self.phase is Phase.FINISHED:
            return E.RUN_FINISHED
        if self.phase is not Phase.ROUND_TRAIN:
            return E.WRONG_PHASE
        if number != self.round:
            return E.WRONG_ROUND
        slot = self.find(wallet)
        if slot is None:
            return E.NOT_A_MEMBER
        entry = self.current()
        if self.members[slot].status is not ACTIVE:
            return E.MEMBER_NOT_ACTIVE
        if slot not in entry.expected:
            return E.NOTHING_ASSIGNED
        if slot in entry.commitments:
            return E.ALREADY_COMMITTED
        if size != self.terms.update_bytes:
            return E.WRONG_LENGTH
        if tokens > entry.slices[slot][1] * self.terms.sequence_length:
            return E.TOO_MANY_TOKENS
        entry.commitments[slot] = Commitment(slot, digest, size, tokens, fingerprint, self.slot)
        self.committed = len(entry.counting())
        self.schedule()
        return None

    def attest(self, wallet: Pubkey, number: int, named: frozenset[int]) -> Result:
        entry = self.entry(number)
        if entry is None:
            return E.WRONG_ROUND
        if not entry.closed:
            return E.ROUND_NOT_CLOSED
        if entry.final:
            return E.ROUND_FINAL
        slot = self.find(wallet)
        if slot is None:
            return E.NOT_A_MEMBER
        if self.members[slot].status not in (ACTIVE, DESYNCED):
            return E.MEMBER_NOT_ACTIVE
        if slot not in entry.witnesses:
            return E.NOT_A_WITNESS
        if slot in entry.attestations:
            return E.ALREADY_ATTESTED
        if named - entry.commitments.keys():
            return E.ATTESTED_UNCOMMITTED
        entry.attestations[slot] = named
        self.publish_attested()
        self.schedule()
        return None

    def checkpoint(self, wallet: Pubkey, number: int, root: bytes) -> Result:
        if self.phase is Phase.FINISHED:
            return E.RUN_FINISHED
        if self.phase is not Phase.COOLDOWN:
            return E.WRONG_PHASE
        if number != self.final_rounds:
            return E.WRONG_ROUND
        slot = self.find(wallet)
        if slot is None:
            return E.NOT_A_MEMBER
        if self.members[slot].status is not ACTIVE:
            return E.MEMBER_NOT_ACTIVE
        if slot in self.votes:
            return E.ALREADY_VOTED
        self.votes[slot] = root
        self._agree()
        self.schedule()
        return None

    def _agree(self) -> None:
        voters = [voter for voter in self.votes if voter in self.members and self.members[voter].status is ACTIVE]
        roots = [self.votes[voter] for voter in voters]
        for root in set(roots) if self.checkpoint_agreed is None else ():
            if roots.count(root) >= quorum(len(self.with_status(ACTIVE))):
                self.checkpoint_agreed = (root, self.final_rounds)

    # ------------------------------------------------------------------ transitions

    def tick(self) -> Result:
        if self.phase is Phase.FINISHED:
            return E.RUN_FINISHED
        if self.due_slot is None or self.slot < self.due_slot:
            return E.NOT_DUE
        idle = self.phase in (Phase.WAITING_FOR_MEMBERS, Phase.WARMUP, Phase.PAUSED)
        if idle and self.request is Request.FINISH:
            self._enter(Phase.FINISHED)
        elif idle and self.request is Request.PAUSE:
            self._pause(self.phase)
        elif self.phase is Phase.WAITING_FOR_MEMBERS:
            for member in self.with_status(*LIVE):
                if not (member.status is PENDING and member.ready):
                    member.become(PENDING, self.slot)
            self._enter(Phase.WARMUP)
        elif self.phase is Phase.WARMUP:
            self._end_warmup()
        elif self.phase is Phase.ROUND_TRAIN:
            self._close(self.current())
            self.draining = self._epoch_ends()
            self._enter(Phase.ROUND_WITNESS)
        elif self.phase is Phase.ROUND_WITNESS:
            self._end_witnessing()
        elif self.phase is Phase.COOLDOWN:
            self._end_cooldown()
        self.publish()
        return None

    def _enter(self, phase: Phase) -> None:
        self.phase, self.phase_slot = phase, self.slot

    def _pause(self, resume_phase: Phase) -> None:
        self.request, self.resume_phase = Request.NONE, resume_phase
        self._enter(Phase.PAUSED)

    def _wait(self) -> None:
        self.grace_slot = None
        self._enter(Phase.WAITING_FOR_MEMBERS)

    def _go_on(self, phase: Phase) -> None:
        if phase is Phase.WARMUP:
            self._enter(Phase.WARMUP)
        elif phase is Phase.ROUND_TRAIN and self.enough():
            self._begin_training()
        else:
            self._wait()

    def _begin_training(self) -> None:
        if self.round >= self.limits.total_rounds:
            self._enter(Phase.FINISHED)
            return
        self.epoch_round = self.round
        self._start_round()
        self._enter(Phase.ROUND_TRAIN)

    def _end_warmup(self) -> None:
        if self.ready_count >= self.limits.min_members:
            self.restart_clocks()
            self._begin_training()
            return
        for member in self.with_status(PENDING):
            if not member.ready and self.slot - member.status_slot >= self.limits.warmup_time:
                member.become(MemberStatus.DROPPED, self.slot)
        self._wait()

    def restart_clocks(self) -> None:
        for member in self.with_status(PENDING, DESYNCED):
            member.status_slot = self.slot

    def _epoch_ends(self) -> bool:
        done, coming = self.round + 1, self.next_limits or self.limits
        return (
            self.request is not Request.NONE
            or coming.overlap != self.limits.overlap
            or done >= coming.total_rounds
            or done - self.epoch_round >= self.limits.rounds_per_epoch
            or not self.enough()
        )

    def _end_witnessing(self) -> None:
        entry, before = self.current(), self.undecided_before()
        if before:
            self._finalize(before)
        self.draining = self.draining or self._epoch_ends()
        if not self.limits.overlap or self.draining:
            late = self.slot >= self.phase_slot + self.limits.round_witness_time
            if not late and not self.decided(entry):
                return
            self._finalize(entry)
        ends = self.draining or self._epoch_ends()
        self.final_rounds = self.round + 1 if entry.final else self.round
        digests = {slot: commitment.digest for slot, commitment in entry.commitments.items()}
        self.seed = next_seed(self.seed, digests, self.newest)
        self.round += 1
        if not ends:
            self._start_round()
            self._enter(Phase.ROUND_TRAIN)
            return
        self.draining, self.committed, self.votes, self.checkpoint_agreed = False, 0, {}, None
        self._adopt_config()
        self._enter(Phase.COOLDOWN)

    def _end_cooldown(self) -> None:
        self._agree()
        if self.checkpoint_agreed:
            self.checkpoint_root, self.checkpoint_round = self.checkpoint_agreed
        if self.round >= self.limits.total_rounds or self.request is Request.FINISH:
            self._enter(Phase.FINISHED)
            return
        self.epoch += 1
        if self.request is Request.PAUSE:
            self._pause(Phase.ROUND_TRAIN)
        else:
            self._go_on(Phase.ROUND_TRAIN)

    # ------------------------------------------------------------------ the parts of a round

    def _start_round(self) -> None:
        self._adopt_config()
        entry = ModelRound(self.round, self.slot)
        for slot, member in sorted(self.members.items()):
            if member.status in (PENDING, DESYNCED):
                if member.ready:
                    member.become(ACTIVE, self.slot)
                elif self.slot - member.status_slot > self.limits.warmup_time:
                    member.become(MemberStatus.DROPPED, self.slot)
            if member.status is ACTIVE:
                entry.active.add(slot)
        self._set_shares([self.members[slot] for slot in entry.active])
        ranges = self._draw(self._batch())
        entry.ranges = tuple(ranges)
        shares = {slot: self.members[slot].share for slot in entry.active}
        positions = sum(count for _, count in ranges)
        entry.slices, entry.witnesses = assignment(self.seed, shares, positions, self.limits)
        entry.expected = {slot for slot, (_, count) in entry.slices.items() if count}
        self.ring[self.round % ROUND_RING] = entry
        self.committed, self.draining = 0, False

    def _batch(self) -> int:
        """Positions of the round that begins: the first ones under the present terms lead up to the limits' batch."""
        batch, done, terms = self.limits.batch, self.round - self.model_round, self.terms
        if done >= terms.ramp_rounds:
            return batch
        low = min(terms.ramp_batch, batch)
        return low + (batch - low) * done // terms.ramp_rounds

    def _set_shares(self, team: list[ModelMember]) -> None:
        """What they ask for: more than before by doubling, in good standing only; newcomers up to the others' mean."""
        most = self.limits.max_share or MAX_SHARE
        newcomers = [member for member in team if not member.share]
        others = [member for member in team if member.share]
        for member in others:
            asked = min(member.next_share, most)
            if asked > member.share:
                asked = member.share if member.missed or member.excluded else min(asked, 2 * member.share)
            member.share = asked
        mean = sum(member.share for member in others) // len(others) if others else MAX_SHARE
        for member in newcomers:
            member.share = min(member.next_share, most, mean)

    def _blame(self, member: ModelMember, counter: str) -> None:
        count = min(getattr(member, counter) + 1, 255)
        setattr(member, counter, count)
        if count >= self.limits.max_missed and member.status is ACTIVE:
            member.become(MemberStatus.DROPPED, self.slot)

    def _draw(self, wanted: int) -> list[tuple[int, int]]:
        assert len(self.queue) < 300, "schedules with so few members do not crowd the queue"
        ranges: list[tuple[int, int]] = []
        while wanted and self.queue and len(ranges) < MOST_RANGES:
            start, count = self.queue.pop(0)
            taken = min(count, wanted)
            ranges.append((start, taken))
            wanted -= taken
            if taken < count:
                self.queue.insert(0, (start + taken, count - taken))
        if wanted:
            ranges.append((self.cursor, wanted))
            self.cursor += wanted
        return ranges

    def _close(self, entry: ModelRound) -> None:
        entry.closed, entry.close_slot, entry.eligible = True, self.slot, set(entry.counting())
        majority = majority_of([entry.commitments[slot].fingerprint for slot in entry.eligible])
        for slot in sorted(entry.expected):
            member = self.members[slot]
            if slot not in entry.commitments:
                if member.share > 1:
                    member.next_share = min(member.next_share, member.share // 2)
                self._blame(member, "missed")
            elif majority is not None and entry.commitments[slot].fingerprint != majority:
                entry.eligible.discard(slot)
                before, member.missed = member.missed, min(member.missed + 1, 255)
                if member.status is ACTIVE:
                    member.become(DESYNCED if before < self.limits.max_missed else MemberStatus.DROPPED, self.slot)
            else:
                member.missed = 0

    def _finalize(self, entry: ModelRound) -> None:
        need = quorum(len(entry.witnesses))
        late = not self.decided(entry) and 3 * len(entry.attestations) >= len(entry.witnesses)
        counts = {slot: sum(slot in said for said in entry.attestations.values()) for slot in entry.eligible}
        entry.included = {slot for slot, count in counts.items() if count >= need}
        entry.final, entry.final_slot = True, self.slot
        for slot in entry.eligible - entry.included if len(entry.attestations) >= need else ():
            self._blame(self.members[slot], "excluded")
        for slot in entry.witnesses if late else ():
            if slot not in entry.attestations and slot in self.members and self.members[slot].status is ACTIVE:
                self._blame(self.members[slot], "excluded")
        for slot in entry.included:
            member, tokens = self.members[slot], entry.commitments[slot].tokens
            reward = tokens // 1_000_000 * self.reward_rate + tokens % 1_000_000 * self.reward_rate // 1_000_000
            member.excluded = 0
            member.updates_included += 1
            member.credit += tokens
            member.reward += reward
            self.tokens += tokens
            self.reward_earned += reward
            self.trained += entry.positions(slot)
        self._requeue(entry)
        kept = InclusionSet(entry.round, frozenset(entry.included), not entry.included)
        self.inclusion_sets[entry.round % INCLUSION_RING] = kept
        self.ever_included[entry.round] = kept.members

    def _requeue(self, entry: ModelRound) -> None:
        """What was assigned and is not included, in the order of the batch, neighbours in one piece."""
        pieces: list[list[int]] = []
        for offset, count in sorted(slice for slot, slice in entry.slices.items() if slot not in entry.included):
            if count and pieces and pieces[-1][1] == offset:
                pieces[-1][1] = offset + count
            elif count:
                pieces.append([offset, offset + count])
        for begin, end in pieces:
            base = 0
            for start, size in entry.ranges:
                low, high = max(begin, base), min(end, base + size)
                if low < high:
                    self._push(start + low - base, high - low)
                base += size

    def _push(self, start: int, count: int) -> None:
        if self.queue:
            last, length = self.queue[-1]
            if last + length == start and length + count <= self.limits.batch:
                self.queue[-1] = (last, length + count)
                return
        self.queue.append((start, count))

    def _adopt_config(self) -> None:
        if self.next_limits:
            self.limits, self.next_limits = self.next_limits, None
            self.config_version += 1
