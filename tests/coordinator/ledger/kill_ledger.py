"""Kill a ledger under load at random instants, again and again, and compare it with a twin that never was.

`python tests/coordinator/ledger/kill_ledger.py [KILLS] [SEED]` prints what it did; exit status 1 if anything was lost.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from solders.hash import Hash
from solders.keypair import Keypair
from solders.message import Message
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer
from solders.transaction import Transaction

from coordinator.ledger.bank import Bank
from coordinator.ledger.logfile import changes_of, log_files, read_log
from coordinator.ledger.snapshot import state_hash
from coordinator.ledger.store import Store

SOL = 10**9
CLIENTS = 8
SNAPSHOT_EVERY = 700
# Kills come within these seconds of so many transactions, every fourth while the ledger is starting.
BEFORE_A_KILL = 25
LOAD_SECONDS = 0.8
START_SECONDS = 1.2


@dataclass
class Sent:
    """What the clients know: transactions that were answered, as (signature, wire)."""

    acknowledged: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Report:
    kills: int = 0
    kills_while_starting: int = 0
    acknowledged: int = 0
    replays_refused: int = 0
    slowest_start_s: float = 0.0
    failures: list[str] = field(default_factory=list)


class Twin:
    """A bank that executes every change in the log, once, and is never killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with Store(folder, 0) as store:
            self.bank: Bank = store.genesis.bank()
        self._index = 0

    def follow(self) -> None:
        for path in log_files(self._folder):
            found = read_log(path)
            for first, _, payload in found.frames:
                for number, change in enumerate(changes_of(payload), first):
                    if number >= self._index:
                        assert number == self._index, "a change is missing from the log"
                        self.bank.apply(change)
                        self._index += 1


async def post(client: httpx2.AsyncClient, rpc: str, method: str, *params: object) -> Any:
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}
    return (await client.post(rpc, json=body)).json()


async def load(rpc: str, payers: list[Keypair], sent: Sent, started: asyncio.Event) -> None:
    """Clients that send payments as fast as they are answered, until the connection breaks."""

    async def one(payer: Keypair, number: int) -> None:
        async with httpx2.AsyncClient(timeout=90) as client:
            count = 0
            at: Hash | None = None
            while True:
                if at is None or count % 20 == 0:
                    latest = await post(client, rpc, "getLatestBlockhash")
                    at = Hash.from_string(latest["result"]["value"]["blockhash"])
                count += 1
                lamports = 1_000_000 + count * CLIENTS + number
                made = transfer(
                    TransferParams(from_pubkey=payer.pubkey(), to_pubkey=Pubkey.new_unique(), lamports=lamports)
                )
                signed = Transaction([payer], Message.new_with_blockhash([made], payer.pubkey(), at), at)
                wire = base64.b64encode(bytes(signed)).decode()
                answer = await post(client, rpc, "sendTransaction", wire, {"encoding": "base64"})
                if answer.get("error", {}).get("data", {}).get("err") == "BlockhashNotFound":
                    at = None  # this machine stood still for longer than a blockhash lasts
                    continue
                assert answer["result"] == str(signed.signatures[0]), answer
                sent.acknowledged.append((answer["result"], wire))
                if len(sent.acknowledged) >= BEFORE_A_KILL:
                    started.set()

    async def until_it_ends(payer: Keypair, number: int) -> None:
        with contextlib.suppress(httpx2.TransportError):
            await one(payer, number)

    await asyncio.gather(*(until_it_ends(payer, number) for number, payer in enumerate(payers)))


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "coordinator.ledger", "run", "--port", "0", "--slot-ms", "20", "--keep-log"]
    command += ["--dir", str(folder), "--snapshot-every", str(SNAPSHOT_EVERY)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


async def everything_is_there(rpc: str, sent: Sent, report: Report) -> None:
    async with httpx2.AsyncClient(timeout=90) as client:
        signatures = [signature for signature, _ in sent.acknowledged]
        for first in range(0, len(signatures), 256):
            part = signatures[first : first + 256]
            statuses = (await post(client, rpc, "getSignatureStatuses", part))["result"]["value"]
            report.failures += [f"{s} is lost" for s, status in zip(part, statuses, strict=True) if status is None]
        for signature, wire in sent.acknowledged[-20:]:
            answer = await post(client, rpc, "sendTransaction", wire, {"encoding": "base64"})
            if answer.get("error", {}).get("data", {}).get("err") not in ("AlreadyProcessed", "BlockhashNotFound"):
                report.failures.append(f"{signature} was not refused when it was sent again: {answer}")
            report.replays_refused += 1


async def torture(folder: Path, kills: int, seed: int) -> Report:
    """Kill the ledger in `folder` `kills` times. Nothing in the report's `failures`: nothing was lost."""
    chance, report, payers = random.Random(seed), Report(), [Keypair() for _ in range(CLIENTS)]
    sent = Sent()
    twin: Twin | None = None
    while True:
        began = time.perf_counter()
        process = start(folder)
        if report.kills and report.kills % 4 == 0 and report.kills_while_starting < report.kills // 4:
            time.sleep(chance.uniform(0, START_SECONDS))  # the instant of the kill, not a wait for something
            kill(process)
            report.kills += 1
            report.kills_while_starting += 1
            continue
        assert process.stdout is not None
        try:
            rpc = json.loads(process.stdout.readline())["rpc"]
            report.slowest_start_s = max(report.slowest_start_s, time.perf_counter() - began)
            await everything_is_there(rpc, sent, report)
            report.acknowledged += len(sent.acknowledged)
            sent = Sent()
            if report.kills >= kills:
                return report
            async with httpx2.AsyncClient(timeout=90) as client:
                for payer in payers:
                    await post(client, rpc, "requestAirdrop", str(payer.pubkey()), 1000 * SOL)
            started = asyncio.Event()
            clients = asyncio.create_task(load(rpc, payers, sent, started))
            await asyncio.wait_for(started.wait(), 90)
            await asyncio.sleep(chance.uniform(0, LOAD_SECONDS))
            process.send_signal(signal.SIGKILL)
            await clients
        finally:
            kill(process)
        report.kills += 1
        twin = twin or Twin(folder)
        twin.follow()
        with Store(folder, 0) as store:
            if state_hash(store.open().bank.capture()) != state_hash(twin.bank.capture()):
                report.failures.append(f"after kill {report.kills} the state is not the twin's")


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(torture(Path(folder) / "ledger", kills, seed))
    print(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
