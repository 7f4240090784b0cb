"""How long a killed ledger takes to start again: `python -m benchmarks.ledger_restart`.

Makes a ledger with 100,000 transactions behind it, as far from its last snapshot as a ledger gets, and starts it as a
process. Beside it stands the start of an empty one, in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from solders.keypair import Keypair
from solders.message import Message
from solders.signature import Signature
from solders.system_program import TransferParams, transfer
from solders.transaction import Transaction

from coordinator.ledger.bank import AdvanceSlot, Execute
from coordinator.ledger.compaction import SNAPSHOT_EVERY, Compactor
from coordinator.ledger.journal import Journal
from coordinator.ledger.store import Store

REQUIRED_SECONDS = 5.0
_PER_SLOT = 150


async def make(folder: Path, transactions: int) -> None:
    """Fill a folder, each payment to an account of its own, and leave it as a kill would, just before a snapshot."""
    store = Store(folder, int(time.time()))
    bank = store.genesis.bank()
    journal = Journal(folder, 0, 0, 0, lambda error: None)
    bank.on_change.append(journal.append)
    compactor = Compactor(bank, journal, store, 0, keep_log=False)
    chance, payer = random.Random(0), Keypair()
    bank.apply(Execute(bank.airdrop_transaction(payer.pubkey(), 10**17)))
    while True:
        bank.apply(AdvanceSlot(bank.slot + 1, int(time.time())))
        at = bank.latest_blockhash
        for _ in range(_PER_SLOT):
            to = Keypair.from_seed(chance.randbytes(32)).pubkey()
            pay = transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=to, lamports=1_000_000))
            message = Message.new_with_blockhash([pay], payer.pubkey(), at)
            # Signatures are checked before a transaction gets here, and not when the log is replayed.
            bank.apply(Execute(bytes(Transaction.populate(message, [Signature(chance.randbytes(64))]))))
        await journal.durable()
        await compactor.idle()
        behind = journal.index - compactor.last
        if bank.transaction_count >= transactions and behind > SNAPSHOT_EVERY - 2 * _PER_SLOT:
            break
    await journal.close()
    store.close()


def start_seconds(folder: Path) -> tuple[float, float]:
    """From starting the command to its line that says it is ready: wall-clock seconds, and CPU seconds it used."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "coordinator.ledger", "run", "--port", "0", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    seconds = time.perf_counter() - started
    used = psutil.Process(process.pid).cpu_times()
    process.kill()
    process.communicate()
    json.loads(line)
    return seconds, used.user + used.system


def main() -> int:
    """Exit status 1 when it takes longer than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transactions", type=int, default=100_000, help="how many at least (default: 100000)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "ledger"
        asyncio.run(make(folder, options.transactions))
        size = sum(path.stat().st_size for path in folder.iterdir())
        # A kill does not empty the page cache, and neither does this.
        restart, restart_cpu = min(start_seconds(folder) for _ in range(3))
        empty, empty_cpu = min(start_seconds(Path(temporary) / f"empty-{number}") for number in range(3))
    found = {
        "load": os.getloadavg()[0],
        "transactions": options.transactions,
        "bytes": size,
        "restart_s": restart,
        "restart_cpu_s": restart_cpu,
        "empty_s": empty,
        "empty_cpu_s": empty_cpu,
    }
    print(
        f"{options.transactions:,} transactions, {size / 1e6:.0f} MB: ready after {restart:.2f} s "
        f"({restart_cpu:.2f} s of CPU)\nan empty ledger: ready after {empty:.2f} s ({empty_cpu:.2f} s of CPU)\n"
        f"best of 3 each, load average {found['load']:.1f}; required: {REQUIRED_SECONDS:.0f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0 if found["restart_s"] < REQUIRED_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
