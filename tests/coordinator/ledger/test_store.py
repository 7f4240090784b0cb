"""What a ledger keeps on disk: snapshots equal the state, the log survives interrupted writes and names damage."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from ledger_process import SOL
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.message import Message
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer
from solders.transaction import Transaction

from coordinator.chain import Chain
from coordinator.deploy import deploy
from coordinator.ledger import journal as journal_module
from coordinator.ledger.bank import AdvanceSlot, Bank, Change, Execute
from coordinator.ledger.compaction import Compactor
from coordinator.ledger.journal import Journal
from coordinator.ledger.logfile import change_bytes, frame, header, log_files, log_path, read_log
from coordinator.ledger.sanitize import Refused
from coordinator.ledger.server import LedgerServer
from coordinator.ledger.snapshot import Damaged, decode, encode, state_hash
from coordinator.ledger.store import Genesis, Store, StoreError
from coordinator.program import program_bytes

GENESIS = Genesis(bytes(32), 1000)


def copy_of(bank: Bank) -> Bank:
    made = GENESIS.bank()
    made.restore(decode(b"".join(encode(bank.capture()))))
    return made


def hash_of(bank: Bank) -> str:
    return state_hash(bank.capture())


def payment(bank: Bank, payer: Keypair, to: Pubkey, lamports: int) -> bytes:
    made = transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=to, lamports=lamports))
    at = bank.latest_blockhash
    return bytes(Transaction([payer], Message.new_with_blockhash([made], payer.pubkey(), at), at))


def some_changes(seed: int, slots: int, per_slot: int = 3) -> list[Change]:
    """Payments between a few wallets, some of which fail, and some accounts that are emptied."""
    chance = random.Random(seed)
    bank = GENESIS.bank()
    wallets = [Keypair.from_seed(chance.randbytes(32)) for _ in range(4)]
    changes: list[Change] = []

    def do(change: Change) -> None:
        bank.apply(change)
        changes.append(change)

    for wallet in wallets:
        do(Execute(bank.airdrop_transaction(wallet.pubkey(), 10 * SOL)))
    for slot in range(1, slots + 1):
        do(AdvanceSlot(slot, 1000 + slot))
        for _ in range(per_slot):
            one, other = chance.sample(wallets, 2)
            most = bank.balance(one.pubkey())
            lamports = chance.choice([SOL // 50, most - 5000, most * 2])
            if lamports > 0:
                do(Execute(payment(bank, one, other.pubkey(), lamports)))
    return changes


@pytest.fixture(scope="module")
def deployed() -> tuple[Genesis, list[Change]]:
    """All changes of a chain that a program is deployed to, called on, upgraded and called again."""

    async def run() -> tuple[Genesis, list[Change]]:
        server = LedgerServer(slot_ms=20)
        changes: list[Change] = []
        server.bank.on_change.append(changes.append)
        owner, key = Keypair(), Keypair()
        [address] = await server.start()
        async with Chain([address.rpc], owner) as chain:
            await chain.airdrop(owner.pubkey(), 1000 * SOL)
            for code in (program_bytes(), program_bytes() + b"\1" * 8):
                await deploy(chain, owner, key, code)
                call = Instruction(key.pubkey(), b"\0" * 8, [AccountMeta(owner.pubkey(), True, True)])
                for blockhash in (server.bank.latest_blockhash, server.bank.latest_blockhash):
                    message = Message.new_with_blockhash([call], owner.pubkey(), blockhash)
                    wire = bytes(Transaction([owner], message, blockhash))
                    try:
                        server.bank.check(wire)
                    except Refused:
                        continue
                    server.bank.apply(Execute(wire))
        await server.stop()
        return server.genesis, changes

    return asyncio.run(run())


def test_a_restored_bank_goes_on_as_the_one_it_was_taken_from(deployed: tuple[Genesis, list[Change]]) -> None:
    """At the start of every slot: what a program deployed in the slot before does is the same too."""
    genesis, changes = deployed
    whole = genesis.bank()
    records = [whole.apply(change) for change in changes]
    units = [record.meta.compute_units_consumed() for record in records if record is not None and record.error]
    assert len(units) >= 2, "the program was called"
    assert all(unit > 0 for unit in units)
    wanted = hash_of(whole)
    one = genesis.bank()
    restored = 0
    for position, change in enumerate(changes):
        one.apply(change)
        if isinstance(change, AdvanceSlot) and (
            position + 1 < len(changes) and isinstance(changes[position + 1], Execute)
        ):
            other = genesis.bank()
            other.restore(decode(b"".join(encode(one.capture()))))
            assert hash_of(other) == hash_of(one)
            for later in changes[position + 1 :]:
                other.apply(later)
            assert hash_of(other) == wanted, f"restored at slot {change.slot}"
            restored += 1
    assert restored > 5


def test_a_restored_bank_refuses_what_was_executed_before() -> None:
    bank = GENESIS.bank()
    bank.apply(AdvanceSlot(1, 1001))
    payer = Keypair()
    bank.apply(Execute(bank.airdrop_transaction(payer.pubkey(), SOL)))
    wire = payment(bank, payer, Keypair().pubkey(), SOL // 2)
    bank.apply(Execute(wire))
    other = copy_of(bank)
    with pytest.raises(Refused, match="already been processed"):
        other.check(wire)
    assert other.airdrop_transaction(payer.pubkey(), SOL) == bank.airdrop_transaction(payer.pubkey(), SOL)
    record = other.history.get(Transaction.from_bytes(wire).signatures[0])
    assert record is not None
    assert list(other.history.of_account(payer.pubkey()))[-1] == record


def test_a_capture_is_the_state_of_its_moment_however_slowly_it_is_read() -> None:
    changes = some_changes(1, slots=60)
    bank = GENESIS.bank()
    for change in changes[: len(changes) // 2]:
        bank.apply(change)
    wanted = hash_of(bank)
    content = encode(bank.capture())
    pieces = []
    for change in changes[len(changes) // 2 :]:
        bank.apply(change)
        pieces.append(next(content, b""))
    taken = GENESIS.bank()
    taken.restore(decode(b"".join([*pieces, *content])))
    assert hash_of(taken) == wanted != hash_of(bank)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_snapshot_is_told(damage: str) -> None:
    bank = GENESIS.bank()
    for change in some_changes(2, slots=30):
        bank.apply(change)
    content = b"".join(encode(bank.capture()))
    chance = random.Random(5)
    for _ in range(200):
        at = chance.randrange(len(content))
        broken = {
            "cut": content[:at],
            "flip": content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :],
            "empty": b"",
            "foreign": b"hello" + content,
        }[damage]
        with pytest.raises(Damaged):
            decode(broken)


# ---------------------------------------------------------------------- the log's files


def write_log(folder: Path, changes: list[Change], per_frame: int = 4, per_file: int = 40) -> None:
    for first in range(0, len(changes), per_frame):
        path = log_path(folder, first - first % per_file)
        if not path.exists():
            path.write_bytes(header())
        part = changes[first : first + per_frame]
        with path.open("ab") as file:
            file.write(frame(first, len(part), b"".join(change_bytes(change) for change in part)))


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, list[Change], Genesis]:
    """A closed ledger's folder with a log of three files, and what is in it."""
    changes = some_changes(3, slots=60)[:100]
    folder = tmp_path / "ledger"
    with Store(folder, 1000):
        pass
    genesis = json.loads((folder / "genesis.json").read_text())
    genesis["genesis"] = GENESIS.secret.hex()
    (folder / "genesis.json").write_text(json.dumps(genesis))
    write_log(folder, changes)
    assert len(log_files(folder)) == 3
    return folder, changes, GENESIS


def opened(folder: Path) -> tuple[Bank, int]:
    with Store(folder, 0) as store:
        found = store.open()
        return found.bank, found.index


def replayed(changes: list[Change]) -> str:
    bank = GENESIS.bank()
    for change in changes:
        bank.apply(change)
    return hash_of(bank)


def test_the_log_gives_the_state_back(kept: tuple[Path, list[Change], Genesis]) -> None:
    folder, changes, _ = kept
    bank, index = opened(folder)
    assert index == len(changes)
    assert hash_of(bank) == replayed(changes)


def test_an_interrupted_last_write_is_cut_off_wherever_it_was_interrupted(
    kept: tuple[Path, list[Change], Genesis], caplog: pytest.LogCaptureFixture
) -> None:
    folder, changes, _ = kept
    path = log_files(folder)[-1]
    content = path.read_bytes()
    start = content.rfind(b"\xf5PsL")
    wanted = replayed(changes[:96])
    for end in (*range(start, start + 40), *range(start + 40, len(content), 97)):
        path.write_bytes(content[:end])
        found = read_log(path)
        assert (found.next, found.torn, found.end) == (96, end > start, start)
    for end in (start + 1, len(content) - 1):
        path.write_bytes(content[:end])
        bank, index = opened(folder)
        assert (index, hash_of(bank)) == (96, wanted)
    assert "interrupted" in caplog.text
    # Space that was set aside, but whose data never arrived: sectors of zeros.
    path.write_bytes(content[: start + 30] + bytes(len(content) - start - 30))
    assert opened(folder)[1] == 96
    path.write_bytes(content + bytes(4096))
    assert opened(folder)[1] == 100


def test_damage_that_is_no_interrupted_write_is_refused_and_can_be_cut(
    kept: tuple[Path, list[Change], Genesis],
) -> None:
    folder, changes, _ = kept
    chance = random.Random(4)
    whole = {path: path.read_bytes() for path in log_files(folder)}
    for path, content in whole.items():
        for _ in range(25):
            at = chance.randrange(len(content))
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
            found = read_log(path)
            assert found.damage is not None
            if found.torn:  # its length in the last frame's header: indistinguishable from a short file
                assert found.next == 96
                continue
            with pytest.raises(StoreError) as refused:
                opened(folder)
            assert path.name in str(refused.value)
            assert "copy" in str(refused.value)
            assert "psyche-ledger cut" in str(refused.value)
        path.write_bytes(content)
    middle = log_files(folder)[1]
    content = whole[middle]
    middle.write_bytes(content[:-300] + b"x" + content[-299:])
    with Store(folder, 0) as store:
        done = store.cut()
        assert done is not None
        assert store.cut() is None
    bank, index = opened(folder)
    assert index == done[0]
    assert 40 <= index < 80
    assert hash_of(bank) == replayed(changes[:index])
    assert len(list(folder.glob("*.damaged"))) == 2


def test_what_a_client_writes_into_a_transaction_is_no_later_frame(tmp_path: Path) -> None:
    """The last write is interrupted, and a transaction in it holds a whole frame with a later number."""
    path = log_path(tmp_path, 0)
    forged = frame(1 << 40, 1, change_bytes(AdvanceSlot(9, 9)))
    hostile = change_bytes(Execute(bytes([255]) * 300 + forged + bytes([255]) * 700))
    payload = change_bytes(AdvanceSlot(2, 2)) + hostile + hostile + change_bytes(AdvanceSlot(3, 3))
    before = header() + frame(0, 1, change_bytes(AdvanceSlot(1, 1)))
    last = frame(1, 4, payload)
    for end in range(1, len(last)):
        path.write_bytes(before + last[:end])
        found = read_log(path)
        assert (found.torn, found.next, found.end) == (True, 1, len(before)), end
    # Sectors whose data never arrived, behind the sector with the frame's header.
    content = before + last
    for sector in range(512, len(content), 512):
        hole = content[:sector] + bytes(len(content[sector : sector + 512])) + content[sector + 512 :]
        path.write_bytes(hole)
        assert read_log(path).torn, sector
    # With a frame after it, nothing about it was interrupted.
    after = frame(5, 1, change_bytes(AdvanceSlot(4, 4)))
    for at in range(len(before), len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :] + after)
        assert (read_log(path).torn, read_log(path).next) == (False, 1), at


def test_a_damaged_length_does_not_hide_the_frames_after_it(kept: tuple[Path, list[Change], Genesis]) -> None:
    folder, _, _ = kept
    path = log_files(folder)[-1]
    content = path.read_bytes()
    at = content.find(b"\xf5PsL") + 4
    for bit in range(32):
        path.write_bytes(
            content[: at + bit // 8] + bytes([content[at + bit // 8] ^ 1 << bit % 8]) + content[at + bit // 8 + 1 :]
        )
        found = read_log(path)
        assert (found.torn, found.next) == (False, 80), bit


def test_a_file_that_was_only_begun_is_begun_again(kept: tuple[Path, list[Change], Genesis]) -> None:
    folder, changes, _ = kept
    path = log_path(folder, len(changes))
    for content in (b"", header()[:5], bytes(len(header())), header()[:5] + bytes(len(header()) - 5), bytes(3)):
        path.write_bytes(content)
        assert read_log(path).torn
        assert opened(folder)[1] == len(changes)
    # More than a first line was there once: what it was had been acknowledged.
    path.write_bytes(bytes(4096))
    with pytest.raises(StoreError, match="does not start as a log"):
        opened(folder)


def test_a_missing_part_of_the_log_is_named(kept: tuple[Path, list[Change], Genesis]) -> None:
    folder, _, _ = kept
    log_files(folder)[1].unlink()
    with pytest.raises(StoreError, match="changes 40 to 79 are missing"):
        opened(folder)


def test_a_damaged_snapshot_falls_back_to_the_one_before(kept: tuple[Path, list[Change], Genesis]) -> None:
    folder, changes, _ = kept
    with Store(folder, 0) as store:
        for index in (40, 80):
            bank = GENESIS.bank()
            for change in changes[:index]:
                bank.apply(change)
            store.snapshot_path(index).write_bytes(b"".join(encode(bank.capture())))
        store.drop_old(keep_log=False)
        assert [int(path.name[4:]) for path in log_files(folder)] == [40, 80]
        newest = store.snapshot_path(80)
    newest.write_bytes(newest.read_bytes()[:-1])
    bank, index = opened(folder)
    assert (index, hash_of(bank)) == (100, replayed(changes))
    with Store(folder, 0) as store:
        store.snapshot_path(40).unlink()
    with pytest.raises(StoreError, match="copy"):
        opened(folder)


def test_a_folder_is_used_by_one_process_and_is_a_ledgers(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    with Store(folder, 0):
        with pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
            Store(folder, 0)
        assert (folder / "genesis.json").stat().st_mode & 0o777 == 0o600
        assert folder.stat().st_mode & 0o777 == 0o700
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "cat.jpg").touch()
    with pytest.raises(StoreError, match=r"cat\.jpg"):
        Store(stranger, 0)
    (folder / "genesis.json").write_text('{"format": 99, "genesis": "", "unix_time": 0}')
    with pytest.raises(StoreError, match="format 99"):
        Store(folder, 0)
    (folder / "genesis.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        Store(folder, 0)
    with pytest.raises(StoreError, match=r"cat\.jpg is a file. Name a folder"):
        Store(tmp_path / "photos" / "cat.jpg", 0)
    with pytest.raises(StoreError, match="cannot be used: Not a directory"):
        Store(tmp_path / "photos" / "cat.jpg" / "new", 0)


# ---------------------------------------------------------------------- the journal


def test_nothing_is_called_before_it_is_on_disk(tmp_path: Path) -> None:
    async def run() -> None:
        journal = Journal(tmp_path, 0, 0, 0, lambda error: None)
        seen: list[tuple[int, int]] = []

        def note(index: int) -> Callable[[], None]:
            return lambda: seen.append((index, log_on_disk()))

        def log_on_disk() -> int:
            return max(read_log(path).next for path in log_files(tmp_path))

        for index in range(1, 200):
            journal.append(AdvanceSlot(index, 0))
            journal.when_durable(note(index))
            if index % 50 == 0:
                journal.rotate()
            if index % 7 == 0:
                await asyncio.sleep(0)
        await journal.durable()
        journal.when_durable(note(200))
        await journal.close()
        assert [index for index, _ in seen] == list(range(1, 201)), "in order"
        assert all(durable >= index for index, durable in seen[:-1])
        assert [int(path.name[4:]) for path in log_files(tmp_path)] == [0, 50, 100, 150]
        assert all(read_log(path).damage is None for path in log_files(tmp_path))

    asyncio.run(run())


def test_snapshots_of_a_running_bank_keep_the_log_short(tmp_path: Path) -> None:
    async def run(keep_log: bool) -> tuple[str, list[Path]]:
        folder = tmp_path / str(keep_log)
        store = Store(folder, 0)
        bank = store.genesis.bank()
        journal = Journal(folder, 0, 0, 0, lambda error: None)
        bank.on_change.append(journal.append)
        compactor = Compactor(bank, journal, store, 0, every=100, keep_log=keep_log)
        for slot in range(1, 700):
            bank.apply(AdvanceSlot(slot, slot))
            bank.apply(Execute(bank.airdrop_transaction(Keypair().pubkey(), SOL)))
            await asyncio.sleep(0)
        await compactor.finish()
        await journal.close()
        wanted = hash_of(bank)
        if keep_log:
            assert hash_of(store.replayed_from_genesis()) == wanted
        store.close()
        assert hash_of(opened(folder)[0]) == wanted
        return wanted, log_files(folder)

    _, short = asyncio.run(run(False))
    _, whole = asyncio.run(run(True))
    assert int(short[0].name[4:]) > 0
    assert int(whole[0].name[4:]) == 0


def test_any_error_of_a_write_ends_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is no OSError, in the journal's thread or before it: whoever waits learns of it."""

    async def run(where: str) -> None:
        def defect(*_: object) -> None:
            raise RuntimeError("a defect")

        ended: list[BaseException] = []
        journal = Journal(tmp_path, 0, 0, 0, ended.append)
        called: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(journal_module, where, defect)
            journal.append(AdvanceSlot(1, 0))
            journal.when_durable(lambda: called.append(1))
            with pytest.raises(OSError, match="cannot be written"):
                await asyncio.wait_for(journal.durable(), 90)
        journal.append(AdvanceSlot(2, 0))
        journal.when_durable(lambda: called.append(2))
        await journal.close()
        assert [str(error) for error in ended] == ["a defect"]
        assert called == []

    for where in ("_write_all", "_sync", "frame"):
        asyncio.run(run(where))


def test_reading_a_folder_changes_nothing_in_it(kept: tuple[Path, list[Change], Genesis]) -> None:
    folder, changes, _ = kept
    (folder / "lock").write_text("4711\n")
    (folder / "snapshot-9.part").write_bytes(b"half of one")
    with log_files(folder)[-1].open("ab") as last:
        last.write(b"\xf5P")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    for without_lock in (False, True):
        if without_lock:
            (folder / "lock").unlink()
            del before["lock"]
        with Store(folder, 0, read_only=True) as store, Store(folder, 0, read_only=True) as other:
            assert store.open().index == other.open().index == len(changes)
        assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    with Store(folder, 0), pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
        Store(folder, 0, read_only=True)
    with Store(folder, 0, read_only=True), pytest.raises(StoreError, match="in use by `psyche-ledger check`"):
        Store(folder, 0)


# ---------------------------------------------------------------------- the process


def test_a_full_disk_acknowledges_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: writes fail in the same place."""
    folder = tmp_path / "ledger"
    script = (
        "import resource, sys; from coordinator.ledger.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); sys.argv[1:] = sys.argv[1:]; main()"
    )
    command = [sys.executable, "-c", script, "run", "--port", "0", "--slot-ms", "20", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    rpc = json.loads(process.stdout.readline())["rpc"]
    acknowledged = asyncio.run(_airdrops_until_it_ends(rpc))
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 5, errors
    assert "Make room" in errors
    assert "Traceback" not in errors
    assert acknowledged > 20
    bank, _ = opened(folder)
    assert acknowledged <= bank.transaction_count <= acknowledged + 1


async def _airdrops_until_it_ends(rpc: str) -> int:
    done = 0
    async with httpx2.AsyncClient(timeout=90) as client:
        while True:
            body = {"id": 1, "method": "requestAirdrop", "params": [str(Keypair().pubkey()), SOL]}
            try:
                assert "result" in (await client.post(rpc, json=body)).json()
            except httpx2.TransportError:
                return done
            done += 1


def test_the_commands_check_and_cut(kept: tuple[Path, list[Change], Genesis], tmp_path: Path) -> None:
    folder, changes, _ = kept

    def psyche_ledger(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "coordinator.ledger", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)

    done = psyche_ledger("check", "--dir", str(folder), "--replay")
    found = json.loads(done.stdout)
    assert found["state"] == found["replayed"] == replayed(changes)
    assert psyche_ledger("check", "--dir", str(tmp_path / "none")).returncode == 4
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    log_files(broken)[0].write_bytes(b"x" + log_files(broken)[0].read_bytes())
    for command in (["check", "--dir", str(broken)], ["run", "--port", "0", "--dir", str(broken)]):
        refused = psyche_ledger(*command)
        assert refused.returncode == 4
        assert "psyche-ledger cut" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert "kept 0 changes" in psyche_ledger("cut", "--dir", str(broken)).stdout
