"""What a transaction does when endpoints disagree, lag, forget or lie: it has its effect once, or says why not."""

from __future__ import annotations

import asyncio
import base64
import math
from typing import Any

import pytest
from endpoints import endpoint, forward, forwarding, result
from ledger_process import SOL, Ledger
from payments import pays_once
from solders.compute_budget import ID as COMPUTE_BUDGET
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.system_program import TransferParams, transfer
from solders.transaction import Transaction

from coordinator import transactions
from coordinator.addresses import run_addresses
from coordinator.chain import Chain, TransactionFailed
from coordinator.fees import PriorityFees
from coordinator.jsonrpc import Unusable
from coordinator.pulses import Pulses
from coordinator.rpc import Endpoints

Request = dict[str, Any]
Answer = tuple[int, bytes, str] | None


def test_an_endpoint_that_is_behind_cannot_make_a_payment_happen_twice(fast_ledger: Ledger) -> None:
    """It says that the blockhash has expired, and of an earlier slot that it does not know the transaction."""

    async def run() -> None:
        stale = 0

        async def change(request: Request) -> Answer:
            nonlocal stale
            if request["method"] == "getSignatureStatuses" and stale < 12:
                stale += 1
                return result(request, {"context": {"slot": 1}, "value": [None]})
            return None

        async with endpoint(forwarding(fast_ledger.rpc, change)) as front:
            # The port next to it has no WebSocket: there is no push to tell that it has landed.
            await pays_once(fast_ledger, [front])
        assert stale == 12

    asyncio.run(asyncio.wait_for(run(), 300))


def test_a_fork_that_dies_cannot_make_a_payment_happen_twice(ledger: Ledger) -> None:
    """Its processed blocks are beyond the blockhash's last, and it does not have the transaction; another fork does."""

    async def run() -> None:
        looks = 0

        async def change(request: Request) -> Answer:
            nonlocal looks
            if request["method"] == "getEpochInfo" and request["params"][0]["commitment"] == "processed":
                return result(request, {"absoluteSlot": 2**40, "blockHeight": 2**40})
            if request["method"] == "getSignatureStatuses" and looks < 6:
                looks += 1
                return result(request, {"context": {"slot": 2**40}, "value": [None]})
            return None

        async with endpoint(forwarding(ledger.rpc, change)) as front:
            await pays_once(ledger, [front], commitment="processed")
        assert looks == 6

    asyncio.run(asyncio.wait_for(run(), 300))


def test_what_is_known_below_the_level_asked_for_has_not_expired(fast_ledger: Ledger) -> None:
    async def run() -> None:
        low = 0

        async def change(request: Request) -> Answer:
            nonlocal low
            if request["method"] == "getSignatureStatuses" and low < 8:
                low += 1
                status = {"slot": 1, "confirmations": 0, "err": None, "confirmationStatus": "processed"}
                return result(request, {"context": {"slot": 2**40}, "value": [status]})
            return None

        async with endpoint(forwarding(fast_ledger.rpc, change)) as front:
            await pays_once(fast_ledger, [front])
        assert low == 8

    asyncio.run(asyncio.wait_for(run(), 300))


def test_what_one_endpoint_loses_another_is_sent(ledger: Ledger) -> None:
    async def run() -> None:
        swallowed = 0

        async def change(request: Request) -> Answer:
            nonlocal swallowed
            if request["method"] == "sendTransaction":
                swallowed += 1
                return result(request, "1" * 64)
            return None

        async with endpoint(forwarding(ledger.rpc, change)) as losing:
            # The first one swallows everything for ever and never fails, so only sending to both can succeed.
            await pays_once(ledger, [losing, ledger.rpc])
        assert swallowed >= 1

    asyncio.run(asyncio.wait_for(run(), 300))


def test_sending_survives_an_outage_in_its_middle(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.rpc._LONGEST_PAUSE", 0.5)

    async def run() -> None:
        down, refused = False, list[str]()

        async def change(request: Request) -> Answer:
            nonlocal down
            if request["method"] == "sendTransaction" and not refused:
                await forward(ledger.rpc, request)
                down = True
            # Long enough for a call's whole patience to end, twice.
            if down and len(refused) < 12:
                refused.append(request["method"])
                return 503, b"", ""
            return None

        async with endpoint(forwarding(ledger.rpc, change)) as front:
            await pays_once(ledger, [front], patience=2.0)

    asyncio.run(asyncio.wait_for(run(), 300))


def test_a_transaction_is_simulated_on_a_state_no_older_than_what_was_read(ledger: Ledger) -> None:
    async def run() -> None:
        least: list[int] = []

        async def change(request: Request) -> Answer:
            if request["method"] == "sendTransaction" and not request["params"][1]["skipPreflight"]:
                least.append(request["params"][1]["minContextSlot"])
            return None

        payer = Keypair()
        async with endpoint(forwarding(ledger.rpc, change)) as front, Chain([front], payer) as chain:
            await chain.airdrop(payer.pubkey(), SOL)
            seen = await chain.slot()
            await chain.send(transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=payer.pubkey(), lamports=1)))
            assert least[0] >= seen

    asyncio.run(asyncio.wait_for(run(), 300))


def test_an_answer_older_than_what_was_seen_is_not_believed(ledger: Ledger) -> None:
    """An endpoint that takes no notice of minContextSlot; the next one is asked."""

    async def run() -> None:
        old = False

        async def change(request: Request) -> Answer:
            if old and request["method"] == "getBalance":
                return result(request, {"context": {"slot": 1}, "value": 77})
            return None

        payer = Keypair()
        async with endpoint(forwarding(ledger.rpc, change)) as front, Chain([front, ledger.rpc], payer) as chain:
            await chain.airdrop(payer.pubkey(), SOL)
            assert await chain.balance(payer.pubkey()) == SOL
            old = True
            assert await chain.balance(payer.pubkey()) == SOL

    asyncio.run(asyncio.wait_for(run(), 300))


@pytest.mark.parametrize("number", [math.inf, math.nan, -1, True, 1.5, "7", [], None, 2**64])
def test_numbers_that_are_none_make_an_answer_unusable(number: Any) -> None:
    """JSON has 1e999, which no int holds; the next endpoint is asked, and no task ends."""
    with pytest.raises(Unusable):
        transactions._blockhash({"value": {"blockhash": "1" * 32, "lastValidBlockHeight": number}})
    with pytest.raises(Unusable):
        transactions._first_status({"context": {"slot": number}, "value": [None]})
    with pytest.raises(Unusable):
        transactions._slot_and_height({"absoluteSlot": number, "blockHeight": 1})
    with pytest.raises(Unusable):
        transactions._slot_and_height({"absoluteSlot": 1, "blockHeight": number})


@pytest.mark.parametrize("slot", [math.inf, math.nan, 10**30, None, "7"])
def test_a_push_that_makes_no_sense_is_a_reason_to_look(slot: Any) -> None:
    pulses = Pulses(Chain(["http://127.0.0.1:9"]), run_addresses(Pubkey.default(), Pubkey.default(), "x"))
    value = {"context": {"slot": slot}, "value": {"data": [base64.b64encode(bytes(8)).decode(), "base64"]}}
    assert pulses._is_urgent(value, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, 7, {}, {"context": {"slot": 1}}, {"value": "err", "context": {"slot": 1}}])
def test_a_push_of_a_status_that_is_none_is_waited_through(value: Any) -> None:
    """Else every look at the transaction would follow the last one at once, as long as its push stays what it is."""

    async def run() -> None:
        async with Chain(["http://127.0.0.1:9"]) as chain:
            pushed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            sender = chain._sender
            handle = sender._subscribe(Signature.default(), pushed)
            push = chain.subscriptions._wanted[handle].push
            push(value)
            assert not pushed.done()
            push({"context": {"slot": 5}, "value": {"err": None}})
            assert await sender._confirmed(None, pushed, 0)  # type: ignore[arg-type]
            assert chain.rpc.seen_slot == 5

    asyncio.run(run())


# ---------------------------------------------------------------------- fees


def test_the_automatic_fee_follows_the_cluster_doubles_with_every_expiry_and_is_capped() -> None:
    async def run() -> None:
        asked: list[Any] = []

        async def handle(request: Request) -> tuple[int, bytes, str]:
            asked.append(request["params"])
            return result(request, [{"slot": slot, "prioritizationFee": 100 * slot} for slot in range(100)])

        async with endpoint(handle) as front:
            rpc = Endpoints([front])
            fees = PriorityFees(rpc, "auto", 30_000)
            assert await fees.price(["b", "a"], 0) == 7500
            assert await fees.price(["a", "b"], 1) == 15_000
            assert await fees.price(["a", "b"], 2) == 30_000
            assert await fees.price(["a", "b"], 9) == 30_000
            assert asked == [[["a", "b"]]], "asked once for the same accounts"
            assert await PriorityFees(rpc, 5, 1).price(["a"], 9) == 5
            await rpc.close()

    asyncio.run(run())


@pytest.mark.parametrize("answer", [None, [{}], [{"prioritizationFee": -1}], [{"prioritizationFee": "1"}], [7]])
def test_without_a_usable_estimate_the_fee_is_none(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.fees._PATIENCE", 0.1)

    async def run() -> None:
        async def handle(request: Request) -> tuple[int, bytes, str]:
            return result(request, answer)

        async with endpoint(handle) as front:
            rpc = Endpoints([front])
            assert await PriorityFees(rpc, "auto", 1000).price(["a"], 0) == 0
            await rpc.close()

    asyncio.run(run())


@pytest.mark.parametrize(("setting", "cap"), [("fast", 1), (-1, 1), ("auto", -1)])
def test_fees_that_are_none_are_refused(setting: Any, cap: int) -> None:
    with pytest.raises(ValueError, match="priority fee"):
        PriorityFees(Endpoints(["http://127.0.0.1:9"]), setting, cap)


def test_the_automatic_fee_is_in_the_transaction(ledger: Ledger) -> None:
    async def run() -> None:
        sent: list[Transaction] = []

        async def change(request: Request) -> Answer:
            if request["method"] == "getRecentPrioritizationFees":
                return result(request, [{"slot": 1, "prioritizationFee": 12_345}])
            if request["method"] == "sendTransaction":
                sent.append(Transaction.from_bytes(base64.b64decode(request["params"][0])))
            return None

        payer = Keypair()
        async with (
            endpoint(forwarding(ledger.rpc, change)) as front,
            Chain([front], payer, priority_fee="auto") as chain,
        ):
            await chain.airdrop(payer.pubkey(), SOL)
            made = transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=payer.pubkey(), lamports=1))
            await chain.send(made, compute_units=1000)
        message = sent[0].message
        budget = [
            one.data for one in message.instructions if message.account_keys[one.program_id_index] == COMPUTE_BUDGET
        ]
        assert budget[1] == b"\3" + (12_345).to_bytes(8, "little")
        assert 1000 <= int.from_bytes(budget[0][1:], "little") < 1000 + 4096

    asyncio.run(asyncio.wait_for(run(), 300))


def test_failures_of_other_programs_say_what_to_do(ledger: Ledger) -> None:
    async def run() -> None:
        payer = Keypair()
        async with Chain([ledger.rpc], payer) as chain:
            await chain.airdrop(payer.pubkey(), SOL)
            much = transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=Pubkey.default(), lamports=5 * SOL))
            with pytest.raises(TransactionFailed, match="too few lamports for it; send it some SOL"):
                await chain.send(much)
            dust = transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=Keypair().pubkey(), lamports=1))
            with pytest.raises(TransactionFailed, match="less than its deposit for rent; send wallet"):
                await chain.send(dust)

    asyncio.run(run())
