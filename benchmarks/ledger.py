"""Transactions per second and latency of `psyche-ledger` on one core: `python -m benchmarks.ledger`.

A ledger process and a load process, each pinned to a core of its own. "CPU us" is the ledger's CPU time per
transaction, which other work on the machine moves less than the rate. Beside the durable ledger (every answer waits
for its fsync) stands the same one in memory, in the same run. The parts of a transaction's cost are measured in this
process. Prints a table and, with `--json FILE`, writes the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from solders.hash import Hash
from solders.keypair import Keypair
from solders.message import Message
from solders.system_program import TransferParams, transfer
from solders.transaction import Transaction

from coordinator.ledger.bank import AdvanceSlot, Bank, Execute

REQUIRED_PER_SECOND = 3000
REQUIRED_P99_MS = 50.0
# Slots as long as mainnet's: everything is signed before it is sent, and blockhashes are good for 150 slots.
SLOT_MS = 400


@contextlib.contextmanager
def ledger(cores: list[int], *arguments: str) -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, "-m", "coordinator.ledger", "run", "--port", "0", "--slot-ms", str(SLOT_MS), *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, cores[:1])
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["rpc"], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.communicate(timeout=30)


def load(cores: list[int], rpc: str, process: psutil.Process, *arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.ledger_load", rpc, *arguments]
    before = process.cpu_times()
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores[-1:]),
    )
    found: dict[str, float] = json.loads(done.stdout)
    used = process.cpu_times()
    # Signing comes before the load, and the ledger has next to nothing to do during it.
    found["cpu_us"] = (used.user + used.system - before.user - before.system) / found["transactions"] * 1e6
    if found["errors"]:
        raise SystemExit(f"{found['errors']} transactions were answered with an error")
    return found


def measure(cores: list[int], durable: bool, count: int, connections: int) -> dict[str, dict[str, float]]:
    """Three loads of one ledger: as fast as it goes, the same without preflight, and half the required rate."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ("--dir", str(Path(folder) / "ledger")) if durable else ()
        with ledger(cores, *arguments) as (rpc, process):
            common = ("--count", str(count), "--connections", str(connections))
            return {
                "preflight": load(cores, rpc, process, *common),
                "no preflight": load(cores, rpc, process, *common, "--skip-preflight"),
                "half rate": load(cores, rpc, process, *common, "--rate", str(REQUIRED_PER_SECOND / 2)),
            }


def parts() -> dict[str, float]:
    """Microseconds of one core for each part of a payment's way through the bank."""
    bank = Bank(bytes(32), 0)
    bank.apply(AdvanceSlot(1, 0))
    payer, at = Keypair(), Hash.default()
    bank.apply(Execute(bank.airdrop_transaction(payer.pubkey(), 10**15)))
    at = bank.latest_blockhash
    wires = []
    for number in range(2000):
        pay = transfer(
            TransferParams(from_pubkey=payer.pubkey(), to_pubkey=Keypair().pubkey(), lamports=1_000_000 + number)
        )
        wires.append(bytes(Transaction([payer], Message.new_with_blockhash([pay], payer.pubkey(), at), at)))

    def each(work: Callable[[bytes], object]) -> float:
        started = time.process_time()
        for wire in wires:
            work(wire)
        return (time.process_time() - started) / len(wires) * 1e6

    unsigned = each(lambda wire: bank.check(wire, signatures=False))
    checked = {wire: bank.check(wire) for wire in wires}
    return {
        "parse and check": unsigned,
        "verify the signature": each(bank.check) - unsigned,
        "preflight": each(lambda wire: bank.simulate(checked[wire])),
        "execute and record": each(lambda wire: bank.apply(Execute(wire))),
    }


def main() -> int:
    """Exit status 1 when the durable ledger misses what it is required to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="transactions per load (default: 20000)")
    parser.add_argument("--connections", type=int, default=64, help="keep-alive connections (default: 64)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if not hasattr(os, "sched_setaffinity"):
        raise SystemExit("benchmarks.ledger pins processes to cores, which only Linux lets it do")
    cores = sorted(os.sched_getaffinity(0))
    found: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": len(cores), "load": os.getloadavg()[0]},
        "durable": measure(cores, True, options.count, options.connections),
        "memory": measure(cores, False, options.count, options.connections),
        "parts_us": parts(),
    }
    print(f"load average at the start: {found['machine']['load']:.1f}; {options.connections} connections")
    print(f"{'':<26}{'per second':>12}{'p50 ms':>10}{'p99 ms':>10}{'max ms':>10}{'CPU us':>10}")
    for kind in ("durable", "memory"):
        for name, one in found[kind].items():
            print(
                f"{f'{kind}, {name}':<26}{one['per_second']:>12,.0f}{one['p50_ms']:>10.1f}"
                f"{one['p99_ms']:>10.1f}{one['max_ms']:>10.1f}{one['cpu_us']:>10.0f}"
            )
    print("microseconds per transaction in the bank:")
    for name, microseconds in found["parts_us"].items():
        print(f"  {name:<24}{microseconds:>8.1f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    rate, p99 = found["durable"]["preflight"]["per_second"], found["durable"]["half rate"]["p99_ms"]
    met = rate >= REQUIRED_PER_SECOND and p99 < REQUIRED_P99_MS
    print(
        f"required: {REQUIRED_PER_SECOND:,} per second and p99 under {REQUIRED_P99_MS:.0f} ms at half of it, durable: "
        f"{'met' if met else 'NOT met'}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
