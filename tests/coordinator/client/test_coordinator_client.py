"""The client of a run, against the real program on a real ledger, also when parts of the way to it fail."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from endpoints import Relay, endpoint, failure, forward, forwarding, result
from ledger_process import SOL, Ledger
from payments import pays_once
from runs import LIMITS, ROOT, TERMS, close, joined, limits, take_part
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer

from coordinator.chain import Chain, ChainError, ChainUnavailable, TransactionFailed
from coordinator.client import CoordinatorClient, ProgramError, RunExists, RunNotFound
from coordinator.state import MemberStatus, Phase

_names = itertools.count()
Program = tuple[Keypair, Pubkey]


@contextlib.asynccontextmanager
async def owned(ledger: Ledger, program: Program, **changes: int) -> AsyncIterator[CoordinatorClient]:
    """The owner's client of a new run."""
    wallet, address = program
    async with CoordinatorClient([ledger.rpc], address, None, wallet) as owner:
        addresses = await owner.create_run(f"client-{next(_names)}", limits(**changes), TERMS)
    async with CoordinatorClient([ledger.rpc], address, addresses, wallet) as owner:
        yield owner


def test_a_run_from_its_creation_to_its_end(ledger: Ledger, program: Program) -> None:
    async def run() -> None:
        async with owned(ledger, program) as owner:
            nodes = [await joined([ledger.rpc], owner.addresses.run) for _ in range(3)]
            seen = await asyncio.gather(*(take_part(node) for node in nodes))
            final = await owner.pulse()
            assert final.run.phase is Phase.FINISHED
            assert [kept.members for kept in final.run.inclusion] == [frozenset({0, 1, 2})] * 3
            members = await owner.members()
            assert [member.credit for member in members] == [30, 33, 36]
            assert final.run.tokens == 99
            assert all(member.updates_included == 3 for member in members)
            for pulses in seen:
                slots = [pulse.slot for pulse in pulses]
                assert slots == sorted(slots)
                assert all(pulse.header.phase == pulse.run.phase for pulse in pulses), "never half of a tick"
            total, failed = await owner.transaction_counts()
            assert total >= 1 + 3 * (1 + 1 + 3 + 3 + 1)
            assert failed < total
            await close(*nodes)

    asyncio.run(asyncio.wait_for(run(), 300))


def test_program_errors_have_number_name_and_logs(ledger: Ledger, program: Program) -> None:
    async def run() -> None:
        async with owned(ledger, program) as owner:
            node = await joined([ledger.rpc], owner.addresses.run)
            with pytest.raises(ProgramError) as refused:
                await node.set_share(0)
            assert (refused.value.code, refused.value.name) == (6030, "BAD_SHARE")
            assert refused.value.signature is None
            assert any("custom program error: 0x178e" in line for line in refused.value.logs)
            with pytest.raises(ProgramError, match="NOT_DUE"):
                await node.tick()
            with pytest.raises(ProgramError) as phase:
                await node.checkpoint(0, ROOT)
            assert phase.value.name == "WRONG_PHASE"
            await node.leave()
            assert (await node.members())[0].status is MemberStatus.LEFT
            await node.close()

    asyncio.run(run())


def test_other_failures_say_what_failed(ledger: Ledger, program: Program) -> None:
    async def run() -> None:
        pauper = Keypair()
        async with Chain([ledger.rpc], pauper) as chain:
            to_self = transfer(TransferParams(from_pubkey=pauper.pubkey(), to_pubkey=pauper.pubkey(), lamports=1))
            with pytest.raises(TransactionFailed, match=f"wallet {pauper.pubkey()} cannot pay"):
                await chain.send(to_self)
            await chain.airdrop(pauper.pubkey(), SOL)
            much = transfer(TransferParams(from_pubkey=pauper.pubkey(), to_pubkey=pauper.pubkey(), lamports=5 * SOL))
            with pytest.raises(TransactionFailed) as failed:
                await chain.send(much)
            assert not isinstance(failed.value, ProgramError), "another program's number is not ours"
            assert failed.value.error == {"InstructionError": [1, {"Custom": 1}]}
            with pytest.raises(TransactionFailed, match="over the limit of 1232"):
                await chain.send(
                    *[
                        transfer(
                            TransferParams(from_pubkey=pauper.pubkey(), to_pubkey=Keypair().pubkey(), lamports=SOL)
                        )
                        for _ in range(30)
                    ]
                )
            other = Keypair().pubkey()
            with pytest.raises(TransactionFailed, match=f"sign for {other}"):
                await chain.send(transfer(TransferParams(from_pubkey=other, to_pubkey=other, lamports=1)))
        async with Chain([ledger.rpc]) as reader:
            with pytest.raises(ChainError, match="no wallet"):
                await reader.send(to_self)

    asyncio.run(run())


def test_what_is_no_run_is_refused(ledger: Ledger, program: Program) -> None:
    async def run() -> None:
        owner, address = program
        for run_address in ("x", str(Keypair().pubkey()), str(owner.pubkey()), str(address)):
            with pytest.raises(RunNotFound):
                await CoordinatorClient.open([ledger.rpc], run_address)
        async with owned(ledger, program) as client:
            for part in (client.addresses.members, client.addresses.rounds):
                with pytest.raises(RunNotFound):
                    await CoordinatorClient.open([ledger.rpc], part)
            name = (await client.pulse()).run.run_id
            with pytest.raises(RunExists, match=name):
                await client.create_run(name, LIMITS, TERMS)

    asyncio.run(run())


def test_equal_instructions_in_one_slot_are_two_transactions(ledger: Ledger) -> None:
    async def run() -> None:
        payer, to = Keypair(), Keypair().pubkey()
        async with Chain([ledger.rpc], payer) as chain:
            await chain.airdrop(payer.pubkey(), 100 * SOL)
            same = transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=to, lamports=SOL))
            signatures = await asyncio.gather(*(chain.send(same) for _ in range(20)))
            assert len(set(signatures)) == 20
            assert await chain.balance(to) == 20 * SOL

    asyncio.run(run())


def test_a_priority_fee_is_paid(ledger: Ledger) -> None:
    async def run() -> None:
        payer = Keypair()
        async with Chain([ledger.rpc], payer, priority_fee=1_000_000) as chain:
            await chain.airdrop(payer.pubkey(), SOL)
            await chain.send(transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=payer.pubkey(), lamports=1)))
            paid = SOL - await chain.balance(payer.pubkey())
            assert 120_000 <= paid - 5000 < 130_000

    asyncio.run(run())


# ---------------------------------------------------------------------- pushes and polls


def test_a_cut_websocket_is_replaced_by_polling_and_comes_back(ledger: Ledger, program: Program) -> None:
    """The relay stands where the WebSocket of the front's URL is expected, and is cut and restored."""

    async def run() -> None:
        async def through(request: dict[str, Any]) -> None:
            return None

        async with owned(ledger, program) as owner, contextlib.AsyncExitStack() as stack:
            relay = Relay(ledger.port + 1)
            front, port = await _neighbours(stack, forwarding(ledger.rpc, through), relay)
            run = owner.addresses.run
            async with await CoordinatorClient.open([front], run) as client:
                pulses = client.watch()

                async def until(members: int) -> None:
                    async with asyncio.timeout(90):
                        while (await anext(pulses)).header.members != members:
                            pass

                await until(0)
                while not client.subscriptions.connected:
                    await anext(pulses)
                nodes = [await joined([ledger.rpc], run)]
                await until(1)
                await relay.cut()
                while client.subscriptions.connected:
                    await anext(pulses)
                nodes.append(await joined([ledger.rpc], run))
                await until(2)
                assert not client.subscriptions.connected
                accepted = relay.accepted
                await relay.up(port + 1)
                while not client.subscriptions.connected:
                    await anext(pulses)
                assert relay.accepted > accepted
                nodes.append(await joined([ledger.rpc], run))
                await until(3)
                await relay.cut()
                await close(*nodes)

    asyncio.run(asyncio.wait_for(run(), 300))


async def _neighbours(stack: contextlib.AsyncExitStack, handler: Any, relay: Relay) -> tuple[str, int]:
    """An endpoint, and the relay on the next port."""
    for _ in range(50):
        front = await stack.enter_async_context(endpoint(handler))
        port = int(front.rpartition(":")[2])
        with contextlib.suppress(OSError):
            await relay.up(port + 1)
            return front, port
    raise AssertionError("no two neighbouring ports are free")


def test_a_change_is_pushed_long_before_it_would_be_polled(ledger: Ledger, program: Program) -> None:
    async def run() -> None:
        async with owned(ledger, program) as owner:
            run = owner.addresses.run
            async with await CoordinatorClient.open([ledger.rpc], run) as client:
                # With polling as slow as this only a push can wake the watch in time.
                client.pace.pause = lambda *_, **__: 3600.0  # type: ignore[method-assign]
                pulses = client.watch()
                assert (await anext(pulses)).header.members == 0
                waiting = asyncio.ensure_future(anext(pulses))
                node = await joined([ledger.rpc], run)
                async with asyncio.timeout(90):
                    while (await waiting).header.members != 1:
                        waiting = asyncio.ensure_future(anext(pulses))
                await node.close()

    asyncio.run(asyncio.wait_for(run(), 300))


def test_watch_outlives_an_endpoint_that_goes_away(ledger: Ledger, program: Program) -> None:
    async def run() -> None:
        down = False

        async def change(request: dict[str, Any]) -> tuple[int, bytes, str] | None:
            return (503, b"", "") if down else None

        async with (
            owned(ledger, program) as owner,
            endpoint(forwarding(ledger.rpc, change)) as front,
            await CoordinatorClient.open([front], owner.addresses.run, patience=4.0) as client,
        ):
            pulses = client.watch()
            first = await anext(pulses)
            down = True
            with pytest.raises(ChainUnavailable):
                await client.slot()
            waiting = asyncio.ensure_future(anext(pulses))
            with pytest.raises(ChainUnavailable):
                await client.slot()
            down = False
            async with asyncio.timeout(90):
                assert (await waiting).slot > first.slot

    asyncio.run(asyncio.wait_for(run(), 300))


def gone(request: dict[str, Any]) -> tuple[int, bytes, str]:
    """The answer of an endpoint that is up to date and has neither of a run's accounts."""
    slot = request["params"][1]["minContextSlot"]
    return result(request, {"context": {"slot": slot}, "value": [None, None]})


def test_watch_believes_that_a_run_is_gone_only_when_it_stays_away(
    ledger: Ledger, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.pulses._GONE_PAUSE", 0.05)

    async def run() -> None:
        missing = 0

        async def change(request: dict[str, Any]) -> tuple[int, bytes, str] | None:
            nonlocal missing
            if request["method"] == "getMultipleAccounts" and missing:
                missing -= 1
                return gone(request)
            return None

        async with (
            owned(ledger, program) as owner,
            endpoint(forwarding(ledger.rpc, change)) as front,
            await CoordinatorClient.open([front], owner.addresses.run) as client,
        ):
            pulses = client.watch()
            first = await anext(pulses)
            missing = 1
            assert (await anext(pulses)).slot >= first.slot
            missing = 1000
            with pytest.raises(RunNotFound, match="was it closed"):
                await anext(pulses)

    asyncio.run(asyncio.wait_for(run(), 300))


def test_watch_counts_only_answers_that_the_run_is_gone(
    ledger: Ledger, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each other failure starts the count anew, and a refusal by the endpoint ends nothing."""
    monkeypatch.setattr("coordinator.pulses._GONE_PAUSE", 0.01)
    monkeypatch.setattr("coordinator.pulses._LONGEST_PAUSE", 0.01)
    # A call is too impatient for a second attempt, so that each answer is one look.
    monkeypatch.setattr("coordinator.rpc._FIRST_PAUSE", 10.0)

    async def run() -> None:
        trouble: list[str] = []

        async def change(request: dict[str, Any]) -> tuple[int, bytes, str] | None:
            if request["method"] != "getMultipleAccounts" or not trouble:
                return None
            match trouble.pop(0):
                case "gone":
                    return gone(request)
                case "refused":
                    return failure(request, -32000, "busy")
            return 503, b"", ""

        async with (
            owned(ledger, program) as owner,
            endpoint(forwarding(ledger.rpc, change)) as front,
            await CoordinatorClient.open([front], owner.addresses.run, patience=7.0) as client,
        ):
            pulses = client.watch()
            await anext(pulses)
            trouble += ["away", "refused", "refused", "gone", "gone", "refused", "gone", "gone"]
            await anext(pulses)
            assert not trouble
            trouble += ["gone"] * 3
            with pytest.raises(RunNotFound):
                await anext(pulses)
            await pulses.aclose()  # type: ignore[attr-defined]

    asyncio.run(asyncio.wait_for(run(), 300))


def test_watch_goes_on_after_a_slot_that_never_was(
    ledger: Ledger, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer is from far in the future. No read is as new as that, so the client gives that slot up again."""
    monkeypatch.setattr("coordinator.pulses._LONGEST_PAUSE", 0.01)

    async def run() -> None:
        future = 2**40
        lies = 0

        async def change(request: dict[str, Any]) -> tuple[int, bytes, str] | None:
            nonlocal lies
            if request["method"] != "getMultipleAccounts" or not lies:
                return None
            lies -= 1
            status, body, headers = await forward(ledger.rpc, request)
            answer = json.loads(body)
            answer["result"]["context"]["slot"] = future
            return status, json.dumps(answer).encode(), headers

        async with (
            owned(ledger, program) as owner,
            endpoint(forwarding(ledger.rpc, change)) as front,
            await CoordinatorClient.open([front], owner.addresses.run, patience=4.0) as client,
        ):
            pulses = client.watch()
            before = await anext(pulses)
            lies = 1
            while (pulse := await anext(pulses)).slot != future:
                assert pulse.slot >= before.slot
            assert before.slot <= (await anext(pulses)).slot < future
            await pulses.aclose()  # type: ignore[attr-defined]

    asyncio.run(asyncio.wait_for(run(), 300))


def test_one_bad_answer_about_a_part_of_the_run_is_no_proof_that_it_is_gone(ledger: Ledger, program: Program) -> None:
    async def run() -> None:
        missing = True

        async def change(request: dict[str, Any]) -> tuple[int, bytes, str] | None:
            if request["method"] == "getAccountInfo" and missing:
                return result(request, {"context": {"slot": 2**40}, "value": None})
            return None

        async with (
            owned(ledger, program) as owner,
            endpoint(forwarding(ledger.rpc, change)) as front,
            CoordinatorClient([front], owner.program_id, owner.addresses, None) as client,
        ):
            with pytest.raises(ChainUnavailable, match="another RPC endpoint"):
                await client.members()
            client.rpc.seen_slot, missing = 0, False
            assert await client.members() == ()

    asyncio.run(asyncio.wait_for(run(), 300))


def test_what_has_not_changed_is_not_read_again(ledger: Ledger, program: Program) -> None:
    async def run() -> None:
        sizes: list[int] = []

        async def change(request: dict[str, Any]) -> None:
            if request["method"] == "getMultipleAccounts":
                sizes.append(request["params"][1]["dataSlice"]["length"])

        async with (
            owned(ledger, program) as owner,
            endpoint(forwarding(ledger.rpc, change)) as front,
            await CoordinatorClient.open([front], owner.addresses.run) as client,
        ):
            pulses = client.watch()
            before = await anext(pulses)
            while len(sizes) < 4:
                assert (await anext(pulses)).run is before.run
            nodes = [await joined([ledger.rpc], owner.addresses.run) for _ in range(2)]
            pulse = await anext(pulses)
            while pulse.run.phase is not Phase.WARMUP:
                if pulse.header.due(pulse.slot):
                    await nodes[0].tick()
                pulse = await anext(pulses)
            assert pulse.run.member_count == 2
            assert set(sizes) == {256, 1088}
            assert sizes.count(256) > sizes.count(1088)
            await close(*nodes)

    asyncio.run(asyncio.wait_for(run(), 300))


# ---------------------------------------------------------------------- sending through trouble


def test_a_lost_transaction_expires_and_is_signed_again(fast_ledger: Ledger) -> None:
    async def run() -> None:
        lost: set[str] = set()

        async def change(request: dict[str, Any]) -> tuple[int, bytes, str] | None:
            if request["method"] != "sendTransaction":
                return None
            wire = base64.b64decode(request["params"][0])
            blockhash = wire[-60:].hex()
            if not lost or blockhash in lost:
                lost.add(blockhash)
                return result(request, "1" * 64)
            return None

        async with endpoint(forwarding(fast_ledger.rpc, change)) as front:
            await pays_once(fast_ledger, [front])
        assert len(lost) == 1

    asyncio.run(asyncio.wait_for(run(), 300))


def test_an_answer_lost_after_the_fact_does_no_harm(ledger: Ledger) -> None:
    async def run() -> None:
        sends = 0

        async def change(request: dict[str, Any]) -> tuple[int, bytes, str] | None:
            nonlocal sends
            if request["method"] == "sendTransaction":
                sends += 1
                if sends == 1:
                    await forward(ledger.rpc, request)
                    return 0, b"", ""
            return None

        async with endpoint(forwarding(ledger.rpc, change)) as front:
            await pays_once(ledger, [front])
        assert sends == 2

    asyncio.run(asyncio.wait_for(run(), 300))


def test_sending_fails_over_between_endpoints(ledger: Ledger) -> None:
    async def run() -> None:
        async def change(request: dict[str, Any]) -> tuple[int, bytes, str] | None:
            return (429, b"", "retry-after: 20\r\n") if request["method"] == "sendTransaction" else None

        async with endpoint(forwarding(ledger.rpc, change)) as limited:
            await pays_once(ledger, ["http://127.0.0.1:9", limited, ledger.rpc])

    asyncio.run(asyncio.wait_for(run(), 300))


def test_reads_do_not_go_back_to_an_endpoint_that_is_behind(ledger: Ledger, program: Program) -> None:
    """The one in front refuses slots it has not reached, as a cluster's node does; the next one is asked."""

    async def run() -> None:
        asked: list[int] = []

        async def behind(request: dict[str, Any]) -> tuple[int, bytes, str] | None:
            options = next((one for one in request.get("params", []) if isinstance(one, dict)), {})
            if "minContextSlot" in options:
                asked.append(options["minContextSlot"])
                return failure(request, -32016, "Minimum context slot has not been reached")
            return None

        async with (
            owned(ledger, program) as owner,
            endpoint(forwarding(ledger.rpc, behind)) as front,
            await CoordinatorClient.open([front, ledger.rpc], owner.addresses.run) as client,
        ):
            first = await client.pulse()
            second = await client.pulse()
            assert second.slot >= first.slot
            assert asked == [first.slot]

    asyncio.run(asyncio.wait_for(run(), 300))


def test_an_endpoint_that_never_confirms_is_given_up(ledger: Ledger) -> None:
    async def run() -> None:
        async def change(request: dict[str, Any]) -> tuple[int, bytes, str] | None:
            if request["method"] == "getSignatureStatuses":
                return result(request, {"context": {"slot": 1}, "value": [None]})
            if request["method"] == "getBlockHeight":
                return result(request, 0)
            return None

        payer = Keypair()
        async with endpoint(forwarding(ledger.rpc, change)) as front, Chain([front], payer) as chain:
            chain._sender._patience = 0.5
            with pytest.raises(ChainUnavailable, match="not confirmed"):
                await chain.airdrop(payer.pubkey(), SOL)

    asyncio.run(asyncio.wait_for(run(), 300))
