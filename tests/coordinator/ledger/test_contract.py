"""What clients rely on, in one suite over `psyche-ledger` and, with `make contract-surfpool`, over Surfpool as well.

Surfpool is a Solana validator stand-in by others, with an RPC of its own: what passes over both is Solana's contract
and not this ledger's idea of it.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from ledger_process import SOL, Ledger
from solana.rpc.async_api import AsyncClient
from solders.hash import Hash
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.message import Message
from solders.pubkey import Pubkey
from solders.system_program import CreateAccountParams, TransferParams, create_account, transfer
from solders.transaction import Transaction
from websockets.asyncio.client import ClientConnection, connect

MODULES = os.environ.get("PSYCHE_CONTRACT_MODULES")
"""A folder with node_modules of @solana/surfpool-linux-x64-gnu and @solana/web3.js: see `make contract-surfpool`."""
SECONDS = 120.0


@dataclass(frozen=True)
class Cluster:
    rpc: str
    ws: str


@pytest.fixture(scope="module", params=["psyche-ledger", "surfpool"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if request.param == "psyche-ledger":
        ledger: Ledger = request.getfixturevalue("ledger")
        yield Cluster(ledger.rpc, ledger.ws)
        return
    if MODULES is None:
        pytest.skip("Surfpool needs node and npm: `make contract-surfpool` installs it and runs this")
    script = Path(__file__).with_name("surfpool.cjs")
    environment = {**os.environ, "NODE_PATH": str(Path(MODULES).resolve() / "node_modules")}
    process = subprocess.Popen(
        ["node", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        urls = json.loads(process.stdout.readline())
        yield Cluster(urls["rpc"], urls["ws"])
    finally:
        process.communicate(timeout=90)


class Client:
    """Plain JSON-RPC, as any tool speaks it."""

    def __init__(self, cluster: Cluster, http: httpx2.AsyncClient) -> None:
        self._cluster = cluster
        self._http = http

    async def call(self, method: str, *params: object) -> Any:
        body = {"jsonrpc": "2.0", "id": 7, "method": method, "params": list(params)}
        answer = (await self._http.post(self._cluster.rpc, json=body)).json()
        assert answer["id"] == 7
        assert answer["jsonrpc"] == "2.0"
        return answer

    async def result(self, method: str, *params: object) -> Any:
        answer = await self.call(method, *params)
        assert "result" in answer, answer
        return answer["result"]

    async def blockhash(self) -> Hash:
        return Hash.from_string((await self.result("getLatestBlockhash"))["value"]["blockhash"])

    async def signed(
        self, payer: Keypair, *instructions: Instruction, signers: tuple[Keypair, ...] = ()
    ) -> Transaction:
        at = await self.blockhash()
        message = Message.new_with_blockhash(list(instructions), payer.pubkey(), at)
        return Transaction([payer, *signers], message, at)

    async def send(self, transaction: Transaction, **options: object) -> Any:
        return await self.call("sendTransaction", encoded(transaction), {"encoding": "base64", **options})

    async def confirmed(self, signature: str) -> Any:
        for _ in range(int(SECONDS * 20)):
            [status] = (await self.result("getSignatureStatuses", [signature]))["value"]
            if status is not None and status["confirmationStatus"] in ("confirmed", "finalized"):
                return status
            await asyncio.sleep(0.05)
        raise AssertionError(f"{signature} was not confirmed")

    async def land(self, transaction: Transaction) -> Any:
        answer = await self.send(transaction, preflightCommitment="confirmed")
        assert answer.get("result") == str(transaction.signatures[0]), answer
        return await self.confirmed(answer["result"])

    async def funded(self, lamports: int = 10 * SOL) -> Keypair:
        wallet = Keypair()
        await self.confirmed(await self.result("requestAirdrop", str(wallet.pubkey()), lamports))
        return wallet


def encoded(transaction: Transaction) -> str:
    return base64.b64encode(bytes(transaction)).decode()


def pay(payer: Keypair, to: Pubkey, lamports: int) -> Instruction:
    return transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=to, lamports=lamports))


def over(cluster: Cluster, test: Callable[[Client], Awaitable[None]]) -> None:
    async def run() -> None:
        async with httpx2.AsyncClient(timeout=SECONDS) as http:
            await test(Client(cluster, http))

    asyncio.run(asyncio.wait_for(run(), 3 * SECONDS))


def test_the_chain_is_described(cluster: Cluster) -> None:
    async def test(client: Client) -> None:
        assert await client.result("getHealth") == "ok"
        assert (await client.result("getVersion"))["solana-core"]
        newest = {"commitment": "processed"}
        info = await client.result("getEpochInfo", newest)
        assert info["absoluteSlot"] >= info["blockHeight"] >= 0
        assert await client.result("getSlot", newest) >= info["absoluteSlot"]
        assert await client.result("getBlockHeight", newest) >= info["blockHeight"]
        assert (await client.result("getEpochSchedule"))["slotsPerEpoch"] == info["slotsInEpoch"]
        latest = await client.result("getLatestBlockhash")
        assert latest["context"]["slot"] > 0
        assert latest["value"]["lastValidBlockHeight"] > info["blockHeight"]
        assert (await client.result("isBlockhashValid", latest["value"]["blockhash"]))["value"] is True
        assert (await client.result("isBlockhashValid", str(Hash.new_unique())))["value"] is False
        assert await client.result("getMinimumBalanceForRentExemption", 100) == 1_586_880
        for fee in await client.result("getRecentPrioritizationFees"):
            assert fee["prioritizationFee"] >= 0
        assert len(await client.result("getSlotLeaders", info["absoluteSlot"], 3)) in (1, 3)  # Surfpool: always one
        Pubkey.from_string(await client.result("getSlotLeader"))
        assert (await client.call("getNonsense"))["error"]["code"] == -32601
        assert (await client.call("getBalance", "x"))["error"]["code"] == -32602

    over(cluster, test)


def test_a_payment_is_sent_confirmed_and_found(cluster: Cluster) -> None:
    async def test(client: Client) -> None:
        payer, to = await client.funded(), Keypair().pubkey()
        sent = await client.signed(payer, pay(payer, to, SOL))
        status = await client.land(sent)
        assert status["err"] is None
        assert status["status"] == {"Ok": None}
        signature = str(sent.signatures[0])
        assert (await client.result("getBalance", str(to)))["value"] == SOL
        assert (await client.result("getBalance", str(payer.pubkey())))["value"] == 9 * SOL - 5000
        options = {"commitment": "confirmed", "maxSupportedTransactionVersion": 0}
        found = await client.result("getTransaction", signature, {**options, "encoding": "json"})
        assert found["slot"] == status["slot"]
        assert found["transaction"]["signatures"] == [signature]
        assert str(to) in found["transaction"]["message"]["accountKeys"]
        meta = found["meta"]
        assert (meta["err"], meta["fee"]) == (None, 5000)
        assert meta["postBalances"][:2] == [9 * SOL - 5000, SOL]
        assert meta["logMessages"][-1].endswith("success")
        raw = await client.result("getTransaction", signature, {**options, "encoding": "base64"})
        assert base64.b64decode(raw["transaction"][0]) == bytes(sent)
        history = await client.result("getSignaturesForAddress", str(payer.pubkey()), {"commitment": "confirmed"})
        assert history[0]["signature"] == signature
        assert history[0]["err"] is None

    over(cluster, test)


def test_what_cannot_run_is_refused_with_solanas_errors(cluster: Cluster) -> None:
    async def test(client: Client) -> None:
        payer = await client.funded()
        balance = (await client.result("getBalance", str(payer.pubkey())))["value"]
        broke = await client.send(await client.signed(payer, pay(payer, Keypair().pubkey(), 100 * SOL)))
        assert broke["error"]["code"] == -32002
        assert broke["error"]["data"]["err"] == {"InstructionError": [0, {"Custom": 1}]}
        assert "custom program error: 0x1" in broke["error"]["message"]
        good = await client.signed(payer, pay(payer, Keypair().pubkey(), SOL))
        forged = Transaction.populate(good.message, [Keypair().sign_message(bytes(good.message))])
        assert "error" in await client.send(forged)
        unknown = Message.new_with_blockhash([pay(payer, Keypair().pubkey(), 1)], payer.pubkey(), Hash.new_unique())
        stale = await client.send(Transaction([payer], unknown, unknown.recent_blockhash))
        assert stale["error"]["data"]["err"] == "BlockhashNotFound"
        many = [pay(payer, Keypair().pubkey(), SOL // 100) for _ in range(25)]
        large = await client.signed(payer, *many)
        assert len(bytes(large)) > 1232
        assert "error" in await client.send(large)
        poor = await client.send(await client.signed(payer, pay(payer, Keypair().pubkey(), 100)))
        assert poor["error"]["data"]["err"] == {"InsufficientFundsForRent": {"account_index": 1}}
        assert (await client.result("getBalance", str(payer.pubkey())))["value"] == balance

    over(cluster, test)


def test_a_transaction_counts_once(cluster: Cluster) -> None:
    async def test(client: Client) -> None:
        payer, to = await client.funded(), Keypair().pubkey()
        once = await client.signed(payer, pay(payer, to, SOL))
        await client.land(once)
        again = await client.send(once)
        assert again["error"]["code"] == -32002
        assert "already been processed" in again["error"]["message"]
        assert (await client.result("getBalance", str(to)))["value"] == SOL

    over(cluster, test)


async def opened(client: Client, payer: Keypair, owner: Pubkey, space: int) -> Keypair:
    made = Keypair()
    instruction = create_account(
        CreateAccountParams(
            from_pubkey=payer.pubkey(), to_pubkey=made.pubkey(), lamports=SOL // 10, space=space, owner=owner
        )
    )
    await client.land(await client.signed(payer, instruction, signers=(made,)))
    return made


def test_accounts_are_read_whole_in_part_and_by_their_program(cluster: Cluster) -> None:
    async def test(client: Client) -> None:
        payer, owner = await client.funded(), Keypair().pubkey()
        small, large = [(await opened(client, payer, owner, space)).pubkey() for space in (10, 300)]
        account = (await client.result("getAccountInfo", str(large), {"encoding": "base64"}))["value"]
        assert account["owner"] == str(owner)
        assert (account["lamports"], account["space"], account["executable"]) == (SOL // 10, 300, False)
        assert account["data"] == [base64.b64encode(bytes(300)).decode(), "base64"]
        part = {"encoding": "base64", "dataSlice": {"offset": 295, "length": 3}}
        sliced = (await client.result("getAccountInfo", str(large), part))["value"]
        assert sliced["data"] == [base64.b64encode(bytes(3)).decode(), "base64"]
        nobody = str(Keypair().pubkey())
        several = (await client.result("getMultipleAccounts", [str(small), nobody], {"encoding": "base64"}))["value"]
        assert several[0]["space"] == 10
        assert several[1] is None

        async def found(**options: object) -> list[str]:
            answer = await client.result("getProgramAccounts", str(owner), {"encoding": "base64", **options})
            return sorted(one["pubkey"] for one in answer)

        assert await found() == sorted([str(small), str(large)])
        assert await found(filters=[{"dataSize": 300}]) == [str(large)]
        assert await found(filters=[{"memcmp": {"offset": 200, "bytes": "11"}}]) == [str(large)]
        assert await found(filters=[{"memcmp": {"offset": 2, "bytes": "12"}}]) == []
        narrow = {"encoding": "base64", "dataSlice": {"offset": 0, "length": 4}}
        for one in await client.result("getProgramAccounts", str(owner), narrow):
            assert one["account"]["data"] == [base64.b64encode(bytes(4)).decode(), "base64"]

    over(cluster, test)


def test_simulation_tells_everything_and_changes_nothing(cluster: Cluster) -> None:
    async def test(client: Client) -> None:
        payer, to = await client.funded(), Keypair().pubkey()
        message = Message.new_with_blockhash([pay(payer, to, SOL)], payer.pubkey(), Hash.new_unique())
        wire = encoded(Transaction([payer], message, message.recent_blockhash))
        options = {
            "encoding": "base64",
            "replaceRecentBlockhash": True,
            "accounts": {"encoding": "base64", "addresses": [str(to)]},
        }
        value = (await client.result("simulateTransaction", wire, options))["value"]
        assert value["err"] is None
        assert value["unitsConsumed"] == 150
        assert value["logs"][-1].endswith("success")
        assert value["accounts"][0]["lamports"] == SOL
        assert value["replacementBlockhash"]["blockhash"]
        assert (await client.result("getBalance", str(to)))["value"] == 0
        stale = (await client.result("simulateTransaction", wire, {"encoding": "base64"}))["value"]
        assert stale["err"] == "BlockhashNotFound"

    over(cluster, test)


class Socket:
    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._identities = itertools.count(1)
        self._pushed: list[Any] = []

    async def subscribe(self, method: str, *params: object) -> int:
        identity = next(self._identities)
        await self._socket.send(json.dumps({"jsonrpc": "2.0", "id": identity, "method": method, "params": params}))
        while True:
            message = json.loads(await asyncio.wait_for(self._socket.recv(), SECONDS))
            if message.get("id") == identity:
                assert "result" in message, message
                return message["result"]
            self._pushed.append(message)

    async def pushed(self, subscription: int) -> Any:
        """The next notification of a subscription."""
        for index, message in enumerate(self._pushed):
            if message["params"]["subscription"] == subscription:
                return self._pushed.pop(index)["params"]["result"]
        while True:
            message = json.loads(await asyncio.wait_for(self._socket.recv(), SECONDS))
            if message["params"]["subscription"] == subscription:
                return message["params"]["result"]
            self._pushed.append(message)


@asynccontextmanager
async def socket_to(cluster: Cluster) -> AsyncIterator[Socket]:
    async with connect(cluster.ws) as socket:
        yield Socket(socket)


def test_subscriptions_push_what_happens(cluster: Cluster) -> None:
    async def test(client: Client) -> None:
        payer, to = await client.funded(), Keypair().pubkey()
        at_least = {"commitment": "confirmed"}
        async with socket_to(cluster) as socket:
            account = await socket.subscribe("accountSubscribe", str(to), {"encoding": "base64", **at_least})
            logs = await socket.subscribe("logsSubscribe", {"mentions": [str(to)]}, at_least)
            slot = await socket.subscribe("slotSubscribe")
            sent = await client.signed(payer, pay(payer, to, SOL))
            signature = await socket.subscribe("signatureSubscribe", str(sent.signatures[0]), at_least)
            await client.land(sent)
            assert (await socket.pushed(signature))["value"] == {"err": None}
            told = (await socket.pushed(logs))["value"]
            assert (told["signature"], told["err"]) == (str(sent.signatures[0]), None)
            assert (await socket.pushed(account))["value"]["lamports"] == SOL
            first, second = await socket.pushed(slot), await socket.pushed(slot)
            assert second["slot"] > first["slot"] >= first["parent"] >= first["root"]
            for kind, subscription in (("account", account), ("logs", logs), ("slot", slot)):
                assert await socket.subscribe(f"{kind}Unsubscribe", subscription) is True

    over(cluster, test)


def test_a_program_subscription_has_filters_and_slices(cluster: Cluster) -> None:
    async def test(client: Client) -> None:
        payer, owner = await client.funded(), Keypair().pubkey()
        options = {"encoding": "base64", "commitment": "confirmed"}
        async with socket_to(cluster) as socket:
            large = await socket.subscribe("programSubscribe", str(owner), {**options, "filters": [{"dataSize": 300}]})
            await opened(client, payer, owner, 10)
            made = await opened(client, payer, owner, 300)
            value = (await socket.pushed(large))["value"]
            assert value["pubkey"] == str(made.pubkey())
            assert value["account"]["space"] == 300

    over(cluster, test)


def test_solana_py_confirms(cluster: Cluster) -> None:
    async def test(client: Client) -> None:
        payer = await client.funded()
        async with AsyncClient(cluster.rpc) as solana:
            assert await solana.is_connected()
            latest = (await solana.get_latest_blockhash()).value
            message = Message.new_with_blockhash(
                [pay(payer, Keypair().pubkey(), SOL)], payer.pubkey(), latest.blockhash
            )
            sent = await solana.send_transaction(Transaction([payer], message, latest.blockhash))
            await solana.confirm_transaction(sent.value, last_valid_block_height=latest.last_valid_block_height)
            found = (await solana.get_transaction(sent.value, max_supported_transaction_version=0)).value
            assert found is not None

    over(cluster, test)


def test_web3_js_sends_confirms_and_subscribes(cluster: Cluster) -> None:
    if MODULES is None:
        pytest.skip("@solana/web3.js needs node and npm: `make contract-surfpool` installs it and runs this")
    script = Path(__file__).with_name("web3_client.cjs")
    environment = {**os.environ, "NODE_PATH": str(Path(MODULES).resolve() / "node_modules")}
    done = subprocess.run(
        ["node", str(script), cluster.rpc, cluster.ws], capture_output=True, text=True, timeout=500, env=environment
    )
    assert done.returncode == 0, done.stderr
