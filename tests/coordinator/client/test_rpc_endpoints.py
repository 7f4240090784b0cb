"""Fail-over, back-off and bounds of RPC calls, against endpoints that misbehave."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from endpoints import endpoint, failure, result

from coordinator import jsonrpc
from coordinator import rpc as rpc_module
from coordinator.jsonrpc import RpcError, Unusable
from coordinator.rpc import ChainUnavailable, Endpoints
from coordinator.urls import BadUrl, shown_url, websocket_url

DEAD = "http://127.0.0.1:9"


async def good(request: dict[str, Any]) -> tuple[int, bytes, str]:
    return result(request, "fine")


def answering(body: bytes, status: int = 200, headers: str = "") -> Any:
    async def handle(request: dict[str, Any]) -> tuple[int, bytes, str]:
        return status, body, headers

    return handle


async def never(request: dict[str, Any]) -> tuple[int, bytes, str]:
    await asyncio.Event().wait()
    raise AssertionError


def test_the_next_endpoint_takes_over_and_the_first_is_preferred_again() -> None:
    calls = {"first": 0, "second": 0}
    broken = True

    async def first(request: dict[str, Any]) -> tuple[int, bytes, str]:
        calls["first"] += 1
        return (503, b"", "") if broken else result(request, "first")

    async def second(request: dict[str, Any]) -> tuple[int, bytes, str]:
        calls["second"] += 1
        return result(request, "second")

    async def run() -> None:
        nonlocal broken
        async with endpoint(first) as one, endpoint(second) as two:
            rpc = Endpoints([one, two])
            assert await rpc.call("getSlot") == "second"
            assert calls == {"first": 1, "second": 1}
            assert await rpc.call("getSlot") == "second", "the first is in a pause"
            assert calls == {"first": 1, "second": 2}
            broken = False
            while await rpc.call("getSlot") != "first":
                await asyncio.sleep(0.02)
            await rpc.close()

    asyncio.run(asyncio.wait_for(run(), 300))


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (answering(b"{"), "not JSON"),
        (answering(b"[]"), "not a JSON-RPC object"),
        (answering(b"[" * 3000), "not JSON"),
        (answering(b'{"id":1}'), "neither result nor error"),
        (answering(b'{"id":1,"error":{"message":"x"}}'), "no code"),
        (answering(b'{"id":1,"error":"x"}'), "no code"),
        (answering(b'{"id":77,"result":1}'), "another request"),
        (answering(b'{"id":1,"error":{"code":-32005,"message":"node is behind"}}'), "node is behind"),
        (answering(b"", 302, "location: http://127.0.0.1:1/\r\n"), "status 302"),
        (answering(b"", 500), "status 500"),
        (answering(b"", 0), "disconnected"),
        (answering(b"x" * 5000), "over 4000 bytes"),
        (never, "no answer in time"),
    ],
)
def test_what_an_endpoint_may_do_wrong(handler: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonrpc, "MAX_RESPONSE_BYTES", 4000)
    # The first failure ends a call to an endpoint that is alone: the pause after it is longer than its patience.
    monkeypatch.setattr(rpc_module, "_FIRST_PAUSE", 1e6)
    monkeypatch.setattr(rpc_module, "_LONGEST_PAUSE", 1e6)
    if handler is never:
        monkeypatch.setattr(rpc_module, "_IMPATIENT_SECONDS", 0.2)

    async def run() -> None:
        async with endpoint(handler) as bad, endpoint(good) as fine:
            alone = Endpoints([bad], request_seconds=0.2 if handler is never else 60.0, patience=60.0)
            with pytest.raises(ChainUnavailable, match=reason):
                await alone.call("getSlot")
            await alone.close()
            rpc = Endpoints([bad, DEAD, fine], request_seconds=60.0, patience=60.0)
            assert await rpc.call("getSlot") == "fine"
            await rpc.close()

    asyncio.run(asyncio.wait_for(run(), 300))


def test_an_error_of_the_request_is_not_tried_elsewhere() -> None:
    calls = 0

    async def refuse(request: dict[str, Any]) -> tuple[int, bytes, str]:
        nonlocal calls
        calls += 1
        return failure(request, -32602, "Invalid params: no")

    async def run() -> None:
        async with endpoint(refuse) as one, endpoint(refuse) as two:
            rpc = Endpoints([one, two])
            with pytest.raises(RpcError) as refused:
                await rpc.call("getSlot")
            assert (refused.value.code, calls) == (-32602, 1)
            await rpc.close()

    asyncio.run(run())


def test_what_one_endpoint_does_not_offer_another_may() -> None:
    async def lacking(request: dict[str, Any]) -> tuple[int, bytes, str]:
        return failure(request, -32601, "Method not found")

    async def run() -> None:
        async with endpoint(lacking) as one, endpoint(good) as two:
            rpc = Endpoints([one, two])
            assert await rpc.call("getSlot") == "fine"
            await rpc.close()
            alone = Endpoints([one])
            with pytest.raises(RpcError, match="an RPC endpoint that offers it"):
                await alone.call("getSlot")
            await alone.close()

    asyncio.run(asyncio.wait_for(run(), 300))


def test_an_answer_that_cannot_be_read_is_asked_for_elsewhere() -> None:
    async def nonsense(request: dict[str, Any]) -> tuple[int, bytes, str]:
        return result(request, {"slot": "many"})

    def read(answer: Any) -> str:
        if not isinstance(answer, str):
            raise Unusable("not a text")
        return answer

    async def run() -> None:
        async with endpoint(nonsense) as one, endpoint(good) as two:
            rpc = Endpoints([one, two])
            assert await rpc.ask("getSlot", [], read) == "fine"
            await rpc.close()
            alone = Endpoints([one], patience=0.3)
            with pytest.raises(ChainUnavailable, match="not a text"):
                await alone.ask("getSlot", [], read)
            await alone.close()

    asyncio.run(asyncio.wait_for(run(), 300))


@pytest.mark.parametrize("alone", [True, False])
def test_pauses_grow_for_an_endpoint_whose_answers_are_of_no_use(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it answers probes well, as one does that lacks an index or serves another chain."""
    asked: list[float] = []

    async def nonsense(request: dict[str, Any]) -> tuple[int, bytes, str]:
        if request["method"] == "getSlot":
            return result(request, 1)
        asked.append(time.monotonic())
        if alone and len(asked) == 4:
            # One more pause is longer than the patience of the call.
            monkeypatch.setattr(rpc_module, "_LONGEST_PAUSE", 1e6)
            monkeypatch.setattr(rpc_module, "_FIRST_PAUSE", 1e6)
        return result(request, "nonsense")

    def read(answer: Any) -> str:
        if answer == "nonsense":
            raise Unusable("no use")
        return str(answer)

    async def run() -> None:
        async with endpoint(nonsense) as one, endpoint(good) as two:
            rpc = Endpoints([one] if alone else [one, two], patience=60.0)
            if alone:
                with pytest.raises(ChainUnavailable, match="no use"):
                    await rpc.ask("getHealth", [], read)
            else:
                while len(asked) < 4:
                    assert await rpc.ask("getHealth", [], read) == "fine"
                    await asyncio.sleep(0.01)
            assert rpc._endpoints[0].failures == len(asked)
            await rpc.close()

    asyncio.run(asyncio.wait_for(run(), 300))
    pauses = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert len(pauses) >= 3
    # 0.2 s, doubled each time, a quarter more or less.
    assert all(pause >= 0.15 * 2**number for number, pause in enumerate(pauses))


def test_an_endpoint_whose_answers_are_of_use_again_is_preferred_again() -> None:
    useful = False

    async def first(request: dict[str, Any]) -> tuple[int, bytes, str]:
        return result(request, 1 if request["method"] == "getSlot" else "first" if useful else 0)

    def read(answer: Any) -> str:
        if not isinstance(answer, str):
            raise Unusable("no use")
        return answer

    async def run() -> None:
        nonlocal useful
        async with endpoint(first) as one, endpoint(good) as two:
            rpc = Endpoints([one, two])
            assert await rpc.ask("getHealth", [], read) == "fine"
            useful = True
            while await rpc.ask("getHealth", [], read) != "first":
                await asyncio.sleep(0.01)
            assert rpc._endpoints[0].failures == 0
            await rpc.close()

    asyncio.run(asyncio.wait_for(run(), 300))


def test_what_is_sent_many_ways_leaves_alone_who_asks_for_it() -> None:
    calls = {"first": 0, "second": 0}

    async def first(request: dict[str, Any]) -> tuple[int, bytes, str]:
        calls["first"] += 1
        return 429, b"", "retry-after: 20\r\n"

    async def second(request: dict[str, Any]) -> tuple[int, bytes, str]:
        calls["second"] += 1
        return result(request, 1)

    async def run() -> None:
        async with endpoint(first) as one, endpoint(second) as two:
            rpc = Endpoints([one, two])
            for _ in range(3):
                await rpc.spread("sendTransaction", [])
            assert calls == {"first": 1, "second": 3}
            await rpc.close()
            alone = Endpoints([one])
            for _ in range(3):
                await alone.spread("sendTransaction", [])
            assert calls["first"] == 2
            await alone.close()

    asyncio.run(asyncio.wait_for(run(), 300))


def test_nobody_waits_for_an_endpoint_that_hangs_once_another_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again by a probe beside the calls, which is what hangs then, and what finds it well again."""
    monkeypatch.setattr(rpc_module, "_IMPATIENT_SECONDS", 0.3)
    monkeypatch.setattr(rpc_module, "_PROBE_SECONDS", 0.3)
    hanging = asyncio.Event()
    probes = 0

    async def first(request: dict[str, Any]) -> tuple[int, bytes, str]:
        nonlocal probes
        if not hanging.is_set():
            probes += request["method"] == "getSlot"
            return await never(request)
        return result(request, "first")

    async def run() -> None:
        async with endpoint(first) as one, endpoint(good) as two:
            rpc = Endpoints([one, two], request_seconds=1000.0, patience=1000.0)
            assert await rpc.call("getHealth") == "fine"
            # If a call were what finds out, it would take as long as it may: the next time nobody is as impatient.
            monkeypatch.setattr(rpc_module, "_IMPATIENT_SECONDS", 1000.0)
            while probes == 0:
                async with asyncio.timeout(60):
                    assert await rpc.call("getHealth") == "fine"
                await asyncio.sleep(0.01)
            hanging.set()
            while await rpc.call("getHealth") != "first":
                await asyncio.sleep(0.01)
            await rpc.close()

    asyncio.run(asyncio.wait_for(run(), 300))


def test_calls_that_fail_together_are_one_failure() -> None:
    async def limited(request: dict[str, Any]) -> tuple[int, bytes, str]:
        return 503, b"", ""

    async def run() -> None:
        async with endpoint(limited) as only:
            rpc = Endpoints([only], patience=0.1)
            await asyncio.gather(*(rpc.call("getSlot") for _ in range(10)), return_exceptions=True)
            assert rpc._endpoints[0].failures <= 2
            await rpc.close()

    asyncio.run(asyncio.wait_for(run(), 300))


def test_an_endpoint_that_stays_away_is_warned_of_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rpc_module, "_LONGEST_PAUSE", 0.0)

    async def away(request: dict[str, Any]) -> tuple[int, bytes, str]:
        return 503, b"", ""

    async def run() -> int:
        async with endpoint(away) as only:
            rpc = Endpoints([only], patience=0.1)
            while rpc._endpoints[0].failures < 20:
                with pytest.raises(ChainUnavailable):
                    await rpc.call("getSlot")
            await rpc.close()
            return rpc._endpoints[0].failures

    failures = asyncio.run(asyncio.wait_for(run(), 300))
    warned = [record for record in caplog.records if record.levelname == "WARNING" and "failed" in record.message]
    assert len(warned) == failures.bit_length()


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        (None, None, None),
        ("2.5", 2.5, 2.5),
        ("-3", 0.0, 0.0),
        ("inf", None, None),
        ("soon", None, None),
        # Tests that run side by side must have the same names: none with the time in it.
        pytest.param(
            format_datetime(datetime.now(UTC) + timedelta(hours=9), usegmt=True), 3600, 9 * 3600, id="in nine hours"
        ),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0, 0.0),
        ("Wed, 21 Oct 99999999999999999999 07:28:00 GMT", None, None),
    ],
)
def test_how_long_an_endpoint_asks_to_be_left_alone(header: str | None, least: float | None, most: float) -> None:
    seconds = jsonrpc._seconds(header)
    assert seconds is None if least is None else seconds is not None and least <= seconds <= most


def test_too_many_requests_are_waited_out_as_long_as_asked() -> None:
    times: list[float] = []

    async def limited(request: dict[str, Any]) -> tuple[int, bytes, str]:
        times.append(time.monotonic())
        return (429, b"", "retry-after: 0.6\r\n") if len(times) == 1 else result(request, 1)

    async def run() -> None:
        async with endpoint(limited) as only:
            rpc = Endpoints([only])
            assert await rpc.call("getSlot") == 1
            (one,) = rpc._endpoints
            assert one.retry_at - one.failed_at == pytest.approx(0.6), "and no longer"
            await rpc.close()

    asyncio.run(run())
    assert times[1] - times[0] >= 0.6


def test_patience_is_bounded_and_the_message_names_every_endpoint_without_its_key() -> None:
    async def run() -> None:
        rpc = Endpoints([f"{DEAD}/secret-key?token=hush", "http://user:pass@127.0.0.1:10/"], patience=1.0)
        async with asyncio.timeout(rpc_module.PATIENCE_SECONDS - 5):
            with pytest.raises(ChainUnavailable) as unavailable:
                await rpc.call("getSlot")
        text = str(unavailable.value)
        assert "127.0.0.1:9 " in text
        assert "127.0.0.1:10 " in text
        assert not any(secret in text for secret in ("secret", "hush", "pass"))
        await rpc.close()

    asyncio.run(run())


@pytest.mark.parametrize("url", ["", "localhost:8899", "ws://x", "http://", "http://x:99999", "file:///etc/passwd"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(BadUrl, match="must look like"):
        Endpoints([url])


def test_no_endpoint_at_all_is_refused() -> None:
    with pytest.raises(BadUrl):
        Endpoints([])


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8899", "ws://127.0.0.1:8900"),
        ("https://api.devnet.solana.com", "wss://api.devnet.solana.com"),
        ("https://host/path/key?x=1", "wss://host/path/key?x=1"),
        ("http://[::1]:8899", "ws://[::1]:8900"),
        ("https://me:pw@host:443/", "wss://me:pw@host:444/"),
    ],
)
def test_where_the_websocket_is(url: str, expected: str) -> None:
    assert websocket_url(url) == expected
    assert json.dumps(shown_url(url)).count("pw") == 0
