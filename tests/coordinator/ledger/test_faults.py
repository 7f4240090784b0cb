"""Every fault does what its setting says, seen from a client, and the same seed gives the same faults."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from ledger_process import SOL
from solders.keypair import Keypair
from solders.message import Message
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer
from solders.transaction import Transaction
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidMessage

from coordinator.ledger.bank import AdvanceSlot, Bank, Execute
from coordinator.ledger.clock import keep_time
from coordinator.ledger.endpoint import Endpoint
from coordinator.ledger.faults import BadFaults, Chance, Faults, parse_faults
from coordinator.ledger.lagging import Lagging

GENESIS = bytes(32)


def at_once(function: Callable[[], None]) -> None:
    function()


class World:
    """A bank whose slots the test moves, behind one endpoint with faults."""

    def __init__(self, bank: Bank, rpc: str, ws: str, client: httpx2.AsyncClient) -> None:
        self.bank = bank
        self.rpc = rpc
        self.ws = ws
        self.client = client
        self.payer = Keypair()
        bank.apply(AdvanceSlot(bank.slot + 1, 0))
        bank.apply(Execute(bank.airdrop_transaction(self.payer.pubkey(), 100 * SOL)))

    def advance(self, slots: int = 1) -> None:
        for _ in range(slots):
            self.bank.apply(AdvanceSlot(self.bank.slot + 1, 0))

    async def post(self, method: str, *params: object) -> httpx2.Response:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}
        return await self.client.post(self.rpc, json=body)

    async def call(self, method: str, *params: object) -> Any:
        return (await self.post(method, *params)).json()

    def payment(self, to: Pubkey, lamports: int = SOL) -> Transaction:
        made = transfer(TransferParams(from_pubkey=self.payer.pubkey(), to_pubkey=to, lamports=lamports))
        at = self.bank.latest_blockhash
        return Transaction([self.payer], Message.new_with_blockhash([made], self.payer.pubkey(), at), at)

    async def send(self, transaction: Transaction, **options: object) -> Any:
        wire = base64.b64encode(bytes(transaction)).decode()
        return await self.call("sendTransaction", wire, {"encoding": "base64", **options})


@contextlib.asynccontextmanager
async def served(faults: Faults) -> AsyncIterator[World]:
    bank = Bank(GENESIS, 0)
    lagging = Lagging(bank, Bank(GENESIS, 0), faults.stale_slots).bank if faults.stale else None
    endpoint = Endpoint(bank, at_once, faults, lagging)
    port = await endpoint.start("127.0.0.1", 0)
    try:
        async with httpx2.AsyncClient(timeout=90) as client:
            yield World(bank, f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port + 1}", client)
    finally:
        await endpoint.stop()


def under(faults: Faults, test: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        async with served(faults) as world:
            await test(world)

    asyncio.run(asyncio.wait_for(run(), 90))


def test_without_faults_nothing_goes_wrong() -> None:
    async def test(world: World) -> None:
        to = Keypair().pubkey()
        assert "result" in await world.send(world.payment(to))
        assert world.bank.balance(to) == SOL

    under(Faults(), test)


def test_a_lost_transaction_is_answered_and_never_lands() -> None:
    async def test(world: World) -> None:
        landed = []
        for index in range(20):
            to = Keypair().pubkey()
            sent = world.payment(to, SOL + index)
            assert (await world.send(sent))["result"] == str(sent.signatures[0])
            landed.append(world.bank.balance(to) > 0)
        assert 3 < sum(landed) < 17
        again = Keypair().pubkey()
        resent = world.payment(again)
        while not world.bank.balance(again):  # not lost for good: each sending has its own chance
            assert "result" in await world.send(resent)
        # A refused transaction is still refused.
        assert "error" in await world.send(world.payment(again, 1000 * SOL))

    under(Faults(lose=0.5, seed=3), test)


def test_a_duplicated_transaction_lands_once_and_says_that_it_was_there_already() -> None:
    async def test(world: World) -> None:
        to = Keypair().pubkey()
        answer = await world.send(world.payment(to))
        assert answer["error"]["data"]["err"] == "AlreadyProcessed"
        assert world.bank.balance(to) == SOL
        quiet = world.payment(to, 2 * SOL)
        assert (await world.send(quiet, skipPreflight=True))["result"] == str(quiet.signatures[0])
        assert world.bank.balance(to) == 3 * SOL

    under(Faults(duplicate=1.0), test)


@pytest.mark.parametrize(
    ("faults", "status"),
    [(Faults(too_many=1.0, retry_after_s=7), 429), (Faults(unavailable=1.0), 503)],
)
def test_http_errors_change_nothing(faults: Faults, status: int) -> None:
    async def test(world: World) -> None:
        to = Keypair().pubkey()
        wire = base64.b64encode(bytes(world.payment(to))).decode()
        response = await world.post("sendTransaction", wire, {"encoding": "base64"})
        assert response.status_code == status
        assert response.headers.get("retry-after") == ("7" if status == 429 else None)
        assert world.bank.balance(to) == 0

    under(faults, test)


def test_a_rate_limit_refuses_what_is_over_it() -> None:
    async def test(world: World) -> None:
        answers = [(await world.post("getSlot")).status_code for _ in range(20)]
        assert answers == [200] + [429] * 19

    # One a quarter of an hour: however slow this machine is, there is no second one.
    under(Faults(requests_per_second=0.001), test)


def test_a_rate_is_one_of_each_second() -> None:
    chance = Chance(Faults(requests_per_second=10), lambda: 5)

    def let_through(now: float) -> int:
        return sum(not chance.over_rate(now) for _ in range(40))

    assert [let_through(now) for now in (50.0, 50.0, 50.5, 51.5, 90.0)] == [10, 0, 5, 10, 10]


@pytest.mark.parametrize(("faults", "landed"), [(Faults(reset=1.0), 0), (Faults(reset_after=1.0), SOL)])
def test_a_reset_before_and_after_execution(faults: Faults, landed: int) -> None:
    async def test(world: World) -> None:
        to = Keypair().pubkey()
        with pytest.raises(httpx2.TransportError):
            await world.send(world.payment(to))
        assert world.bank.balance(to) == landed

    under(faults, test)


def test_latency_is_added_to_requests_and_half_of_it_to_notifications() -> None:
    async def test(world: World) -> None:
        started = time.perf_counter()
        await world.call("getSlot")
        assert time.perf_counter() - started >= 0.2
        async with connect(world.ws) as socket:
            await socket.send(json.dumps({"id": 1, "method": "slotSubscribe"}))
            await socket.recv()
            started = time.perf_counter()
            world.advance(400)
            slots = [json.loads(await socket.recv())["params"]["result"]["slot"] for _ in range(400)]
            # One after another they would take 40 s.
            assert 0.1 <= time.perf_counter() - started < 30.0, "delays of messages do not add up"
            assert slots == list(range(2, 402))

    under(Faults(latency_ms=200, jitter_ms=20), test)


def test_jitter_lets_requests_overtake_each_other() -> None:
    async def test(world: World) -> None:
        finished: list[int] = []

        async def one(index: int) -> None:
            async with httpx2.AsyncClient(timeout=90) as client:
                await client.post(world.rpc, json={"id": 1, "method": "getSlot"})
            finished.append(index)

        await asyncio.gather(*(one(index) for index in range(10)))
        assert sorted(finished) == list(range(10))
        assert finished != sorted(finished)

    under(Faults(jitter_ms=300, seed=1), test)


def test_stale_answers_come_from_slots_ago() -> None:
    async def test(world: World) -> None:
        world.advance(20)
        to = Keypair().pubkey()
        old = await world.call("getLatestBlockhash")
        assert old["result"]["context"]["slot"] == world.bank.slot - 5
        assert old["result"]["value"]["blockhash"] != str(world.bank.latest_blockhash)
        assert "result" in await world.call("isBlockhashValid", old["result"]["value"]["blockhash"])
        # A blockhash that the lagging endpoint has not seen yet fails its preflight; without preflight it lands.
        sent = world.payment(to)
        assert (await world.send(sent))["error"]["data"]["err"] == "BlockhashNotFound"
        world.advance(5)
        assert "result" in await world.send(sent)
        assert world.bank.balance(to) == SOL
        assert (await world.call("getBalance", str(to)))["result"]["value"] == 0
        world.advance(4)
        assert (await world.call("getBalance", str(to)))["result"]["value"] == 0
        world.advance(1)
        assert (await world.call("getBalance", str(to)))["result"]["value"] == SOL
        least = {"minContextSlot": world.bank.slot}
        assert (await world.call("getBalance", str(to), least))["error"]["code"] == -32016

    under(Faults(stale=1.0, stale_slots=5), test)


def test_only_the_named_methods_and_slots_are_hit() -> None:
    async def test(world: World) -> None:
        assert (await world.post("getHealth")).status_code == 200
        assert (await world.post("getSlot")).status_code == 200
        world.advance(9)
        assert world.bank.slot == 10
        assert (await world.post("getHealth")).status_code == 200
        assert (await world.post("getSlot")).status_code == 503
        world.advance(1)
        assert (await world.post("getSlot")).status_code == 200

    under(Faults(unavailable=1.0, methods=("getSlot",), from_slot=10, to_slot=11), test)


def test_websockets_are_cut_refused_and_mute() -> None:
    async def cut(world: World) -> None:
        async with connect(world.ws) as socket:
            with pytest.raises(ConnectionClosed):
                await socket.recv()

    async def refused(world: World) -> None:
        with pytest.raises((InvalidMessage, OSError)):
            await connect(world.ws)

    async def mute(world: World) -> None:
        async with connect(world.ws) as socket:
            await socket.send(json.dumps({"id": 1, "method": "slotSubscribe"}))
            assert "result" in json.loads(await socket.recv())
            world.advance(3)
            await socket.send(json.dumps({"id": 2, "method": "slotSubscribe"}))
            assert json.loads(await socket.recv())["id"] == 2

    under(Faults(socket_seconds=0.05), cut)
    under(Faults(refuse_sockets=1.0), refused)
    under(Faults(mute=1.0), mute)


def test_the_same_seed_gives_the_same_faults() -> None:
    async def statuses(seed: int) -> list[int]:
        async with served(Faults(unavailable=0.3, too_many=0.3, seed=seed)) as world:
            return [(await world.post("getSlot")).status_code for _ in range(60)]

    first, again, other = (asyncio.run(statuses(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert set(first) == {200, 429, 503}


def test_one_kind_of_fault_does_not_move_another() -> None:
    def draws(faults: Faults) -> list[bool]:
        chance = Chance(faults, lambda: 5)
        found = []
        for _ in range(100):
            chance.hits("reset", faults.reset)
            found.append(chance.hits("lose", faults.lose))
        return found

    assert draws(Faults(lose=0.3)) == draws(Faults(lose=0.3, reset=0.5))


def test_clocks_are_skewed_stopped_and_halted() -> None:
    async def run(faults: Faults, until: Callable[[Bank], bool]) -> Bank:
        bank = Bank(GENESIS, 1000)
        clock = asyncio.create_task(keep_time(bank, 0.001, faults))
        reached = asyncio.Event()
        bank.on_slot.append(lambda parent, slot: reached.set() if until(bank) else None)
        await asyncio.wait_for(reached.wait(), 90)
        clock.cancel()
        return bank

    skewed = asyncio.run(run(Faults(clock_skew_s=10_000), lambda bank: bank.slot > 5))
    assert abs(skewed.unix_time - time.time() - 10_000) < 30
    stopped = asyncio.run(run(Faults(clock_stopped=True), lambda bank: bank.slot > 20))
    assert stopped.unix_time == 1000


class Hand:
    """A clock that goes on by what is slept, and stands in for asyncio in the ledger's clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def get_running_loop(self) -> Hand:
        return self

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.0) + 1e-6
        await asyncio.sleep(0)


def test_a_chain_stands_still_at_its_slot_and_goes_on_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand()
    monkeypatch.setattr("coordinator.ledger.clock.asyncio", hand)

    async def run() -> dict[int, float]:
        bank = Bank(GENESIS, 1000)
        at: dict[int, float] = {}
        bank.on_slot.append(lambda parent, slot: at.setdefault(slot, hand.now) and None)
        done = asyncio.Event()
        bank.on_slot.append(lambda parent, slot: done.set() if slot >= 60 else None)
        clock = asyncio.create_task(keep_time(bank, 0.01, Faults(halt_slot=50, halt_seconds=2.0)))
        await asyncio.wait_for(done.wait(), 90)
        clock.cancel()
        return at

    at = asyncio.run(run())
    assert list(at)[:60] == list(range(1, 61)), "slots of the halt never were"
    pauses = {slot: at[slot + 1] - at[slot] for slot in range(1, 60)}
    assert pauses.pop(50) == pytest.approx(2.01, abs=1e-3)
    assert list(pauses.values()) == pytest.approx([0.01] * 58, abs=1e-3)


def test_settings_are_read_from_pairs_json_and_files(tmp_path: Path) -> None:
    wanted = Faults(lose=0.5, latency_ms=20, methods=("getSlot",))
    toml, as_json = tmp_path / "faults.toml", tmp_path / "faults.json"
    toml.write_text('lose = 0.5\nlatency_ms = 20\nmethods = ["getSlot"]\n')
    as_json.write_text(wanted.model_dump_json())
    for text in (
        'lose=0.5, latency_ms=20, methods=["getSlot"]',
        '{"lose": 0.5, "latency_ms": 20, "methods": ["getSlot"]}',
        str(toml),
        str(as_json),
    ):
        assert parse_faults(text) == wanted
    assert parse_faults("") == Faults()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lose=2", "lose"),
        ("loose=0.1", "loose"),
        ("lose=", "TOML pairs"),
        ("{", "neither JSON"),
        ("nowhere.toml", "nowhere.toml"),
        ("stale=0.1", "stale_slots"),
        ("from_slot=5, to_slot=5", "not after"),
        ("halt_seconds=1.0", "halt_slot"),
        ("lose=true", "lose"),
        ("seed='x'", "seed"),
    ],
)
def test_wrong_settings_are_named(text: str, says: str) -> None:
    with pytest.raises(BadFaults, match=says):
        parse_faults(text)


def test_the_command_serves_a_faulty_and_a_faultless_endpoint_of_one_ledger() -> None:
    command = [sys.executable, "-m", "coordinator.ledger", "run", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--faults", "unavailable=1.0", "--faults", ""], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        bad, good = (one["rpc"] for one in ready["endpoints"])
        assert ready["rpc"] == bad
        body = {"id": 1, "method": "getGenesisHash"}
        assert httpx2.post(bad, json=body, timeout=90).status_code == 503
        assert len(httpx2.post(good, json=body, timeout=90).json()["result"]) > 40
    finally:
        process.terminate()
        process.communicate(timeout=90)
    wrong = subprocess.run([*command, "--faults", "lose=7"], capture_output=True, text=True, timeout=90, check=False)
    assert wrong.returncode == 2
    assert "lose" in wrong.stderr
