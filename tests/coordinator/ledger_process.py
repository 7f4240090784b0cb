"""A ledger as a process, and plain JSON-RPC calls to it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from typing import Any

from solders.hash import Hash
from solders.keypair import Keypair
from solders.message import Message
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer
from solders.transaction import Transaction

SOL = 10**9


@dataclass(frozen=True)
class Ledger:
    """A running ledger."""

    rpc: str
    ws: str
    process: subprocess.Popen[str]

    @property
    def port(self) -> int:
        return int(self.rpc.rpartition(":")[2])


def start_ledger(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "coordinator.ledger", "run", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def call(ledger: Ledger, method: str, *params: object) -> Any:
    """The whole answer to one request."""
    return post(ledger, {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)})


def post(ledger: Ledger, body: object) -> Any:
    request = urllib.request.Request(ledger.rpc, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=90) as response:
        return json.loads(response.read())


def blockhash(ledger: Ledger) -> Hash:
    return Hash.from_string(call(ledger, "getLatestBlockhash")["result"]["value"]["blockhash"])


def funded(ledger: Ledger, lamports: int = 10 * SOL) -> Keypair:
    wallet = Keypair()
    assert "result" in call(ledger, "requestAirdrop", str(wallet.pubkey()), lamports)
    return wallet


def payment(ledger: Ledger, payer: Keypair, to: Pubkey, lamports: int, at: Hash | None = None) -> Transaction:
    at = at or blockhash(ledger)
    made = transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=to, lamports=lamports))
    return Transaction([payer], Message.new_with_blockhash([made], payer.pubkey(), at), at)


def encoded(transaction: Transaction) -> str:
    return base64.b64encode(bytes(transaction)).decode()


def send(ledger: Ledger, transaction: Transaction, **options: object) -> Any:
    return call(ledger, "sendTransaction", encoded(transaction), {"encoding": "base64", **options})
