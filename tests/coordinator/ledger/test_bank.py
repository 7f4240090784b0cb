"""The bank by itself: time, blockhashes, duplicates, history, replay."""

from __future__ import annotations

import hashlib
import struct
import time

import pytest
from solders.account import Account
from solders.address_lookup_table_account import AddressLookupTableAccount
from solders.clock import Clock
from solders.compute_budget import set_compute_unit_limit, set_compute_unit_price
from solders.hash import Hash
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.message import Message, MessageV0
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer
from solders.sysvar import CLOCK, SLOT_HASHES
from solders.transaction import Transaction, VersionedTransaction
from solders.transaction_metadata import FailedTransactionMetadata

from coordinator.ledger import history
from coordinator.ledger.bank import FAUCET_LAMPORTS, AdvanceSlot, Bank, Change, Execute
from coordinator.ledger.sanitize import Refused
from coordinator.ledger.snapshot import decode, encode, state_hash
from coordinator.ledger.state import MAX_BLOCKHASH_AGE, Record

GENESIS = bytes(32)
SOL = 10**9
TABLE_PROGRAM = Pubkey.from_string("AddressLookupTab1e1111111111111111111111111")


def key(seed: int) -> Keypair:
    return Keypair.from_seed(hashlib.sha256(bytes([seed])).digest())


def signed(bank: Bank, payer: Keypair, *instructions: Instruction, blockhash: Hash | None = None) -> bytes:
    blockhash = blockhash or bank.latest_blockhash
    message = Message.new_with_blockhash(list(instructions), payer.pubkey(), blockhash)
    return bytes(Transaction([payer], message, blockhash))


def pay(payer: Keypair, to: Pubkey, lamports: int) -> Instruction:
    return transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=to, lamports=lamports))


def run(bank: Bank, wire: bytes) -> Record | None:
    bank.check(wire)
    return bank.apply(Execute(wire))


@pytest.fixture
def funded() -> tuple[Bank, Keypair]:
    bank = Bank(GENESIS, 1000)
    bank.apply(AdvanceSlot(1, 1000))
    bank.apply(Execute(bank.airdrop_transaction(key(1).pubkey(), 10 * SOL)))
    return bank, key(1)


def test_slots_move_the_clock_and_the_slot_hashes_that_programs_see(funded: tuple[Bank, Keypair]) -> None:
    bank, _ = funded
    for slot in (2, 3, 7):  # 4 to 6 are skipped
        bank.apply(AdvanceSlot(slot, 1000 + slot))
    account = bank.account(CLOCK)
    assert account is not None
    clock = Clock.from_bytes(account.data)
    assert (clock.slot, clock.unix_timestamp) == (7, 1007)
    hashes = bank.account(SLOT_HASHES)
    assert hashes is not None
    count = struct.unpack_from("<Q", hashes.data)[0]
    entries = [struct.unpack_from("<Q32s", hashes.data, 8 + 40 * index) for index in range(count)]
    assert [slot for slot, _ in entries] == [3, 2, 1, 0]
    assert len({digest for _, digest in entries}) == 4
    assert bank.block_height == 4


def test_time_never_runs_backwards(funded: tuple[Bank, Keypair]) -> None:
    bank, _ = funded
    bank.apply(AdvanceSlot(2, 900))
    assert bank.unix_time == 1000
    with pytest.raises(ValueError, match="does not follow"):
        bank.apply(AdvanceSlot(2, 2000))


def test_slot_hashes_depend_on_the_transactions() -> None:
    banks = [Bank(GENESIS, 0), Bank(GENESIS, 0)]
    banks[0].apply(Execute(banks[0].airdrop_transaction(key(1).pubkey(), SOL)))
    for bank in banks:
        bank.apply(AdvanceSlot(1, 0))
    assert banks[0].latest_blockhash != banks[1].latest_blockhash
    assert banks[0].latest_blockhash != Bank(b"\1" * 32, 0).latest_blockhash


def test_a_blockhash_is_good_for_150_blocks_and_no_longer(funded: tuple[Bank, Keypair]) -> None:
    bank, payer = funded
    old = bank.latest_blockhash
    assert bank.last_valid_block_height(bytes(old)) == bank.block_height + MAX_BLOCKHASH_AGE
    for slot in range(2, 2 + MAX_BLOCKHASH_AGE):
        bank.apply(AdvanceSlot(slot, 0))
    wire = signed(bank, payer, pay(payer, key(2).pubkey(), SOL), blockhash=old)
    bank.check(wire)
    bank.apply(AdvanceSlot(2 + MAX_BLOCKHASH_AGE, 0))
    with pytest.raises(Refused) as refused:
        bank.check(wire)
    assert refused.value.error == "BlockhashNotFound"


def test_the_same_message_counts_once(funded: tuple[Bank, Keypair]) -> None:
    bank, payer = funded
    wire = signed(bank, payer, pay(payer, key(2).pubkey(), SOL))
    assert run(bank, wire) is not None
    with pytest.raises(Refused) as refused:
        bank.check(wire)
    assert refused.value.error == "AlreadyProcessed"
    assert bank.balance(key(2).pubkey()) == SOL


def test_a_failed_transaction_pays_its_fee_and_changes_nothing_else(funded: tuple[Bank, Keypair]) -> None:
    bank, payer = funded
    before = bank.balance(payer.pubkey())
    record = run(bank, signed(bank, payer, pay(payer, key(2).pubkey(), 100 * SOL)))
    assert record is not None
    assert record.error == {"InstructionError": [0, {"Custom": 1}]}
    assert record.writable == (payer.pubkey(),)
    assert bank.balance(payer.pubkey()) == before - 5000
    assert bank.balance(key(2).pubkey()) == 0


def test_who_cannot_pay_the_fee_leaves_no_trace(funded: tuple[Bank, Keypair]) -> None:
    bank, _ = funded
    pauper = key(9)
    count = bank.transaction_count
    wire = signed(bank, pauper, pay(pauper, key(2).pubkey(), 1))
    assert run(bank, wire) is None
    assert bank.transaction_count == count
    assert bank.history.get(VersionedTransaction.from_bytes(wire).signatures[0]) is None


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda wire: wire[:-1], "SanitizeFailure"),
        (lambda wire: wire + b"\0", "SanitizeFailure"),
        (lambda wire: b"", "SanitizeFailure"),
        (lambda wire: bytes(1233), "TooLarge"),
        (lambda wire: wire[:1] + bytes([wire[1] ^ 1]) + wire[2:], "SignatureFailure"),
        (lambda wire: wire[:-1] + bytes([wire[-1] ^ 1]), "SignatureFailure"),
    ],
)
def test_damaged_transactions_are_refused(funded: tuple[Bank, Keypair], damage: object, error: str) -> None:
    bank, payer = funded
    wire = signed(bank, payer, pay(payer, key(2).pubkey(), SOL))
    assert callable(damage)
    with pytest.raises(Refused) as refused:
        bank.check(damage(wire))
    assert refused.value.error == error


def test_the_same_changes_give_the_same_state() -> None:
    first = Bank(GENESIS, 5)
    log: list[Change] = [Execute(first.airdrop_transaction(key(1).pubkey(), 10 * SOL))]
    first.apply(log[0])
    for slot in range(1, 30):
        step = AdvanceSlot(slot, 5 + slot)
        first.apply(step)
        sent = Execute(signed(first, key(1), pay(key(1), key(2 + slot % 3).pubkey(), SOL // 10 + slot)))
        first.apply(sent)
        log += [step, sent]
    second = Bank(GENESIS, 5)
    for change in log:
        second.apply(change)
    assert second.latest_blockhash == first.latest_blockhash
    for seed in range(1, 6):
        assert second.balance(key(seed).pubkey()) == first.balance(key(seed).pubkey())
    for sysvar in (CLOCK, SLOT_HASHES):
        accounts = (first.account(sysvar), second.account(sysvar))
        assert all(isinstance(account, Account) for account in accounts)
        assert accounts[0] == accounts[1]


def test_history_is_bounded_and_forgets_the_oldest(
    funded: tuple[Bank, Keypair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "HISTORY_TRANSACTIONS", 5)
    bank, payer = funded
    records = [run(bank, signed(bank, payer, pay(payer, key(2).pubkey(), SOL // 100 + i))) for i in range(4)]
    bank.apply(AdvanceSlot(bank.slot + history.HISTORY_SLOTS + 1, 1000))
    records += [run(bank, signed(bank, payer, pay(payer, key(2).pubkey(), SOL // 100 + i))) for i in range(4, 8)]
    kept = [record for record in records if record is not None and bank.history.get(record.signature)]
    assert kept == records[3:]
    assert list(bank.history.of_account(payer.pubkey())) == records[3:]
    assert bank.balance(key(2).pubkey()) == sum(SOL // 100 + i for i in range(8))


def test_no_flood_pushes_a_young_status_out(funded: tuple[Bank, Keypair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "HISTORY_TRANSACTIONS", 5)
    bank, payer = funded
    mine = run(bank, signed(bank, payer, pay(payer, key(2).pubkey(), SOL)))
    assert mine is not None

    def flood() -> None:
        for i in range(20):
            run(bank, signed(bank, payer, pay(payer, key(3).pubkey(), SOL // 100 + i)))

    flood()
    bank.apply(AdvanceSlot(mine.slot + history.HISTORY_SLOTS, 1000))
    flood()
    assert bank.history.get(mine.signature) is mine
    bank.apply(AdvanceSlot(bank.slot + 1, 1000))
    # A bank that is restored now has the same history, and forgets at the same time.
    other = Bank(GENESIS, 1000)
    other.restore(decode(b"".join(encode(bank.capture()))))
    assert other.history.get(mine.signature) is not None
    assert state_hash(other.capture()) == state_hash(bank.capture())
    last = signed(bank, payer, pay(payer, key(3).pubkey(), SOL // 2))
    for one in (bank, other):
        run(one, last)
        assert one.history.get(mine.signature) is None
    assert state_hash(other.capture()) == state_hash(bank.capture())
    assert len(list(bank.history.of_account(key(3).pubkey()))) == 21


def test_a_faucet_that_was_emptied_stays_empty_in_a_restored_bank() -> None:
    bank = Bank(GENESIS, 1000)
    bank.apply(AdvanceSlot(1, 1000))
    record = bank.apply(Execute(bank.airdrop_transaction(key(1).pubkey(), FAUCET_LAMPORTS - 5000)))
    assert record is not None
    assert record.error is None
    other = Bank(GENESIS, 1000)
    other.restore(decode(b"".join(encode(bank.capture()))))
    assert other.balance(record.keys[0]) == bank.balance(record.keys[0]) == 0
    assert other.account(record.keys[0]) is None
    assert state_hash(other.capture()) == state_hash(bank.capture())
    assert other.apply(Execute(other.airdrop_transaction(key(2).pubkey(), SOL))) is None


def test_a_table_transaction_names_the_accounts_that_it_writes(funded: tuple[Bank, Keypair]) -> None:
    bank, payer = funded
    bank.apply(AdvanceSlot(2, 0))
    recent = struct.pack("<Q", 1)
    table, bump = Pubkey.find_program_address([bytes(payer.pubkey()), recent], TABLE_PROGRAM)
    metas = [
        AccountMeta(table, is_signer=False, is_writable=True),
        AccountMeta(payer.pubkey(), is_signer=True, is_writable=False),
        AccountMeta(payer.pubkey(), is_signer=True, is_writable=True),
        AccountMeta(Pubkey.default(), is_signer=False, is_writable=False),
    ]
    create = Instruction(TABLE_PROGRAM, struct.pack("<I", 0) + recent + bytes([bump]), metas)
    to = key(2).pubkey()
    extend = Instruction(TABLE_PROGRAM, struct.pack("<IQ", 2, 1) + bytes(to), metas)
    made = run(bank, signed(bank, payer, create, extend))
    assert made is not None
    assert made.error is None
    bank.apply(AdvanceSlot(3, 0))
    lookup = AddressLookupTableAccount(key=table, addresses=[to])
    message = MessageV0.try_compile(payer.pubkey(), [pay(payer, to, SOL)], [lookup], bank.latest_blockhash)
    assert to not in message.account_keys
    record = run(bank, bytes(VersionedTransaction(message, [payer])))
    assert record is not None
    assert record.error is None
    assert to in record.writable
    assert record.keys[record.loaded_from :] == (to,)


def test_a_tick_costs_far_less_than_half_a_millisecond() -> None:
    bank = Bank(GENESIS, 0)
    started = time.process_time()
    for slot in range(1, 2001):
        bank.apply(AdvanceSlot(slot, slot))
    assert (time.process_time() - started) / 2000 < 0.0005


def test_what_fails_preflight_leaves_no_trace_and_what_does_not_runs_once(funded: tuple[Bank, Keypair]) -> None:
    bank, payer = funded
    told: list[Change] = []
    bank.on_change.append(told.append)
    before = state_hash(bank.capture())
    wire = signed(bank, payer, pay(payer, key(2).pubkey(), 100 * SOL))
    simulated = bank.simulate(bank.check(wire))
    failure = bank.apply_if_succeeds(bank.check(wire))
    assert isinstance(failure, FailedTransactionMetadata)
    assert isinstance(simulated, FailedTransactionMetadata)
    assert failure.meta().logs() == simulated.meta().logs()
    assert (state_hash(bank.capture()), told) == (before, [])
    pauper = key(9)
    failure = bank.apply_if_succeeds(bank.check(signed(bank, pauper, pay(pauper, key(2).pubkey(), 1))))
    assert isinstance(failure, FailedTransactionMetadata)
    assert (state_hash(bank.capture()), told) == (before, [])
    good = signed(bank, payer, pay(payer, key(2).pubkey(), SOL))
    record = bank.apply_if_succeeds(bank.check(good))
    assert isinstance(record, Record)
    assert told == [Execute(good)]
    assert bank.balance(key(2).pubkey()) == SOL


def test_the_fee_is_per_signature_and_by_the_price_of_compute(funded: tuple[Bank, Keypair]) -> None:
    bank, payer = funded
    instructions = [set_compute_unit_limit(10_000), set_compute_unit_price(2_500_000)]
    record = run(bank, signed(bank, payer, *instructions, pay(payer, key(2).pubkey(), SOL)))
    assert record is not None
    assert record.error is None
    assert record.meta.fee() == 5000 + 25_000
    assert bank.balance(payer.pubkey()) == 10 * SOL - SOL - 30_000
    assert bank.fee_of(VersionedTransaction.from_bytes(record.transaction).message) == 30_000
    broke = Message.new_with_blockhash(instructions, key(9).pubkey(), bank.latest_blockhash)
    assert bank.fee_of(broke) == 30_000


def test_an_account_below_the_rent_is_refused(funded: tuple[Bank, Keypair]) -> None:
    bank, payer = funded
    result = bank.simulate(bank.check(signed(bank, payer, pay(payer, key(2).pubkey(), 100))))
    assert isinstance(result, FailedTransactionMetadata)
    assert "InsufficientFundsForRent" in str(result.err())
