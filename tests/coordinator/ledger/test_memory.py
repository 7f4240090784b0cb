"""No client takes more memory than an answer or a queue may have, however large the accounts are that it asks for."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ledger_process import SOL
from solders.account import Account
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from coordinator.ledger.bank import AdvanceSlot, Bank, Execute
from coordinator.ledger.dispatch import MAX_RESPONSE_BYTES, Rpc
from coordinator.ledger.endpoint import Endpoint

LARGE = 10 * 2**20
OWNER = Keypair().pubkey()


@pytest.fixture(scope="module")
def large() -> tuple[Bank, list[Pubkey]]:
    """A bank with nine accounts of the largest size: more than fits into an answer."""
    bank = Bank(bytes(32), 0)
    keys = [Keypair().pubkey() for _ in range(9)]
    for key in keys:
        bank._vm.set_account(key, Account(10**12, b"\x07" * LARGE, OWNER))
    return bank, keys


@pytest.fixture
def bounded() -> Iterator[None]:
    """What the test allocates in Python stays within a few copies of the largest answer."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * MAX_RESPONSE_BYTES


def ask(bank: Bank, method: str, *params: object) -> Any:
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    return json.loads(Rpc(bank).answer(json.dumps(body).encode()))


@pytest.mark.usefixtures("bounded")
def test_accounts_over_the_limit_are_refused_before_they_are_encoded(large: tuple[Bank, list[Pubkey]]) -> None:
    bank, keys = large
    whole = {"encoding": "base64"}
    for method, first in (
        ("getMultipleAccounts", [str(keys[0])] * 100),
        ("getMultipleAccounts", [str(key) for key in keys]),
        ("getProgramAccounts", str(OWNER)),
    ):
        error = ask(bank, method, first, whole)["error"]
        assert str(MAX_RESPONSE_BYTES) in error["message"]
        assert "dataSlice" in error["message"]


@pytest.mark.usefixtures("bounded")
def test_accounts_within_the_limit_and_slices_of_larger_ones_are_given(large: tuple[Bank, list[Pubkey]]) -> None:
    bank, keys = large
    some = ask(bank, "getMultipleAccounts", [str(key) for key in keys[:4]], {"encoding": "base64"})
    assert all(len(one["data"][0]) > LARGE for one in some["result"]["value"])
    for offset in (5, LARGE - 3, LARGE + 5):
        sliced = {"encoding": "base64", "dataSlice": {"offset": offset, "length": 3}}
        wanted = "BwcH" if offset < LARGE else ""
        found = ask(bank, "getMultipleAccounts", [str(keys[0])] * 100, sliced)
        assert [one["data"][0] for one in found["result"]["value"]] == [wanted] * 100
        assert [one["account"]["data"][0] for one in ask(bank, "getProgramAccounts", str(OWNER), sliced)["result"]] == [
            wanted
        ] * 9


class Watched:
    """A bank behind an endpoint whose disk takes as long as the test says."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.waiting: list[Callable[[], None]] = []
        self.slow = False

    def when_durable(self, function: Callable[[], None]) -> None:
        if self.slow:
            self.waiting.append(function)
        else:
            function()

    def change(self, key: Pubkey) -> None:
        """A transaction that may have written this account."""
        self.bank.apply(AdvanceSlot(self.bank.slot + 1, 0))
        self.bank.apply(Execute(self.bank.airdrop_transaction(key, SOL)))


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("windows", ["one", "many"])
def test_what_waits_for_the_disk_counts_for_a_clients_queue(large: tuple[Bank, list[Pubkey]], windows: str) -> None:
    """1,024 subscriptions to one account of 10 MiB: the client is dropped when the second text is made."""
    bank, keys = large

    async def run() -> None:
        watched = Watched(bank)
        endpoint = Endpoint(bank, watched.when_durable)
        port = await endpoint.start("127.0.0.1", 0)
        try:
            async with (
                connect(f"ws://127.0.0.1:{port + 1}", max_size=None) as greedy,
                connect(f"ws://127.0.0.1:{port + 1}", max_size=None) as modest,
            ):
                for index in range(1024):
                    window = {"offset": index if windows == "many" else 0, "length": LARGE}
                    options = {"encoding": "base64", "dataSlice": window}
                    await _subscribe(greedy, keys[0], options)
                await _subscribe(modest, keys[0], {"encoding": "base64"})
                watched.slow = True
                watched.change(keys[0])
                assert len(watched.waiting) == 2, "one text for each client"
                watched.slow = False
                for function in watched.waiting:
                    function()
                pushed = json.loads(await asyncio.wait_for(modest.recv(), 90))
                assert len(pushed["params"]["result"]["value"]["data"][0]) > LARGE
                with pytest.raises(ConnectionClosed):
                    await asyncio.wait_for(greedy.recv(), 90)
        finally:
            await endpoint.stop()

    asyncio.run(run())


async def _subscribe(socket: ClientConnection, key: Pubkey, options: object) -> None:
    await socket.send(json.dumps({"id": 1, "method": "accountSubscribe", "params": [str(key), options]}))
    assert "result" in json.loads(await socket.recv())
