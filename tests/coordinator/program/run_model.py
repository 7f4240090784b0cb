"""The model of a whole run: what round_model.py has, and the owner's instructions, grants, receipts and rewards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from model_parts import ModelGrant, ModelMember, ModelReceipt
from round_model import Result, RoundModel
from solders.pubkey import Pubkey

from coordinator.errors import ErrorCode as E
from coordinator.layout import MAX_BANNED, MAX_DELEGATES, MAX_MEMBERS, MAX_SHARE
from coordinator.state import Header, Member, Membership, Round, Run
from coordinator.values import InclusionSet, Limits, MemberStatus, Phase, Request, Terms

CLAIM_SLOTS = 6_480_000
MAX_RATE = 10**10


def limits_refused(limits: Limits) -> Result:
    """The first rule that these limits break."""
    rules = [
        (1 <= limits.min_members <= limits.init_min_members <= limits.max_members <= MAX_MEMBERS, E.BAD_MEMBER_LIMITS),
        (limits.witnesses <= min(32, limits.min_members), E.BAD_WITNESSES),
        (limits.overlap <= 1, E.BAD_OVERLAP),
        (1 <= limits.max_missed <= 255, E.BAD_MAX_MISSED),
        (
            all((limits.warmup_time, limits.max_round_train_time, limits.round_witness_time, limits.cooldown_time)),
            E.BAD_TIMES,
        ),
        (limits.adaptive_grace <= limits.max_round_train_time, E.BAD_TIMES),
        (limits.min_members <= limits.batch <= 2**24, E.BAD_BATCH),
        (limits.rounds_per_epoch >= 1 and 1 <= limits.total_rounds < 2**31, E.BAD_ROUNDS),
        (limits.max_share <= MAX_SHARE, E.BAD_SHARE),
    ]
    return next((error for holds, error in rules if not holds), None)


def terms_refused(terms: Terms) -> Result:
    """The first rule of the ramp that these terms break; the others are not played with."""
    ramp_fits = 1 <= terms.ramp_batch <= 2**24 if terms.ramp_rounds else terms.ramp_batch == 0
    return None if ramp_fits else E.BAD_RAMP


class RunModel(RoundModel):
    """`by` is who signs an instruction that not everybody may send."""

    # ------------------------------------------------------------------ the owner's hand

    def _owned(self, by: Pubkey) -> Result:
        if by != self.owner:
            return E.NOT_OWNER
        return E.RUN_FINISHED if self.phase is Phase.FINISHED else None

    def set_config(self, by: Pubkey, limits: Limits, authority: Pubkey | None) -> Result:
        if refused := self._owned(by) or limits_refused(limits):
            return refused
        self.join_authority, self.next_limits = authority, limits
        if self.phase not in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS):
            self._adopt_config()
        self.publish()
        return None

    def set_model(self, by: Pubkey, terms: Terms) -> Result:
        if refused := self._owned(by):
            return refused
        if self.phase not in (Phase.WAITING_FOR_MEMBERS, Phase.PAUSED):
            return E.WRONG_PHASE
        if refused := terms_refused(terms):
            return refused
        old = self.terms
        data = (terms.data_manifest, terms.samples, terms.sequence_length)
        if data != (old.data_manifest, old.samples, old.sequence_length):
            self.cursor, self.queue, self.trained = 0, [], []
        self.checkpoint_root, self.checkpoint_round = terms.model_root, self.round
        for member in self.members.values():
            member.ready = False
        self.terms, self.model_round = terms, self.round
        self.schedule_rounds = max(self.limits.total_rounds - self.round, 1)
        self.config_version += 1
        if self.phase is Phase.PAUSED:
            self.resume_phase = Phase.WAITING_FOR_MEMBERS
        self.publish()
        return None

    def pause(self, by: Pubkey) -> Result:
        if refused := self._owned(by):
            return refused
        if self.phase is Phase.PAUSED or self.request is not Request.NONE:
            return E.ALREADY_REQUESTED
        self.request = Request.PAUSE
        self.publish()
        return None

    def resume(self, by: Pubkey) -> Result:
        if refused := self._owned(by):
            return refused
        if self.request is Request.FINISH:
            return E.ALREADY_REQUESTED
        if self.phase is not Phase.PAUSED and self.request is not Request.PAUSE:
            return E.NOT_PAUSED
        self.request = Request.NONE
        if self.phase is Phase.PAUSED:
            self.restart_clocks()
            self._go_on(self.resume_phase)
        self.publish()
        return None

    def finish(self, by: Pubkey) -> Result:
        if refused := self._owned(by):
            return refused
        if self.request is Request.FINISH:
            return E.ALREADY_REQUESTED
        self.request = Request.FINISH
        self.publish()
        return None

    def close_run(self, by: Pubkey) -> Result:
        if by != self.owner:
            return E.NOT_OWNER
        if self.phase is not Phase.FINISHED or self.slot == self.created_slot:
            return E.NOT_FINISHED  # records tell runs of one name apart by the slot of their creation
        if self.reward_paid < self.reward_earned and self.slot < self.phase_slot + CLAIM_SLOTS:
            return E.REWARDS_OWED
        self.closed = True
        self.stale |= {address: grant.authority for address, grant in self.grants.items()}
        self.stale |= {address: receipt.payer for address, receipt in self.receipts.items()}
        self.grants, self.receipts = {}, {}
        return None

    def _can_eject(self, slot: int) -> bool:
        """Who is gone already, too, as long as its work may still count."""
        member = self.members[slot]
        return member.live or (member.status is not MemberStatus.EJECTED and self.in_flight(slot))

    def _eject(self, slot: int) -> None:
        self.members[slot].become(MemberStatus.EJECTED, self.slot)
        for entry in self.ring.values():
            entry.eligible.discard(slot)
            if not entry.closed and slot in entry.expected:
                entry.expected.discard(slot)
                if slot in entry.commitments:
                    self.committed = len(entry.counting())

    def kick(self, by: Pubkey, wallet: Pubkey) -> Result:
        refused, slot = self._owned(by), self.find(wallet)
        if refused:
            return refused
        if slot is None:
            return E.NOT_A_MEMBER
        if not self._can_eject(slot):
            return E.MEMBER_NOT_ACTIVE
        self._eject(slot)
        self.publish()
        return None

    def ban(self, by: Pubkey, key: Pubkey, lift: bool) -> Result:
        if refused := self._owned(by):
            return refused
        if key == Pubkey.default():
            return E.BAD_KEY
        if lift:
            if key not in self.banned:
                return E.NOT_BANNED
            last = self.banned.pop()
            if last != key:
                self.banned[self.banned.index(key)] = last
            return None
        if key in self.banned:
            return E.ALREADY_BANNED
        if len(self.banned) == MAX_BANNED:
            return E.BAN_LIST_FULL
        self.banned.append(key)
        grants = {
            a for a, grant in self.grants.items() if (grant.authority, grant.grantee) == (self.join_authority, key)
        }
        for slot, member in self.members.items():
            named = bytes(key) in (bytes(member.wallet), member.node_key) or member.grant in grants
            if named and self._can_eject(slot):
                self._eject(slot)
        self.publish()
        return None

    def set_reward_rate(self, by: Pubkey, rate: int) -> Result:
        if refused := self._owned(by):
            return refused
        if rate > MAX_RATE:
            return E.BAD_REWARD_RATE
        self.reward_rate = rate
        self.publish()
        return None

    # ------------------------------------------------------------------ grants

    def authorize(self, by: Pubkey, grantee: Pubkey | None, address: Pubkey) -> Result:
        if self.phase is Phase.FINISHED:
            return E.RUN_FINISHED
        if by != self.join_authority:
            return E.NOT_AUTHORITY
        self.grants[address] = ModelGrant(by, grantee)
        return None

    def revoke(self, by: Pubkey, address: Pubkey, eject: bool) -> Result:
        grant = self.grants.get(address)
        if grant is None:
            return self.missing(address)
        ejects = eject and self.phase is not Phase.FINISHED
        if grant.authority != by or (ejects and self.join_authority != by):
            return E.NOT_AUTHORITY
        for slot, member in self.members.items():
            if ejects and member.grant == address and self._can_eject(slot):
                self._eject(slot)
        del self.grants[address]
        self.publish()
        return None

    def delegate(self, by: Pubkey, address: Pubkey, key: Pubkey, remove: bool) -> Result:
        grant = self.grants.get(address)
        if grant is None:
            return self.missing(address)
        if grant.grantee != by:
            return E.NOT_THE_GRANTEE
        if key == Pubkey.default():
            return E.BAD_KEY
        if remove:
            if key not in grant.delegates:
                return E.NOT_A_DELEGATE
            last = grant.delegates.pop()
            if last != key:
                grant.delegates[grant.delegates.index(key)] = last
            return None
        if key in grant.delegates:
            return E.ALREADY_A_DELEGATE
        if len(grant.delegates) == MAX_DELEGATES:
            return E.DELEGATES_FULL
        grant.delegates.append(key)
        return None

    # ------------------------------------------------------------------ credit

    def archive(self, slot: int, address: Pubkey, payer: Pubkey) -> Result:
        if self.phase is Phase.FINISHED:
            return E.RUN_FINISHED
        member = self.members.get(slot)
        if self.in_flight(slot) or (member and member.live):
            return E.SLOT_IN_USE
        if member is None or not (member.credit or member.reward):
            return E.NOTHING_TO_ARCHIVE
        kept = (member.credit, member.updates_included, member.reward, member.reward_claimed)
        self.receipts[address] = ModelReceipt(member.wallet, payer, *kept)
        del self.members[slot]
        return None

    def restore(self, wallet: Pubkey, address: Pubkey) -> Result:
        receipt = self.receipts.get(address)
        if receipt is None:
            return self.missing(address)
        if receipt.wallet != wallet:
            return E.WRONG_RECEIPT
        slot = self.find(wallet)
        if slot is None:
            return E.NOT_A_MEMBER
        member = self.members[slot]
        member.credit += receipt.credit
        member.updates_included += receipt.updates_included
        member.reward += receipt.reward
        member.reward_claimed += receipt.reward_claimed
        del self.receipts[address]
        return None

    def claim(self, wallet: Pubkey, address: Pubkey | None) -> Result:
        holder: ModelReceipt | ModelMember
        if address is not None:
            receipt = self.receipts.get(address)
            if receipt is None:
                return self.missing(address)
            if receipt.wallet != wallet:
                return E.WRONG_RECEIPT
            holder = receipt
        else:
            slot = self.find(wallet)
            if slot is None:
                return E.NOT_A_MEMBER
            holder = self.members[slot]
        owed = holder.reward - holder.reward_claimed
        if not owed:
            return E.NOTHING_TO_CLAIM
        if not self.vault:
            return E.REWARDS_UNFUNDED
        paid = min(owed, self.vault)
        holder.reward_claimed += paid
        self.reward_paid += paid
        self.revision += 1
        self.vault -= paid
        return None

    def reclaim(self, by: Pubkey, address: Pubkey) -> Result:
        if address in self.grants or address in self.receipts:
            return E.NOT_CLOSED
        if address not in self.stale:
            return E.WRONG_ACCOUNT_OWNER
        if self.stale[address] != by:
            return E.NOT_OWNER
        del self.stale[address]
        return None

    def migrate(self) -> Result:
        return E.WRONG_ACCOUNT_VERSION

    # ------------------------------------------------------------------ against the accounts

    @property
    def inclusion(self) -> tuple[InclusionSet, ...]:
        return tuple(sorted(self.inclusion_sets.values(), key=lambda kept: kept.round))

    def run_differences(self, run: Run) -> Iterator[str]:
        for name in RUN_FIELDS:
            yield from _differ(f"run.{name}", getattr(run, name), getattr(self, name))

    def header_differences(self, header: Header) -> Iterator[str]:
        expected = {
            "phase": self.phase,
            "due_slot": 2**64 - 1 if self.due_slot is None else self.due_slot,
            "round": self.round,
            "members": sum(member.live for member in self.members.values()),
            "active": sum(member.status is MemberStatus.ACTIVE for member in self.members.values()),
            "ready": self.ready_count,
            "committed": self.committed,
            "attested": self.attested,
            "draining": self.draining,
            "requeued": sum(count for _, count in self.queue),
            "requeue_ranges": len(self.queue),
            "checkpoint_votes": len(self.votes),
            "checkpoint_agreed": self.checkpoint_agreed is not None,
        }
        for name in (known.name for known in fields(Header)):
            yield from _differ(f"header.{name}", getattr(header, name), expected[name])

    def round_differences(self, rounds: tuple[Round, ...]) -> Iterator[str]:
        entries = sorted(self.ring.values(), key=lambda entry: entry.round)
        yield from _differ("rounds", [entry.round for entry in rounds], [entry.round for entry in entries])
        for found, entry in zip(rounds, entries, strict=False):
            for name in ROUND_FIELDS:
                yield from _differ(f"round {entry.round}.{name}", getattr(found, name), getattr(entry, name))

    def member_differences(self, members: tuple[Member, ...], others: Membership) -> Iterator[str]:
        yield from _differ("member slots", [member.slot for member in members], sorted(self.members))
        for found in members:
            model = self.members.get(found.slot)
            for name in MEMBER_FIELDS if model else ():
                yield from _differ(f"member {found.slot}.{name}", getattr(found, name), getattr(model, name))
        yield from _differ("banned", list(others.banned), self.banned)
        credit = sum(receipt.credit for receipt in self.receipts.values())
        yield from _differ("archived_credit", others.archived_credit, credit)
        yield from _differ("archived_members", others.archived_members, len(self.receipts))


NOT_MODELLED = {"version", "run_id", "members_address", "rounds_address"}
RUN_FIELDS = [known.name for known in fields(Run) if known.name not in NOT_MODELLED]
MEMBER_FIELDS = [known.name for known in fields(Member) if known.name != "slot"]
ROUND_FIELDS = [known.name for known in fields(Round)]


def _differ(name: str, found: Any, expected: Any) -> Iterator[str]:
    if found != expected:
        yield f"{name} is {found} on chain, {expected} in the model"
