"""One schedule of a run, action by action, on the chain and in the model, compared after every one of them.

An action is a name and a few numbers, so that a schedule can be printed, cut down and played again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from program_harness import SYSTEM, TERMS, Chain, Outcome, RunDriver, digest_of
from run_model import RunModel
from solders.account import Account
from solders.instruction import Instruction
from solders.pubkey import Pubkey

from coordinator import instructions as ix
from coordinator.addresses import grant_address, receipt_seed
from coordinator.errors import ErrorCode
from coordinator.layout import GRANT_SIZE, MEMBERS_SIZE, RECEIPT_SIZE, ROUNDS_SIZE, RUN_SIZE
from coordinator.state import (
    Phase,
    Request,
    decode_header,
    decode_members,
    decode_membership,
    decode_rounds,
    decode_run,
)

Action = tuple[Any, ...]
PEOPLE = 9
OWNER, AUTHORITY, PAYER = -1, -2, -3  # who signs, besides wallets by their number
ANYONE = -1  # a grantee
START = 1000
TAKEN = 0  # the system program's error for an address in use
NOTHING = Account(0, b"", SYSTEM)
DECODERS: tuple[Callable[[bytes], Any], ...] = (
    decode_run,
    lambda data: (decode_members(data), decode_membership(data)),
    lambda data: (decode_header(data), decode_rounds(data)),
)


class Mismatch(AssertionError):
    """Program and model differ, or an invariant does not hold."""


class Play:
    """A fresh run on the chain (always the same addresses and slots) beside its model."""

    wallets = tuple(RunDriver.wallet(number) for number in range(PEOPLE))
    nodes = tuple(RunDriver.node(number) for number in range(PEOPLE))

    def __init__(self, chain: Chain, limits: dict[str, int], private: bool, ramp: tuple[int, int] = (0, 0)) -> None:
        self.chain, self.svm = chain, chain.svm
        self.authority = RunDriver.wallet(1000)
        authority = self.authority if private else None
        terms = replace(TERMS, ramp_batch=ramp[0], ramp_rounds=ramp[1])
        self.run = RunDriver(chain, "schedule", terms, authority, **limits)
        self.place = (self.run.addresses, chain.program)
        self.accounts = (self.run.addresses.run, self.run.addresses.members, self.run.addresses.rounds)
        for address in [*self.accounts, *chain.__dict__.setdefault("records", set())]:
            self.svm.set_account(address, NOTHING)
        for person in [self.run.owner, self.authority, *map(RunDriver.wallet, range(PEOPLE))]:
            self.svm.set_account(person, Account(10**10, b"", SYSTEM))
        chain.set_slot(START)
        self.run.must(self.run.create())
        self.rent = self.svm.minimum_balance_for_rent_exemption
        self.receipts: list[Pubkey] = []
        self._begin()
        self.before: list[Account | None] = [None, None, None]
        self.decoded: list[Any] = [None, None, None]
        self._compare([self.svm.get_account(address) for address in self.accounts])

    def _begin(self) -> None:
        self.model = RunModel(
            self.run.addresses,
            self.run.owner,
            self.run.limits,
            self.run.terms,
            self.run.join_authority,
            self.chain.slot,
            self._newest(),
        )
        self.final_sets: dict[int, frozenset[int]] = {}
        self.final_tokens = 0

    def _newest(self) -> bytes:
        return digest_of("slot", self.chain.slot - 1)

    def _set_slot(self, slot: int) -> None:
        self.chain.set_slot(slot)
        self.model.slot, self.model.newest = slot, self._newest()

    def signer(self, who: int) -> Pubkey:
        return {OWNER: self.run.owner, AUTHORITY: self.authority, PAYER: self.chain.payer.pubkey()}.get(
            who
        ) or RunDriver.wallet(who)

    def grant(self, grantee: int, by: int = AUTHORITY) -> Pubkey:
        key = Pubkey.default() if grantee == ANYONE else RunDriver.wallet(grantee)
        return grant_address(self.chain.program, self.signer(by), self.run.addresses.run, key)

    def receipt(self, index: int) -> Pubkey:
        return self.receipts[index % len(self.receipts)] if self.receipts else Pubkey(b"\x3c" * 32)

    # ------------------------------------------------------------------ one action

    def do(self, action: Action) -> ErrorCode | int | None:
        """Perform it on both sides. Returns how it ended. Raises Mismatch, or ProgramFault."""
        name, *rest = action
        if name == "wait":
            self._set_slot(self.chain.slot + rest[0])
            return None
        if name == "until":  # the slot of the next tick, or one close to it
            if self.model.due_slot is not None:
                self._set_slot(max(self.chain.slot, self.model.due_slot + rest[0]))
            return None
        if self.model.closed and name not in ("create", "reclaim"):
            name, rest = "tick", [0]
        if name == "fund":
            self.svm.airdrop(self.run.addresses.run, rest[0])
            self.model.vault += rest[0]
            self.before[0] = self.svm.get_account(self.accounts[0])
            return None
        instructions, expected, paid = getattr(self, f"_{name}")(*rest)
        balances = {key: self.svm.get_balance(key) or 0 for key in paid}
        outcome = self.chain.send(instructions)
        self._check(outcome, expected)
        for key, lamports in paid.items() if outcome.ok else ():
            got = (self.svm.get_balance(key) or 0) - balances[key]
            if got != lamports:
                raise Mismatch(f"{key} got {got} lamports, {lamports} in the model")
        return expected

    def _check(self, outcome: Outcome, expected: ErrorCode | int | None) -> None:
        if outcome.other is not None or outcome.code != expected:
            found = "success" if outcome.ok else outcome.other or outcome.code
            found = next((error.name for error in ErrorCode if error == found), found)
            meant = "success" if expected is None else getattr(expected, "name", expected)
            raise Mismatch(f"ended with {found} on chain, {meant} in the model")
        after = [self.svm.get_account(address) for address in self.accounts]
        after = [account if account and account.lamports else None for account in after]
        if expected is not None:
            if after != self.before:
                raise Mismatch("a refused instruction changed an account")
            return
        if self.model.closed:
            self.before = after
            if any(after):
                raise Mismatch("a closed run has accounts")
            return
        self._compare(after)

    def _compare(self, after: list[Account | None]) -> None:
        for place, decode in enumerate(DECODERS):  # only what has changed: decoding is what takes the time
            account = after[place]
            if account is not None and account != self.before[place]:
                self.decoded[place] = decode(bytes(account.data))
        self.before = after
        run, (members, others), (header, rounds) = self.decoded
        model = self.model
        found = [
            *model.run_differences(run),
            *model.header_differences(header),
            *model.round_differences(rounds),
            *model.member_differences(members, others),
        ]
        vault = (self.before[0].lamports if self.before[0] else 0) - self.rent(RUN_SIZE)
        if vault != model.vault:
            found.append(f"the run holds {vault} lamports above its rent, {model.vault} in the model")
        if found:
            raise Mismatch("; ".join(found))
        # what must hold whatever the model says
        if sum(member.credit for member in members) + others.archived_credit != run.tokens:
            raise Mismatch("the members' credit is not the run's tokens")
        for entry in rounds:
            if not entry.final or entry.round in self.final_sets:
                continue
            self.final_sets[entry.round] = entry.included
            self.final_tokens += sum(entry.commitments[slot].tokens for slot in entry.included)
            banned = {bytes(key) for key in others.banned}
            counted = [member for member in members if member.slot in entry.included]
            if any(bytes(member.wallet) in banned or member.node_key in banned for member in counted):
                raise Mismatch(f"round {entry.round}: a banned key counts")
            if entry.included - entry.commitments.keys() or entry.attestations.keys() - set(entry.witnesses):
                raise Mismatch(f"round {entry.round}: who has not committed is in, or who is no witness attested")
        for entry in rounds:
            if entry.final and entry.included != self.final_sets[entry.round]:
                raise Mismatch(f"round {entry.round}: a final inclusion set changed")
        for kept in run.inclusion:
            if kept.members != self.final_sets[kept.round]:
                raise Mismatch(f"round {kept.round}: a final inclusion set changed")
        if run.tokens != self.final_tokens:
            raise Mismatch("the run's tokens are not those of its inclusion sets")
        self._positions()

    def _positions(self) -> None:
        """Every position below the cursor is in exactly one place."""
        model = self.model
        places = list(model.trained)
        for start, count in [*model.queue, *(part for entry in model.open_rounds() for part in entry.ranges)]:
            places += range(start, start + count)
        if len(places) != model.cursor or len(set(places)) != model.cursor:
            raise Mismatch("a position is in two places, or in none")

    # ------------------------------------------------------------------ what each action means on both sides
    # Each returns the instructions, how they must end, and who gets how many lamports.

    def _join(self, who: int, node: int, share: int, grantee: int | None) -> Any:
        wallet, key = RunDriver.wallet(who), RunDriver.node(node)
        grant = None if grantee is None else self.grant(grantee)
        return ix.join(*self.place, wallet, key, share, grant), self.model.join(wallet, key, share, grant), {}

    def _ready(self, who: int, root: int) -> Any:
        wallet, chosen = RunDriver.wallet(who), bytes([root]) * 32
        return ix.ready(*self.place, wallet, chosen), self.model.ready(wallet, chosen), {}

    def _set_share(self, who: int, share: int) -> Any:
        wallet = RunDriver.wallet(who)
        return ix.set_share(*self.place, wallet, share), self.model.set_share(wallet, share), {}

    def _leave(self, who: int) -> Any:
        return ix.leave(*self.place, RunDriver.wallet(who)), self.model.leave(RunDriver.wallet(who)), {}

    def _commit(self, who: int, number: int, tokens: int, fingerprint: int, size: int) -> Any:
        arguments = (RunDriver.wallet(who), number, digest_of("update", number, who), size, tokens, fingerprint)
        return ix.commit(*self.place, *arguments), self.model.commit(*arguments), {}

    def _attest(self, who: int, number: int, named: Sequence[int]) -> Any:
        wallet = RunDriver.wallet(who)
        return (
            ix.attest(*self.place, wallet, number, named),
            self.model.attest(wallet, number, frozenset(named)),
            {},
        )

    def _checkpoint(self, who: int, number: int, root: int) -> Any:
        arguments = (RunDriver.wallet(who), number, bytes([root]) * 32)
        return ix.checkpoint(*self.place, *arguments), self.model.checkpoint(*arguments), {}

    def _tick(self, who: int) -> Any:
        expected = ErrorCode.WRONG_ACCOUNT_OWNER if self.model.closed else self.model.tick()
        return ix.tick(*self.place, self.signer(who)), expected, {}

    def _create(self) -> Any:
        """The same name again: possible once the run before is closed."""
        expected, stale = (None if self.model.closed else TAKEN), self.model.stale
        if expected is None:
            self._begin()
            self.model.stale = stale
        run, payer = self.run, self.chain.payer.pubkey()
        instructions = ix.create_run_instructions(
            self.chain.program, run.owner, run.run_id, run.limits, run.terms, self.rent, payer, run.join_authority
        )
        return instructions, expected, {}

    def _reclaim(self, by: int, kind: int, number: int) -> Any:
        address = self.grant(number) if kind else self.receipt(number)
        instruction = ix.reclaim(self.run.addresses.run, self.chain.program, self.signer(by), address)
        heirs = {} if by == PAYER else {self.signer(by): self.rent(GRANT_SIZE if kind else RECEIPT_SIZE)}
        return instruction, self.model.reclaim(self.signer(by), address), heirs

    def _plain(self, name: str, by: int) -> Any:
        build: Callable[..., Instruction] = getattr(ix, name)
        return build(*self.place, self.signer(by)), getattr(self.model, name)(self.signer(by)), {}

    def _pause(self, by: int) -> Any:
        return self._plain("pause", by)

    def _resume(self, by: int) -> Any:
        return self._plain("resume", by)

    def _finish(self, by: int) -> Any:
        return self._plain("finish", by)

    def _close_run(self, by: int) -> Any:
        instruction, expected, _ = self._plain("close_run", by)
        sizes = (RUN_SIZE, MEMBERS_SIZE, ROUNDS_SIZE)
        return instruction, expected, {self.run.owner: sum(map(self.rent, sizes)) + self.model.vault}

    def _migrate(self, by: int) -> Any:
        return ix.migrate(*self.place, self.signer(by)), self.model.migrate(), {}

    def _set_config(self, by: int, changes: Sequence[tuple[str, int]], private: bool) -> Any:
        limits = replace(self.model.limits, **dict(changes))
        authority = self.authority if private else None
        instruction = ix.set_config(*self.place, self.signer(by), limits, authority)
        return instruction, self.model.set_config(self.signer(by), limits, authority), {}

    def _set_model(self, by: int, changes: Sequence[tuple[str, Any]]) -> Any:
        changed = {name: bytes([value]) * 32 if name == "model_root" else value for name, value in changes}
        terms = replace(self.model.terms, **changed)
        instruction = ix.set_model(*self.place, self.signer(by), terms)
        return instruction, self.model.set_model(self.signer(by), terms), {}

    def _kick(self, by: int, who: int) -> Any:
        wallet = RunDriver.wallet(who)
        return ix.kick(*self.place, self.signer(by), wallet), self.model.kick(self.signer(by), wallet), {}

    def _ban(self, by: int, kind: int, who: int, lift: bool) -> Any:
        key = (RunDriver.wallet(who), RunDriver.node(who), Pubkey.default())[kind]
        instruction = ix.ban(*self.place, self.signer(by), key, lift=lift)
        return instruction, self.model.ban(self.signer(by), key, lift), {}

    def _set_reward_rate(self, by: int, rate: int) -> Any:
        signer = self.signer(by)
        return ix.set_reward_rate(*self.place, signer, rate), self.model.set_reward_rate(signer, rate), {}

    def _authorize(self, by: int, grantee: int) -> Any:
        key, address = None if grantee == ANYONE else RunDriver.wallet(grantee), self.grant(grantee, by)
        self.chain.__dict__["records"].add(address)
        taken = address in self.model.grants or address in self.model.stale
        expected = TAKEN if taken else self.model.authorize(self.signer(by), key, address)
        instructions = ix.authorize(*self.place, self.signer(by), key, self.rent)
        return instructions, expected, {self.signer(by): -self.rent(GRANT_SIZE)}

    def _revoke(self, by: int, grantee: int, eject: bool) -> Any:
        address, signer = self.grant(grantee), self.signer(by)
        instruction = ix.revoke(*self.place, signer, address, eject=eject)
        return instruction, self.model.revoke(signer, address, eject), {signer: self.rent(GRANT_SIZE)}

    def _delegate(self, by: int, grantee: int, who: int, remove: bool) -> Any:
        address, signer, key = self.grant(grantee), self.signer(by), RunDriver.wallet(who)
        instruction = ix.delegate(*self.place, signer, address, key, remove=remove)
        return instruction, self.model.delegate(signer, address, key, remove), {}

    def _archive(self, slot: int) -> Any:
        member, payer = self.model.members.get(slot), self.chain.payer.pubkey()
        wallet = member.wallet if member else Pubkey.default()
        seed = receipt_seed(self.run.addresses.run, wallet, self.chain.slot)
        address = Pubkey.create_with_seed(payer, seed, self.chain.program)
        taken = address in self.model.receipts or address in self.model.stale
        expected = TAKEN if taken else self.model.archive(slot, address, payer)
        if expected is None:
            self.receipts.append(address)
            self.chain.__dict__["records"].add(address)
        return ix.archive(*self.place, payer, slot, wallet, self.chain.slot, self.rent), expected, {}

    def _restore(self, who: int, index: int) -> Any:
        wallet, address = RunDriver.wallet(who), self.receipt(index)
        known = self.model.receipts.get(address)
        payer = known.payer if known else wallet
        expected = self.model.restore(wallet, address)
        # the payer of receipts pays the fees of these tests, too: its lamports are looked at elsewhere
        return ix.restore(*self.place, wallet, address, payer), expected, {}

    def _claim(self, who: int, index: int | None) -> Any:
        wallet, address = RunDriver.wallet(who), None if index is None else self.receipt(index)
        paid = self.model.reward_paid
        expected = self.model.claim(wallet, address)
        return ix.claim(*self.place, wallet, address), expected, {wallet: self.model.reward_paid - paid}

    # ------------------------------------------------------------------ the end

    def _enliven(self) -> None:
        """No tick is in sight: what the owner and those who would take part may do brings one into sight."""
        model = self.model
        if model.phase is Phase.PAUSED:
            self._must("resume", OWNER)
        for who in range(PEOPLE):
            if model.due_slot is not None:
                return
            for kind, key in enumerate((self.wallets[who], self.nodes[who])):
                if key in model.banned:
                    self._must("ban", OWNER, kind, who, True)
            grant = self.grant(ANYONE)
            if grant in model.stale:
                self._must("reclaim", AUTHORITY, 1, ANYONE)
            if model.join_authority and grant not in model.grants:
                self._must("authorize", AUTHORITY, ANYONE)
            slot = model.find(self.wallets[who])
            if slot is None or not model.members[slot].live:
                self.do(("join", who, who, 1, ANYONE))  # its node key may be another's by now
        if model.due_slot is None:
            raise Mismatch("no tick is in sight, and nobody can bring one about")

    def _must(self, *action: Any) -> None:
        ended = self.do(action)
        if ended is not None:
            raise Mismatch(f"{action} ended with {ended!r} where the run needs it")

    def wind_up(self) -> None:
        """A tick succeeds as soon as it is due, wherever a schedule leads; legal actions make it due, and in the end
        the owner's word ends the run."""
        if self.model.closed:
            self._must("create")
        for _ in range(3):
            if self.model.phase is Phase.FINISHED:
                return
            if self.model.due_slot is None:
                self._enliven()
            self._tick_when_due()
        if self.model.phase is not Phase.FINISHED and self.model.request is not Request.FINISH:
            self._must("finish", OWNER)
        for _ in range(12):
            if self.model.phase is Phase.FINISHED:
                return
            self._tick_when_due()
        raise Mismatch("ticks do not bring the run to its end")

    def _tick_when_due(self) -> None:
        due = self.model.due_slot
        if due is None:
            raise Mismatch("no tick is in sight")
        if due > self.chain.slot:
            self.do(("until", -1))
            if self.do(("tick", 0)) is not ErrorCode.NOT_DUE:
                raise Mismatch("a tick came early")
        self.do(("until", 0))
        self._must("tick", 0)
