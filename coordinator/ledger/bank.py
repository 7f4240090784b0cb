"""The ledger's state: a Solana VM, a chain of slots, and everything a cluster enforces around them.

LiteSVM executes transactions; it has no blocks, one blockhash, no size limit and no notion of time. This module adds
slots with entry hashes and bank hashes (the SlotHashes sysvar), a window of valid blockhashes and refusal of
duplicates. `sanitize` adds what is checked of a transaction by itself, `history` what is remembered of it.

Every change of state is one of the values in `Change` and passes through `Bank.apply`, nowhere else: a log of changes
replayed into a new bank with the same genesis gives the same state.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from solders.account import Account
from solders.clock import Clock
from solders.compute_budget import set_compute_unit_limit
from solders.hash import Hash
from solders.keypair import Keypair
from solders.litesvm import LiteSVM
from solders.message import Message, MessageV0
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.system_program import TransferParams, transfer
from solders.sysvar import CLOCK, SLOT_HASHES
from solders.transaction import Transaction, VersionedTransaction
from solders.transaction_metadata import FailedTransactionMetadata, SimulatedTransactionInfo

from coordinator.ledger.encoding import Json, error_json
from coordinator.ledger.history import History
from coordinator.ledger.sanitize import Checked, Refused, accounts_of, sanitize
from coordinator.ledger.state import MAX_BLOCKHASH_AGE, Block, Capture, Chain, Record, State

MAX_SLOT_HASHES: Final = 512
SLOTS_PER_EPOCH: Final = 432_000
LAMPORTS_PER_SIGNATURE: Final = 5000
HISTORY_BLOCKS: Final = 8_192
FAUCET_LAMPORTS: Final = 500_000_000 * 10**9
SYSTEM_PROGRAM: Final = Pubkey.default()
_SYSVAR_OWNER: Final = Pubkey.from_string("Sysvar1111111111111111111111111111111111111")
_TIME_SYSVARS: Final = frozenset({CLOCK, SLOT_HASHES})
_SLOT_HASHES_BYTES: Final = 8 + 40 * MAX_SLOT_HASHES


@dataclass(frozen=True, slots=True)
class AdvanceSlot:
    """The current slot is frozen and `slot` (greater than it) begins. Slots in between were skipped."""

    slot: int
    unix_time: int


@dataclass(frozen=True, slots=True)
class Execute:
    """A checked transaction, as wire bytes, runs in the current slot."""

    transaction: bytes


Change = AdvanceSlot | Execute


class Bank:
    """One VM and its chain. Not thread-safe: all calls come from one event loop.

    Args:
        genesis: 32 secret bytes. They seed the hash chain (so that nobody outside can compute the hash of a slot
            before it ends) and the faucet's key. The same genesis and the same changes give the same state.
        unix_time: seconds since the epoch at slot 0.
    """

    def __init__(self, genesis: bytes, unix_time: int) -> None:
        self._secret = hashlib.sha256(b"psyche-ledger chain" + genesis).digest()
        self._faucet = Keypair.from_seed(hashlib.sha256(b"psyche-ledger faucet" + genesis).digest())
        self.genesis_hash = Hash(hashlib.sha256(b"psyche-ledger genesis" + genesis).digest())
        # Signatures, blockhashes and duplicates are checked here, so that the errors are a cluster's and nothing is
        # checked twice; LiteSVM's own history would be a second copy of ours.
        self._vm = LiteSVM().with_blockhash_check(False).with_sigverify(False).with_transaction_history(0)
        self._vm.set_account(self._faucet.pubkey(), Account(FAUCET_LAMPORTS, b"", SYSTEM_PROGRAM))
        self.slot = 0
        self.block_height = 0
        self.unix_time = unix_time
        self.transaction_count = 0
        self._entry = self._bank_hash = bytes(self.genesis_hash)
        self._mixin = b""
        self._slot_hashes: deque[bytes] = deque(maxlen=MAX_SLOT_HASHES)
        self.blocks: deque[Block] = deque(maxlen=HISTORY_BLOCKS)
        self._blockhashes: OrderedDict[bytes, int] = OrderedDict({self._entry: 0})
        self._seen: dict[bytes, set[bytes]] = {self._entry: set()}
        self.history = History()
        # Every account that a transaction may have changed: with what `LiteSVM()` starts with, the VM's whole state.
        self._accounts: dict[Pubkey, None] = {self._faucet.pubkey(): None}
        self._capture: Capture | None = None
        self._vm_slot = -1
        self._airdrops = 0
        self._faucet_key = self._faucet.pubkey()
        # Called after a change: first with the change itself, then with what it did.
        self.on_change: list[Callable[[Change], None]] = []
        self.on_record: list[Callable[[Record], None]] = []
        self.on_slot: list[Callable[[int, int], None]] = []

    # ------------------------------------------------------------------ the one way in

    def apply(self, change: Change) -> Record | None:
        """Carry out a change. Returns an executed transaction's record; None if it could not pay and left no trace."""
        if isinstance(change, AdvanceSlot):
            parent = self.slot
            self._advance(change.slot, change.unix_time)
            for changed in self.on_change:
                changed(change)
            for begun in self.on_slot:
                begun(parent, change.slot)
            return None
        parsed = VersionedTransaction.from_bytes(change.transaction)
        record = self._execute(change.transaction, parsed, keep_failure=True)
        if isinstance(record, FailedTransactionMetadata):
            return None
        self._tell(change, record)
        return record

    def apply_if_succeeds(self, checked: Checked) -> Record | FailedTransactionMetadata:
        """`apply` a transaction that succeeds; one that fails changes nothing and its failure is returned.

        The same as `simulate` and then `apply`, at the cost of one execution.
        """
        record = self._execute(checked.wire, checked.parsed, keep_failure=False)
        if not isinstance(record, FailedTransactionMetadata):
            self._tell(Execute(checked.wire), record)
        return record

    def _tell(self, change: Execute, record: Record) -> None:
        for changed in self.on_change:
            changed(change)
        for executed in self.on_record:
            executed(record)

    def _advance(self, slot: int, unix_time: int) -> None:
        if slot <= self.slot:
            raise ValueError(f"slot {slot} does not follow slot {self.slot}")
        parent, previous = self.slot, self._entry
        entry = hashlib.sha256(self._secret + self._entry + struct.pack("<Q", parent) + self._mixin).digest()
        self._bank_hash = hashlib.sha256(self._bank_hash + entry).digest()
        self._slot_hashes.appendleft(struct.pack("<Q", parent) + self._bank_hash)
        self._entry = entry
        self._mixin = b""
        self.blocks.append(Block(parent, self.parent, self.block_height, self.unix_time, entry, previous))
        self.slot = slot
        self.block_height += 1
        # The clock never runs backwards, as on a cluster.
        self.unix_time = max(self.unix_time, unix_time)
        self._blockhashes[entry] = self.block_height
        self._seen[entry] = set()
        while len(self._blockhashes) > MAX_BLOCKHASH_AGE + 1:
            oldest, _ = self._blockhashes.popitem(last=False)
            del self._seen[oldest]

    def _execute(
        self, wire: bytes, parsed: VersionedTransaction, *, keep_failure: bool
    ) -> Record | FailedTransactionMetadata:
        """Returns the failure of a transaction that left no trace: it could not pay, or failures are not kept."""
        self._sync()
        message = parsed.message
        if not isinstance(message, Message | MessageV0):
            raise ValueError("a change must be a transaction that passed `check`")
        keys, writable, loaded_from = accounts_of(message, self._vm.get_account)
        if self._capture is not None:
            self._capture.keep(writable)
        balance = self._vm.get_balance
        payer = None if keep_failure else self._vm.get_account(keys[0])
        before = tuple([balance(key) or 0 for key in keys])
        result = self._vm.send_transaction(parsed)
        after = tuple([balance(key) or 0 for key in keys])
        error: Json = None
        if isinstance(result, FailedTransactionMetadata):
            if after[0] == before[0]:
                return result
            if payer is not None:
                # All that a failed transaction changes is its payer's account: it paid the fee.
                self._vm.set_account(keys[0], payer)
                return result
            # A failed transaction changes its fee payer and nothing else.
            error, meta, writable = error_json(result.err()), result.meta(), keys[:1]
        else:
            meta = result
        record = Record(
            signature=parsed.signatures[0],
            slot=self.slot,
            unix_time=self.unix_time,
            transaction=wire,
            keys=keys,
            loaded_from=loaded_from,
            writable=writable,
            error=error,
            meta=meta,
            balances_before=before,
            balances_after=after,
        )
        self._enter(record, message)
        return record

    def _enter(self, record: Record, message: Message | MessageV0) -> None:
        """Make a transaction that was executed part of the chain and of what is remembered."""
        self.transaction_count += 1
        self._airdrops += record.keys[0] == self._faucet_key
        self._mixin = hashlib.sha256(self._mixin + bytes(record.signature)).digest()
        seen = self._seen.get(bytes(message.recent_blockhash))
        if seen is not None:
            seen.add(bytes(message.hash()))
        self._accounts.update(dict.fromkeys(record.writable))
        if 0 in record.balances_after:
            for key, left in zip(record.keys, record.balances_after, strict=True):
                if not left:
                    self._accounts.pop(key, None)
        self.history.add(record)
        self.history.forget(self.slot)

    def _sync(self) -> None:
        """Bring the VM's clock and slot hashes up to the current slot: only when something will look at them."""
        if self._vm_slot == self.slot:
            return
        self._vm_slot = self.slot
        epoch = self.slot // SLOTS_PER_EPOCH
        self._vm.set_clock(Clock(self.slot, self.unix_time, epoch, epoch + 1, self.unix_time))
        hashes = struct.pack("<Q", len(self._slot_hashes)) + b"".join(self._slot_hashes)
        account = Account(1, hashes.ljust(_SLOT_HASHES_BYTES, b"\0"), _SYSVAR_OWNER)
        self._vm.set_account(SLOT_HASHES, account)

    # ------------------------------------------------------------------ saving and restoring

    def capture(self) -> Capture:
        """The state as it is now, to be read while the bank goes on. One at a time: a new one ends the one before."""
        chain = Chain(
            genesis_hash=bytes(self.genesis_hash),
            slot=self.slot,
            block_height=self.block_height,
            unix_time=self.unix_time,
            transaction_count=self.transaction_count,
            airdrops=self._airdrops,
            entry=self._entry,
            bank_hash=self._bank_hash,
            mixin=self._mixin,
            slot_hashes=tuple(self._slot_hashes),
            blocks=tuple(self.blocks),
            blockhashes=tuple((h, height, self._seen[h].copy()) for h, height in self._blockhashes.items()),
        )
        self._capture = Capture(chain, self.history.all(), dict(self._accounts), self._vm.get_account)
        return self._capture

    def end_capture(self) -> None:
        self._capture = None

    def restore(self, state: State) -> None:
        """Become what `state` says. Only for a new bank with the same genesis."""
        if self.slot or self.transaction_count:
            raise ValueError("only a new bank can be restored")
        if state.genesis_hash != bytes(self.genesis_hash):
            raise ValueError("the state belongs to another genesis")
        self.slot, self.block_height, self.unix_time = state.slot, state.block_height, state.unix_time
        self.transaction_count, self._airdrops = state.transaction_count, state.airdrops
        self._entry, self._bank_hash, self._mixin = state.entry, state.bank_hash, state.mixin
        self._slot_hashes = deque(state.slot_hashes, maxlen=MAX_SLOT_HASHES)
        self._blockhashes = OrderedDict((blockhash, height) for blockhash, height, _ in state.blockhashes)
        self.blocks.extend(state.blocks)
        self._seen = {blockhash: set(seen) for blockhash, _, seen in state.blockhashes}
        self._sync()
        # A new bank's faucet is full; this one's may be empty, and an empty account is not in the state.
        self._vm.set_account(self._faucet_key, Account(0, b"", SYSTEM_PROGRAM))
        self._accounts.clear()
        executables = []
        for key, account in state.accounts:
            self._accounts[key] = None
            if account.executable:
                executables.append((key, account))
            else:
                self._vm.set_account(key, account)
        # A program is loaded from its program data when it is set: that has to be there before.
        for key, account in executables:
            self._vm.set_account(key, account)
        # All of them: the bank that they were taken from forgets with its next transaction, and so does this one.
        for record in state.records:
            self.history.add(record)

    # ------------------------------------------------------------------ transactions

    def check(self, wire: bytes, *, signatures: bool = True, blockhash: bool = True) -> Checked:
        """Everything a cluster checks before it executes a transaction.

        Raises:
            Refused: too large, malformed, badly signed, expired or a duplicate.
        """
        checked = sanitize(wire, signatures=signatures)
        if blockhash:
            if checked.blockhash not in self._blockhashes:
                raise Refused("BlockhashNotFound", "Blockhash not found")
            if checked.message_hash in self._seen[checked.blockhash]:
                raise Refused("AlreadyProcessed", "This transaction has already been processed")
        return checked

    def simulate(self, checked: Checked) -> SimulatedTransactionInfo | FailedTransactionMetadata:
        """Execute without changing anything."""
        self._sync()
        return self._vm.simulate_transaction(checked.parsed)

    def fee_of(self, message: Message | MessageV0) -> int:
        """What a transaction with this message would pay, in lamports, its price of compute included."""
        signatures = message.header.num_required_signatures
        self._sync()
        result = self._vm.simulate_transaction(
            VersionedTransaction.populate(message, [Signature.default()] * signatures)
        )
        # A message that cannot be loaded has no fee for the VM.
        return max(result.meta().fee(), signatures * LAMPORTS_PER_SIGNATURE)

    def airdrop_transaction(self, to: Pubkey, lamports: int) -> bytes:
        """A faucet transfer as wire bytes, ready for `apply`. Once applied, the next one differs, also in its slot."""
        distinct = set_compute_unit_limit(1_000 + self._airdrops % 1_000_000)
        pay = transfer(TransferParams(from_pubkey=self._faucet.pubkey(), to_pubkey=to, lamports=lamports))
        blockhash = Hash(self._entry)
        message = Message.new_with_blockhash([distinct, pay], self._faucet.pubkey(), blockhash)
        return bytes(Transaction([self._faucet], message, blockhash))

    # ------------------------------------------------------------------ reading

    @property
    def latest_blockhash(self) -> Hash:
        return Hash(self._entry)

    @property
    def parent(self) -> int:
        """The slot before the current one."""
        return self.blocks[-1].slot if self.blocks else 0

    def last_valid_block_height(self, blockhash: bytes) -> int | None:
        """The last block height at which a transaction with this blockhash is accepted; None if it is not known."""
        height = self._blockhashes.get(blockhash)
        return None if height is None else height + MAX_BLOCKHASH_AGE

    def account(self, key: Pubkey) -> Account | None:
        if key in _TIME_SYSVARS:
            self._sync()
        account = self._vm.get_account(key)
        # An account without lamports does not exist; LiteSVM keeps an empty shell.
        return account if account is not None and account.lamports > 0 else None

    def balance(self, key: Pubkey) -> int:
        return self._vm.get_balance(key) or 0

    def program_accounts(self, program: Pubkey) -> list[tuple[Pubkey, Account]]:
        return [(key, account) for key, account in self._vm.get_program_accounts(program) if account.lamports > 0]

    def rent_exempt_minimum(self, size: int) -> int:
        return self._vm.minimum_balance_for_rent_exemption(size)
