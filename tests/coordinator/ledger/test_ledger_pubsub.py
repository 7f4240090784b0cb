"""Solana's WebSocket subscriptions over the real process."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any, Self

import pytest
from ledger_process import SOL, Ledger, call, funded, payment, send
from solana.rpc.websocket_api import SolanaWsClient
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.rpc.responses import AccountNotification, SlotNotification
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed


class Socket:
    """A WebSocket client that keeps answers and notifications apart."""

    def __init__(self, ledger: Ledger) -> None:
        self._connect = connect(ledger.ws)
        self._identities = itertools.count(1)
        self.pushed: list[Any] = []

    async def __aenter__(self) -> Self:
        self._socket: ClientConnection = await self._connect.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._connect.__aexit__(*error)

    async def request(self, method: str, *params: object) -> Any:
        identity = next(self._identities)
        await self._socket.send(json.dumps({"jsonrpc": "2.0", "id": identity, "method": method, "params": params}))
        while True:
            message = json.loads(await asyncio.wait_for(self._socket.recv(), 90))
            if message.get("id") == identity:
                return message["result"]
            self.pushed.append(message)

    async def push(self) -> Any:
        """The next notification's method, subscription and result."""
        message = self.pushed.pop(0) if self.pushed else json.loads(await asyncio.wait_for(self._socket.recv(), 90))
        return message["method"], message["params"]["subscription"], message["params"]["result"]


def test_account_changes_are_pushed_in_the_form_asked_for(ledger: Ledger) -> None:
    async def run() -> None:
        payer, to = funded(ledger), Keypair().pubkey()
        async with Socket(ledger) as socket:
            plain = await socket.request("accountSubscribe", str(to), {"encoding": "base64", "commitment": "confirmed"})
            other = await socket.request("accountSubscribe", str(to), {"encoding": "base58"})
            await socket.request("accountSubscribe", str(Keypair().pubkey()), {"encoding": "base64"})
            before = call(ledger, "getSlot")["result"]
            send(ledger, payment(ledger, payer, to, SOL))
            found = {subscription: result for _, subscription, result in [await socket.push(), await socket.push()]}
            assert found[plain]["value"]["lamports"] == SOL
            assert found[plain]["value"]["data"] == ["", "base64"]
            assert found[plain]["context"]["slot"] >= before
            assert found[other]["value"]["data"] == ["", "base58"]
            assert await socket.request("accountUnsubscribe", plain) is True
            assert await socket.request("accountUnsubscribe", other) is True
            send(ledger, payment(ledger, payer, to, SOL))
            await socket.request("slotSubscribe")
            assert {(await socket.push())[0] for _ in range(3)} == {"slotNotification"}

    asyncio.run(run())


def test_a_signature_is_pushed_once_with_its_error_also_when_it_is_late(ledger: Ledger) -> None:
    async def run() -> None:
        payer = funded(ledger)
        good = payment(ledger, payer, Keypair().pubkey(), SOL)
        bad = payment(ledger, payer, Keypair().pubkey(), 100 * SOL)
        async with Socket(ledger) as socket:
            await socket.request("signatureSubscribe", str(good.signatures[0]))
            send(ledger, good)
            assert (await socket.push())[2]["value"] == {"err": None}
            send(ledger, bad, skipPreflight=True)
            late = await socket.request("signatureSubscribe", str(bad.signatures[0]), {"commitment": "finalized"})
            kind, subscription, result = await socket.push()
            assert (kind, subscription) == ("signatureNotification", late)
            assert result["value"] == {"err": {"InstructionError": [0, {"Custom": 1}]}}

    asyncio.run(run())


def test_logs_are_pushed_by_the_accounts_they_mention(ledger: Ledger) -> None:
    async def run() -> None:
        payer, to = funded(ledger), Keypair().pubkey()
        async with Socket(ledger) as socket:
            mine = await socket.request("logsSubscribe", {"mentions": [str(to)]}, {"commitment": "confirmed"})
            sent = payment(ledger, payer, to, SOL)
            send(ledger, payment(ledger, payer, Keypair().pubkey(), SOL))
            send(ledger, sent)
            kind, subscription, result = await socket.push()
            assert (kind, subscription) == ("logsNotification", mine)
            assert result["value"]["signature"] == str(sent.signatures[0])
            assert result["value"]["logs"][0].endswith("invoke [1]")

    asyncio.run(run())


def test_program_accounts_are_pushed_through_their_filters(ledger: Ledger) -> None:
    async def run() -> None:
        payer, to = funded(ledger), Keypair().pubkey()
        system = str(Pubkey.default())
        async with Socket(ledger) as socket:
            await socket.request("programSubscribe", system, {"encoding": "base64", "filters": [{"dataSize": 1}]})
            every = await socket.request("programSubscribe", system, {"encoding": "base64"})
            send(ledger, payment(ledger, payer, to, SOL))
            pushes = [await socket.push(), await socket.push()]
            assert {subscription for _, subscription, _ in pushes} == {every}
            assert {result["value"]["pubkey"] for _, _, result in pushes} == {str(payer.pubkey()), str(to)}

    asyncio.run(run())


def test_solana_py_subscribes(ledger: Ledger) -> None:
    async def run() -> None:
        payer, to = funded(ledger), Keypair().pubkey()
        async with SolanaWsClient(ledger.ws) as client:
            slots = await client.slot_subscribe()
            first, second = await client.recv(), await client.recv()
            assert isinstance(first, SlotNotification)
            assert isinstance(second, SlotNotification)
            assert second.result.slot > first.result.slot
            await client.unsubscribe(slots)
            account = await client.account_subscribe(pubkey=to, encoding="base64")
            send(ledger, payment(ledger, payer, to, SOL))
            pushed = await client.recv()
            while not isinstance(pushed, AccountNotification):
                pushed = await client.recv()
            assert pushed.result.value.lamports == SOL
            assert pushed.subscription == account.subscription_id

    asyncio.run(run())


def test_a_client_that_does_not_read_is_dropped_and_holds_up_nobody(ledger: Ledger) -> None:
    """It subscribes to far more than it takes; the others are answered all the while."""

    async def run() -> None:
        payer = funded(ledger, 1000 * SOL)
        async with connect(ledger.ws, max_queue=1) as lazy:
            for identity in range(500):
                body = {"id": identity, "method": "accountSubscribe", "params": [str(payer.pubkey())]}
                await lazy.send(json.dumps(body))
            while json.loads(await lazy.recv()).get("id") != 499:
                pass
            for index in range(60):  # 500 messages each: many times what is queued for one client
                answer = send(ledger, payment(ledger, payer, Keypair().pubkey(), SOL + index))
                assert "result" in answer
            assert call(ledger, "getHealth")["result"] == "ok"
            with pytest.raises(ConnectionClosed):
                await _read_all(lazy)

    asyncio.run(asyncio.wait_for(run(), 60))


async def _read_all(socket: ClientConnection) -> None:
    while True:
        await socket.recv()


def test_roots_are_pushed_and_slices_of_accounts(ledger: Ledger) -> None:
    async def run() -> None:
        payer, to = funded(ledger), Keypair().pubkey()
        async with Socket(ledger) as socket:
            await socket.request("rootSubscribe")
            first, second = (await socket.push())[2], (await socket.push())[2]
            assert second > first
        async with Socket(ledger) as socket:
            whole = {"encoding": "base64", "dataSlice": {"offset": 0, "length": 4}}
            await socket.request("accountSubscribe", "SysvarC1ock11111111111111111111111111111111", whole)
            sliced = await socket.request("accountSubscribe", str(to), whole)
            send(ledger, payment(ledger, payer, to, SOL))
            _, subscription, result = await socket.push()
            assert subscription == sliced
            assert result["value"]["data"] == ["", "base64"]

    asyncio.run(run())
