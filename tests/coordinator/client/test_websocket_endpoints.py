"""Which WebSocket is used: the preferred one that works, back to it when it is well, and none that is silent."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from runs import TERMS, close, joined, limits, take_part
from solders.keypair import Keypair
from websockets.asyncio.server import ServerConnection, serve

from coordinator import pulses, subscriptions
from coordinator.client import CoordinatorClient
from coordinator.deploy import deploy
from coordinator.ledger.faults import Faults
from coordinator.ledger.server import LedgerServer
from coordinator.program import program_bytes
from coordinator.subscriptions import Subscriptions
from coordinator.urls import websocket_url

SOL = 10**9


def test_the_next_one_takes_over_and_the_preferred_one_is_returned_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "_RETURN_SECONDS", 0.1)

    async def run() -> None:
        first, second = LedgerServer(slot_ms=20), LedgerServer(slot_ms=20)
        one, two = (await first.start())[0], (await second.start())[0]
        port = int(one.rpc.rpartition(":")[2])
        client = Subscriptions([one.rpc, two.rpc])
        slots: list[object] = []
        client.subscribe("slot", [], slots.append)

        async def until(url: str) -> None:
            while client.connected_to != websocket_url(url) or not slots:
                await asyncio.sleep(0.01)
            slots.clear()
            while not slots:
                await asyncio.sleep(0.01)

        await until(one.rpc)
        await first.stop()
        await until(two.rpc)
        again = LedgerServer(slot_ms=20)
        await again.start(port=port)
        await until(one.rpc)
        await client.close()
        await again.stop()
        await second.stop()

    asyncio.run(asyncio.wait_for(run(), 300))


def test_a_connection_that_is_back_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(subscriptions, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(subscriptions, "_LONGEST_PAUSE", 0.05)
    caplog.set_level(logging.DEBUG, "coordinator.subscriptions")

    def told(words: str) -> list[str]:
        return [one.levelname for one in caplog.records if words in one.getMessage()]

    async def until(holds: Callable[[], bool]) -> None:
        while not holds():
            await asyncio.sleep(0.01)

    async def run() -> None:
        ledger = LedgerServer(slot_ms=20)
        (place,) = await ledger.start()
        client = Subscriptions([place.rpc])
        client.subscribe("slot", [], lambda value: None)
        await until(lambda: client.connected_to is not None)
        assert not told("WebSocket connected again"), "it was never away"
        await ledger.stop()
        await until(lambda: len(told("WebSocket lost")) == 5)
        again = LedgerServer(slot_ms=20)
        await again.start(port=int(place.rpc.rpartition(":")[2]))
        await until(lambda: told("WebSocket connected again") == ["INFO"])
        await client.close()
        await again.stop()

    asyncio.run(asyncio.wait_for(run(), 300))
    assert told("WebSocket lost")[:5] == ["WARNING", "WARNING", "DEBUG", "WARNING", "DEBUG"], "it stays away"


def test_a_websocket_that_says_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The preferred endpoint answers pings and takes subscriptions, but pushes nothing; polling sees the changes."""
    monkeypatch.setattr(pulses, "_MUTE_SECONDS", 0.3)
    caplog.set_level(logging.WARNING)

    async def run() -> None:
        ledger = LedgerServer(slot_ms=20, endpoints=[Faults(mute=1.0), Faults()])
        mute, well = await ledger.start()
        owner, program = Keypair(), Keypair()
        async with CoordinatorClient([well.rpc], program.pubkey(), None, owner) as founder:
            await founder.airdrop(owner.pubkey(), 100 * SOL)
            await deploy(founder, owner, program, program_bytes())
            addresses = await founder.create_run("mute", limits(total_rounds=30, rounds_per_epoch=30), TERMS)
        async with CoordinatorClient([mute.rpc, well.rpc], program.pubkey(), addresses, None) as client:
            nodes = [await joined([well.rpc], addresses.run) for _ in range(2)]
            playing = [asyncio.create_task(take_part(node)) for node in nodes]
            async for _ in client.watch():
                if client.subscriptions.connected_to == well.ws:
                    break
            await asyncio.gather(*playing)
            await close(*nodes)
        await ledger.stop()

    asyncio.run(asyncio.wait_for(run(), 300))
    assert "a change of the run was not pushed" in caplog.text


def test_a_subscription_given_up_before_it_stands_is_ended_at_the_endpoint() -> None:
    async def run() -> None:
        asked: list[dict[str, Any]] = []
        arrived, given_up, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def confirm_late(socket: ServerConnection) -> None:
            async for message in socket:
                request = json.loads(message)
                asked.append(request)
                if request["method"] == "signatureSubscribe":
                    arrived.set()
                    await given_up.wait()
                    await socket.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": 77}))
                else:
                    ended.set()

        async with serve(confirm_late, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            client = Subscriptions([f"http://127.0.0.1:{port - 1}"])
            pushes: list[object] = []
            handle = client.subscribe("signature", ["x"], pushes.append)
            await arrived.wait()
            client.unsubscribe(handle)
            given_up.set()
            await ended.wait()
            await client.close()
        assert [(one["method"], one["params"]) for one in asked] == [
            ("signatureSubscribe", ["x"]),
            ("signatureUnsubscribe", [77]),
        ]
        assert pushes == []

    asyncio.run(asyncio.wait_for(run(), 300))


def test_messages_that_make_no_sense_end_the_connection_and_nothing_else() -> None:
    client = Subscriptions(["http://127.0.0.1:9"])
    for message in (
        "[]",
        "7",
        '{"id":5}',
        '{"id":[]}',
        '{"id":{}}',
        '{"id":1e999}',
        '{"params":7}',
        '{"params":{"subscription":[]}}',
        '{"id":1,"result":{}}',
    ):
        client._read(message)
    for message in ("{", "[" * 5000, b"\xff"):
        with pytest.raises(ValueError, match=r"."):
            client._read(message)
    assert client.received > 0
