"""A run on LiteSVM, driven instruction by instruction; deployed through the upgradeable loader, mostly unsigned."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from solders.account import Account
from solders.hash import Hash
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.litesvm import FeatureSet, LiteSVM
from solders.message import Message
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.system_program import CreateAccountParams, create_account
from solders.transaction import Transaction
from solders.transaction_metadata import FailedTransactionMetadata, TransactionMetadata

from coordinator import instructions as ix
from coordinator.addresses import RunAddresses, grant_address, run_addresses
from coordinator.errors import ErrorCode
from coordinator.state import (
    Header,
    Limits,
    Member,
    Membership,
    Phase,
    Round,
    Run,
    Terms,
    decode_header,
    decode_members,
    decode_membership,
    decode_rounds,
    decode_run,
)
from coordinator.toolchain.build import PROGRAM, build

LOADER = Pubkey.from_string("BPFLoaderUpgradeab1e11111111111111111111111")
RENT = Pubkey.from_string("SysvarRent111111111111111111111111111111111")
CLOCK = Pubkey.from_string("SysvarC1ock11111111111111111111111111111111")
SYSTEM = Pubkey.from_string("11111111111111111111111111111111")
WRITE_CHUNK = 900

LIMITS = Limits(
    init_min_members=4,
    min_members=3,
    max_members=256,
    witnesses=0,
    overlap=1,
    max_missed=2,
    join_grace=5,
    warmup_time=100,
    max_round_train_time=1000,
    round_witness_time=50,
    cooldown_time=80,
    adaptive_grace=4,
    batch=64,
    rounds_per_epoch=3,
    total_rounds=6,
)
TERMS = Terms(
    model_root=b"\x01" * 32,
    layout_digest=b"\x02" * 32,
    data_manifest=b"\x03" * 32,
    samples=100_000,
    sequence_length=128,
    update_bytes=5000,
    topk=32,
    lookahead=True,
    clip_votes=True,
    window=3,
    schedule=3,
    warmup_rounds=10,
    decay_rounds=20,
    decay_bits=0x3F7FBE77,
    peak_lr_bits=0x3A83126F,
    final_lr_bits=0,
    weight_decay_bits=0,
    clip_norm_bits=0x3F800000,
    model_source="org/model",
    data_source="org/data",
)


class ProgramFault(AssertionError):
    """The program ended in a way no instruction may end: a fault of the virtual machine instead of an error number."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a transaction came to: the program's error number (None: success), another error as text, compute units."""

    code: int | None
    other: str | None
    units: int
    logs: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.code is None and self.other is None


@cache
def program_bytes(arch: str) -> bytes:
    return PROGRAM.read_bytes() if arch == "v3" else build("v0")


def digest_of(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


class Chain:
    """A LiteSVM with the program deployed. Signatures are not verified unless asked for; signer flags are."""

    def __init__(
        self, arch: str = "v3", sigverify: bool = False, all_features: bool = False, program: bytes | None = None
    ) -> None:
        svm = LiteSVM()
        if all_features:  # what mainnet may become; the set must be chosen before the built-in programs
            svm = svm.with_feature_set(FeatureSet.all_enabled()).with_builtins()
        self.svm = svm.with_sigverify(sigverify).with_transaction_history(0)
        self.payer = Keypair.from_seed(b"\x07" * 32)
        self.svm.airdrop(self.payer.pubkey(), 10**13)
        self.sigverify = sigverify
        self.slot = 100
        self.set_slot(self.slot)
        self.program = deploy(self, program or program_bytes(arch))
        self.set_slot(self.slot + 1)

    def set_slot(self, slot: int) -> None:
        self.slot = slot
        self.svm.warp_to_slot(slot)
        hashes = [(slot - back, Hash(digest_of("slot", slot - back))) for back in range(1, 3)]
        self.svm.set_slot_hashes(hashes)

    def advance(self, slots: int = 1) -> None:
        self.set_slot(self.slot + slots)

    def send(self, instructions: Sequence[Instruction] | Instruction, signers: Sequence[Keypair] = ()) -> Outcome:
        chosen = [instructions] if isinstance(instructions, Instruction) else list(instructions)
        self.svm.expire_blockhash()
        message = Message.new_with_blockhash(chosen, self.payer.pubkey(), self.svm.latest_blockhash())
        if self.sigverify:
            transaction = Transaction([self.payer, *signers], message, self.svm.latest_blockhash())
        else:
            count = message.header.num_required_signatures
            marks = [Signature(digest_of(bytes(message), index) * 2) for index in range(count)]
            transaction = Transaction.populate(message, marks)
        assert len(bytes(transaction)) <= 1232, f"transaction of {len(bytes(transaction))} bytes"
        result = self.svm.send_transaction(transaction)
        if isinstance(result, TransactionMetadata):
            return Outcome(None, None, result.compute_units_consumed(), tuple(result.logs()))
        return self._failure(result)

    @staticmethod
    def _failure(result: FailedTransactionMetadata) -> Outcome:
        error: Any = result.err()
        inner: Any = getattr(error, "err", None)
        code = getattr(inner, "code", None)
        text = f"{error!r}"
        if "ProgramFailedToComplete" in text or "ProgramEnvironmentSetupFailure" in text:
            raise ProgramFault(f"{text}: {result.meta().logs()}")
        units = result.meta().compute_units_consumed()
        return Outcome(code, None if code is not None else text, units, tuple(result.meta().logs()))


def _loader(data: bytes, *metas: tuple[Pubkey, bool, bool]) -> Instruction:
    return Instruction(LOADER, data, [AccountMeta(address, signs, writes) for address, signs, writes in metas])


def _must(outcome: Outcome) -> None:
    assert outcome.ok, f"deploy failed: {outcome}"


def _fill_buffer(chain: Chain, program: bytes, key_seed: int) -> Pubkey:
    """A buffer account that holds the program, written at most 900 bytes at a time."""
    pair, payer = Keypair.from_seed(bytes([key_seed]) * 32), chain.payer.pubkey()
    buffer = pair.pubkey()
    space = 37 + len(program)
    rent = chain.svm.minimum_balance_for_rent_exemption(space)
    create = create_account(
        CreateAccountParams(from_pubkey=payer, to_pubkey=buffer, lamports=rent, space=space, owner=LOADER)
    )
    initialize = _loader(struct.pack("<I", 0), (buffer, False, True), (payer, False, False))
    _must(chain.send([create, initialize], [pair]))
    for at in range(0, len(program), WRITE_CHUNK):
        chunk = program[at : at + WRITE_CHUNK]
        data = struct.pack("<IIQ", 1, at, len(chunk)) + chunk
        _must(chain.send(_loader(data, (buffer, False, True), (payer, True, False))))
    return buffer


# An upgrade may be larger than what it replaces.
MAX_PROGRAM_BYTES = 100_000


def deploy(chain: Chain, program: bytes, key_seed: int = 9) -> Pubkey:
    """The loader's own path, with its strict verification: buffer, writes, deploy."""
    buffer = _fill_buffer(chain, program, key_seed + 100)
    pair, payer = Keypair.from_seed(bytes([key_seed]) * 32), chain.payer.pubkey()
    key = pair.pubkey()
    programdata, _ = Pubkey.find_program_address([bytes(key)], LOADER)
    deploy_now = _loader(
        struct.pack("<IQ", 2, max(len(program), MAX_PROGRAM_BYTES)),
        (payer, True, True),
        (programdata, False, True),
        (key, False, True),
        (buffer, False, True),
        (RENT, False, False),
        (CLOCK, False, False),
        (SYSTEM, False, False),
        (payer, True, False),
    )
    rent = chain.svm.minimum_balance_for_rent_exemption(36)
    create = create_account(
        CreateAccountParams(from_pubkey=payer, to_pubkey=key, lamports=rent, space=36, owner=LOADER)
    )
    _must(chain.send([create, deploy_now], [pair]))
    return key


def upgrade(chain: Chain, program: bytes) -> None:
    """Replace the deployed program; it is in force from the next slot."""
    buffer, payer = _fill_buffer(chain, program, 120), chain.payer.pubkey()
    programdata, _ = Pubkey.find_program_address([bytes(chain.program)], LOADER)
    replace_now = _loader(
        struct.pack("<I", 3),
        (programdata, False, True),
        (chain.program, False, True),
        (buffer, False, True),
        (payer, False, True),
        (RENT, False, False),
        (CLOCK, False, False),
        (payer, True, False),
    )
    _must(chain.send(replace_now))
    chain.advance()


class RunDriver:
    """One run on a chain, with short names for what its members do. Members are numbered as they are named, from 0."""

    def __init__(
        self,
        chain: Chain,
        run_id: str = "test-run",
        terms: Terms = TERMS,
        join_authority: Pubkey | None = None,
        **limits: int,
    ) -> None:
        self.chain = chain
        self.join_authority = join_authority
        self.limits = replace(LIMITS, **limits)
        self.terms = terms
        self.run_id = run_id
        self.owner = Keypair.from_seed(b"\x0a" * 32).pubkey()
        chain.svm.airdrop(self.owner, 10**11)
        self.addresses: RunAddresses = run_addresses(chain.program, self.owner, run_id)

    def create(self) -> Outcome:
        rent = self.chain.svm.minimum_balance_for_rent_exemption
        return self.chain.send(
            ix.create_run_instructions(
                self.chain.program,
                self.owner,
                self.run_id,
                self.limits,
                self.terms,
                rent,
                self.chain.payer.pubkey(),
                self.join_authority,
            )
        )

    # -- keys and accounts

    @staticmethod
    def wallet(member: int) -> Pubkey:
        return Pubkey(digest_of("wallet", member))

    @staticmethod
    def node(member: int) -> Pubkey:
        return Pubkey(digest_of("node", member))

    def data(self, address: Pubkey) -> bytes:
        account = self.chain.svm.get_account(address)
        assert account is not None
        return bytes(account.data)

    def patch(self, address: Pubkey, offset: int, new: bytes) -> None:
        """Overwrite bytes of an account from outside, to reach states that no instruction of this program reaches."""
        account = self.chain.svm.get_account(address)
        assert account is not None
        data = bytearray(account.data)
        data[offset : offset + len(new)] = new
        changed = Account(account.lamports, bytes(data), account.owner, account.executable, account.rent_epoch)
        self.chain.svm.set_account(address, changed)

    @property
    def run(self) -> Run:
        return decode_run(self.data(self.addresses.run))

    @property
    def header(self) -> Header:
        return decode_header(self.data(self.addresses.rounds))

    @property
    def members(self) -> dict[int, Member]:
        return {member.slot: member for member in decode_members(self.data(self.addresses.members))}

    @property
    def membership(self) -> Membership:
        return decode_membership(self.data(self.addresses.members))

    @property
    def rounds(self) -> dict[int, Round]:
        return {entry.round: entry for entry in decode_rounds(self.data(self.addresses.rounds))}

    def snapshot(self) -> tuple[bytes, bytes, bytes]:
        return self.data(self.addresses.run), self.data(self.addresses.members), self.data(self.addresses.rounds)

    # -- instructions

    def join(self, member: int, share: int = 1000, node: int | None = None, grant: Pubkey | None = None) -> Outcome:
        key = self.node(member if node is None else node)
        return self.chain.send(ix.join(self.addresses, self.chain.program, self.wallet(member), key, share, grant))

    def by_owner(self, build: Callable[..., Instruction], *arguments: Any, **options: Any) -> Outcome:
        """One of the owner's instructions, e.g. `by_owner(ix.kick, wallet)`."""
        return self.chain.send(build(self.addresses, self.chain.program, self.owner, *arguments, **options))

    def pause(self) -> Outcome:
        return self.by_owner(ix.pause)

    def resume(self) -> Outcome:
        return self.by_owner(ix.resume)

    def finish(self) -> Outcome:
        return self.by_owner(ix.finish)

    def kick(self, member: int) -> Outcome:
        return self.by_owner(ix.kick, self.wallet(member))

    def ban(self, key: Pubkey, *, lift: bool = False) -> Outcome:
        return self.by_owner(ix.ban, key, lift=lift)

    def set_config(self, **limits: int) -> Outcome:
        return self.by_owner(ix.set_config, replace(self.run.limits, **limits), self.run.join_authority)

    def set_share(self, member: int, share: int) -> Outcome:
        return self.chain.send(ix.set_share(self.addresses, self.chain.program, self.wallet(member), share))

    def grant(self, grantee: Pubkey | None, authority: Pubkey | None = None) -> Pubkey:
        """Where the grant lies."""
        chosen = authority or self.run.join_authority or self.owner
        return grant_address(self.chain.program, chosen, self.addresses.run, grantee or Pubkey.default())

    def authorize(self, grantee: Pubkey | None, authority: Pubkey | None = None) -> Outcome:
        chosen = authority or self.run.join_authority or self.owner
        rent = self.chain.svm.minimum_balance_for_rent_exemption
        return self.chain.send(ix.authorize(self.addresses, self.chain.program, chosen, grantee, rent))

    def archive(self, slot: int) -> tuple[Outcome, Pubkey]:
        """Also the receipt's address."""
        payer, rent = self.chain.payer.pubkey(), self.chain.svm.minimum_balance_for_rent_exemption
        member = self.members.get(slot)
        wallet = member.wallet if member else Pubkey.default()
        made = ix.archive(self.addresses, self.chain.program, payer, slot, wallet, self.chain.slot, rent)
        return self.chain.send(made), made[1].accounts[4].pubkey

    def restore(self, member: int, receipt: Pubkey) -> Outcome:
        payer = self.chain.payer.pubkey()
        return self.chain.send(ix.restore(self.addresses, self.chain.program, self.wallet(member), receipt, payer))

    def claim(self, member: int, receipt: Pubkey | None = None) -> Outcome:
        return self.chain.send(ix.claim(self.addresses, self.chain.program, self.wallet(member), receipt))

    def ready(self, member: int, root: bytes | None = None) -> Outcome:
        chosen = self.run.checkpoint_root if root is None else root
        return self.chain.send(ix.ready(self.addresses, self.chain.program, self.wallet(member), chosen))

    def commit(
        self,
        member: int,
        round: int | None = None,
        tokens: int = 100,
        fingerprint: int = 7,
        length: int | None = None,
    ) -> Outcome:
        number = self.header.round if round is None else round
        size = self.terms.update_bytes if length is None else length
        digest = digest_of("update", number, member)
        return self.chain.send(
            ix.commit(
                self.addresses, self.chain.program, self.wallet(member), number, digest, size, tokens, fingerprint
            )
        )

    def attest(self, member: int, round: int, members: Iterable[int]) -> Outcome:
        return self.chain.send(ix.attest(self.addresses, self.chain.program, self.wallet(member), round, members))

    def checkpoint(self, member: int, root: bytes, round: int | None = None) -> Outcome:
        number = self.run.final_rounds if round is None else round
        return self.chain.send(ix.checkpoint(self.addresses, self.chain.program, self.wallet(member), number, root))

    def leave(self, member: int) -> Outcome:
        return self.chain.send(ix.leave(self.addresses, self.chain.program, self.wallet(member)))

    def tick(self) -> Outcome:
        return self.chain.send(ix.tick(self.addresses, self.chain.program, self.chain.payer.pubkey()))

    # -- whole steps; each asserts that it succeeded

    def must(self, outcome: Outcome) -> Outcome:
        assert outcome.ok, f"{outcome.code and ErrorCode(outcome.code).name} {outcome.other} {outcome.logs}"
        return outcome

    def tick_when_due(self) -> Outcome:
        """Wait for the slot that the header promises; one slot earlier the tick must fail without a change."""
        due = self.header.due_slot
        if due > self.chain.slot:
            assert due < 2**63, "no tick is in sight"
            self.chain.set_slot(due - 1)
            before = self.snapshot()
            assert self.tick().code == ErrorCode.NOT_DUE
            assert self.snapshot() == before
            self.chain.set_slot(due)
        return self.must(self.tick())

    def start(self, members: int = 4, share: Sequence[int] = ()) -> None:
        """From nothing to RoundTrain 0 with this many members, in slots 0, 1, ..."""
        self.must(self.create())
        for member in range(members):
            self.must(self.join(member, share[member] if share else 1000))
        self.tick_when_due()
        for member in range(members):
            self.must(self.ready(member))
        self.tick_when_due()
        assert self.run.phase is Phase.ROUND_TRAIN

    def train(self, members: Iterable[int], fingerprints: dict[int, int] | None = None) -> int:
        """The members commit and the round closes when due. Returns the round's number."""
        number = self.header.round
        for member in members:
            if self.rounds[number].slices[member][1]:
                self.chain.advance()
                self.must(self.commit(member, fingerprint=(fingerprints or {}).get(member, 7)))
        self.tick_when_due()
        assert self.rounds[number].closed
        return number

    def attest_all(self, round: int, witnesses: Iterable[int], members: Iterable[int]) -> None:
        named = list(members)
        for witness in witnesses:
            if witness in self.rounds[round].witnesses:
                self.must(self.attest(witness, round, named))
