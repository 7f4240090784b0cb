"""JSON-RPC calls to Solana RPC endpoints: fail-over and return, back-off, rate limits, and a bound on everything.

The transport is httpx2 (solana-py's own) with JSON read here; why: docs/decisions/0018-chain-client.md.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx2

log = logging.getLogger(__name__)
# It logs every request at INFO, several per second; what matters of them is logged here.
logging.getLogger("httpx2").setLevel(logging.WARNING)

Json = Any
T = TypeVar("T")

MAX_RESPONSE_BYTES: Final = 32 * 2**20
REQUEST_SECONDS: Final = 10.0
PATIENCE_SECONDS: Final = 30.0
NO_SHAPE: Final = "the answer does not have Solana's shape; is the URL right?"
# With another endpoint at hand nobody waits as long for one that hangs.
_IMPATIENT_SECONDS: Final = 4.0
_PROBE_SECONDS: Final = 4.0
_FIRST_PAUSE: Final = 0.2
_LONGEST_PAUSE: Final = 8.0
_LONGEST_RETRY_AFTER: Final = 30.0
# Errors of an endpoint, not of the request: another endpoint, or the same one a little later, can do better.
# Internal error, node unhealthy, block not available yet, and two forms of rate limit.
_PASSING_ERRORS: Final = frozenset({-32603, -32005, -32004, -32014, -32429, 429})
# The endpoint has not reached the slot asked for: well, but behind.
_BEHIND: Final = -32016
_BEHIND_PAUSE: Final = 0.4
# Not offered here (no such method, index switched off, history not kept): another endpoint may offer it.
_NOT_OFFERED: Final = frozenset({-32601, -32010, -32011})
_STATUS_ADVICE: Final = {
    401: "it wants a key; check the one in the URL",
    403: "it refuses this client; check the key in the URL",
    404: "nothing is served at this path; check the URL",
    413: "the request is too large for it",
}


class ChainError(Exception):
    """Anything that goes wrong between this process and the chain."""


class ChainUnavailable(ChainError):
    """No endpoint gave a usable answer in the time allowed. Trying again later may help.

    `behind`: an endpoint did answer, and has not reached a slot that was seen before.
    """

    behind = False


class RpcError(ChainError):
    """An endpoint understood the request and refused it: `code`, `message` and `data` are those of JSON-RPC."""

    def __init__(self, method: str, code: int, message: str, data: Json = None) -> None:
        advice = "; set an RPC endpoint that offers it" if code in _NOT_OFFERED else ""
        super().__init__(f"{method} refused by the RPC endpoint: {message} (code {code}){advice}")
        self.code = code
        self.message = message
        self.data = data


class Unusable(Exception):
    """Raised by a `read` of `Endpoints.ask`: the answer is not what was asked for, another endpoint may do better.

    `behind`: because it is from a slot before one that was seen.
    """

    def __init__(self, reason: str, *, behind: bool = False) -> None:
        super().__init__(reason)
        self.behind = behind


def integer(value: Json) -> int:
    """A number as Solana has them, 64 bits without a sign. Raises Unusable for anything else that JSON can hold."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise Unusable(NO_SHAPE)
    return value


class BadUrl(ChainError, ValueError):
    """A setting that is not the URL of an RPC endpoint."""


@dataclass(slots=True, eq=False)
class _Endpoint:
    """`failures` counts those since the last success: 0 is an endpoint that may be used at once.

    `doubtful`: its last failure was an answer that could not be used. `on_trial`: it is, and answers a probe, which
    proves no more than that it may be asked again.
    """

    url: str
    shown: str
    failures: int = 0
    failed_at: float = -math.inf
    retry_at: float = 0.0
    reason: str = field(default="not tried")
    behind: bool = False
    doubtful: bool = False
    on_trial: bool = False

    @property
    def works(self) -> bool:
        return self.failures == 0 or self.on_trial

    def answered(self, began: float) -> None:
        """It gave a usable answer to what was asked at `began`: older failures are over, but not younger ones."""
        if began >= self.failed_at:
            self.failures, self.doubtful, self.on_trial = 0, False, False


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    identity: int
    body: bytes


@dataclass(slots=True)
class Traffic:
    """What this client has asked for and received, in requests and in bytes (HTTP headers and bodies)."""

    requests: int = 0
    received: int = 0


class _Failed(Exception):
    """One attempt at one endpoint failed; `retry_after` is what it asked for, in seconds."""

    def __init__(
        self, reason: str, retry_after: float | None = None, *, behind: bool = False, unusable: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after
        self.behind = behind
        self.unusable = unusable


def shown_url(url: str) -> str:
    """A URL for logs and messages: providers put keys into paths and queries, so only scheme and host remain."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def check_url(url: str) -> str:
    """Raises BadUrl unless it is http(s)://host..."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise BadUrl(f"{url!r} is not the URL of an RPC endpoint; it must look like http://127.0.0.1:8899")
    return url


def websocket_url(url: str) -> str:
    """Where Solana's WebSocket is for an RPC URL: the next port, or the same address where no port is given."""
    parts = urlsplit(check_url(url))
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    if parts.username:
        host = parts.netloc.rpartition("@")[0] + "@" + host
    if parts.port is not None:
        host += f":{parts.port + 1}"
    scheme = "wss" if parts.scheme == "https" else "ws"
    return urlunsplit((scheme, host, parts.path, parts.query, ""))


class Endpoints:
    """Several RPC endpoints used as one, in order of preference.

    The first that works is asked. One that fails is left alone for a pause and then tried with a probe, not with a call
    that somebody waits for, unless there is no other; when the probe is answered, it is preferred again.

    Args:
        urls: at least one http(s) URL.
        request_seconds: the time that one attempt may take.
        patience: the time that a call may take with all its attempts, in seconds.
        commitment: the level at which slots are counted.

    Raises:
        BadUrl: for a setting that is not a URL.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        request_seconds: float = REQUEST_SECONDS,
        patience: float = PATIENCE_SECONDS,
        commitment: str = "confirmed",
    ) -> None:
        if not urls:
            raise BadUrl("no RPC endpoint is given; set at least one URL such as http://127.0.0.1:8899")
        self._endpoints = [_Endpoint(check_url(url), shown_url(url)) for url in urls]
        self._patience = patience
        self._commitment = commitment
        self._http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(request_seconds),
            follow_redirects=False,
            # Answers are small; a compressed one could be a bomb.
            headers={"content-type": "application/json", "accept-encoding": "identity"},
        )
        self._request_seconds = request_seconds
        self._identity = 0
        self._probes: dict[_Endpoint, asyncio.Task[None]] = {}
        self.traffic = Traffic()
        self.seen_slot = 0
        """The newest slot that an answer was from. Reads never go back behind it, whichever endpoint answers."""

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(endpoint.url for endpoint in self._endpoints)

    async def close(self) -> None:
        for probe in self._probes.values():
            probe.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)
        await self._http.aclose()

    def saw_slot(self, slot: int) -> None:
        # No slot is larger, and a number that is could not be reckoned with.
        if slot < 2**64:
            self.seen_slot = max(self.seen_slot, slot)

    async def call(self, method: str, params: Sequence[Json] = (), *, patience: float | None = None) -> Json:
        """The result of one JSON-RPC call as it is; raises as `ask` does."""
        return await self.ask(method, params, lambda answer: answer, patience=patience)

    async def ask(
        self, method: str, params: Sequence[Json], read: Callable[[Json], T], *, patience: float | None = None
    ) -> T:
        """The result of one JSON-RPC call, as `read` gives it; where `read` raises Unusable, the next one is asked.

        Only use it for calls that may be made twice: an attempt that failed half-way may have had its effect.

        Raises:
            RpcError: the endpoint refused the request as such.
            ChainUnavailable: no endpoint gave an answer within `patience` seconds.
        """
        loop = asyncio.get_running_loop()
        allowed = self._patience if patience is None else patience
        deadline = loop.time() + allowed
        request = self._request(method, params)
        refused: dict[_Endpoint, RpcError] = {}
        while True:
            offering = [one for one in self._endpoints if one not in refused]
            if not offering:
                raise next(iter(refused.values()))
            endpoint = self._choose(offering)
            pause = max(endpoint.retry_at - loop.time(), 0.0)
            if loop.time() + pause >= deadline:
                raise self._unavailable(method, allowed)
            if pause > 0:
                await asyncio.sleep(pause)
            seconds = deadline - loop.time()
            if any(other is not endpoint and other.works for other in offering):
                seconds = min(seconds, _IMPATIENT_SECONDS)
            began = loop.time()
            try:
                answer = read(await self._timed(endpoint, request, seconds))
                endpoint.answered(began)
                return answer
            except _Failed as failed:
                self._pause(endpoint, method, failed)
            except Unusable as unusable:
                self._pause(endpoint, method, _Failed(str(unusable), behind=unusable.behind, unusable=True))
            except RpcError as error:
                if error.code not in _NOT_OFFERED:
                    raise
                refused[endpoint] = error

    async def spread(self, method: str, params: Sequence[Json]) -> None:
        """Make a call at every endpoint that works, whatever they answer; for what is worth sending many ways.

        Does nothing while all are in a pause: one that asks to be left alone is.
        """
        now = asyncio.get_running_loop().time()
        rested = [one for one in self._endpoints if one.retry_at <= now]
        working = [one for one in rested if one.works] or rested[:1]
        request = self._request(method, params)

        async def one_way(endpoint: _Endpoint) -> None:
            try:
                await self._timed(endpoint, request, _IMPATIENT_SECONDS)
            except _Failed as failed:
                self._pause(endpoint, method, failed)
            except RpcError as error:
                log.debug("%s: %s", endpoint.shown, error)

        await asyncio.gather(*(one_way(endpoint) for endpoint in working))

    # ------------------------------------------------------------------ which endpoint

    def _choose(self, offering: Sequence[_Endpoint]) -> _Endpoint:
        now = asyncio.get_running_loop().time()
        working = next((one for one in offering if one.works), None)
        if working is None:
            return min(offering, key=lambda one: max(one.retry_at - now, 0.0))
        for better in offering[: offering.index(working)]:
            if better.retry_at <= now and better not in self._probes:
                self._probes[better] = asyncio.create_task(self._probe(better))
        return working

    async def _probe(self, endpoint: _Endpoint) -> None:
        """Ask a failed endpoint for its slot: it is back when it has the one that was seen last."""
        options = {"commitment": self._commitment, "minContextSlot": self.seen_slot}
        began = asyncio.get_running_loop().time()
        try:
            await self._timed(endpoint, self._request("getSlot", [options]), _PROBE_SECONDS)
        except _Failed as failed:
            self._pause(endpoint, "getSlot", failed)
        except RpcError as error:
            self._pause(endpoint, "getSlot", _Failed(error.message))
        else:
            if endpoint.doubtful:
                # Whether it answers better what it answered badly, the next call finds out; until then its pauses grow.
                endpoint.on_trial = began >= endpoint.failed_at
            else:
                endpoint.answered(began)
                log.info("%s: works again and is preferred", endpoint.shown)
        finally:
            self._probes.pop(endpoint, None)

    def _pause(self, endpoint: _Endpoint, method: str, failed: _Failed) -> None:
        now = asyncio.get_running_loop().time()
        endpoint.reason, endpoint.behind = failed.reason, failed.behind
        endpoint.doubtful, endpoint.on_trial = failed.unusable, False
        if another := now >= endpoint.retry_at:
            # Calls that were under way together fail together: that is one failure.
            endpoint.failures += 1
        endpoint.failed_at = now
        pause = min(_FIRST_PAUSE * 2 ** min(endpoint.failures - 1, 10), _LONGEST_PAUSE)
        if failed.behind:
            pause = min(pause, _BEHIND_PAUSE)
        pause *= random.uniform(0.75, 1.25)
        if failed.retry_after is not None:
            pause = min(max(pause, failed.retry_after), _LONGEST_RETRY_AFTER)
        endpoint.retry_at = max(endpoint.retry_at, now + pause)
        # The 1st, 2nd, 4th, 8th in a row: an endpoint that stays away is no news every time.
        news = another and endpoint.failures.bit_count() == 1 and not failed.behind
        level = logging.WARNING if news else logging.DEBUG
        log.log(level, "%s: %s failed (%s); next attempt there in %.1f s", endpoint.shown, method, failed.reason, pause)

    def _unavailable(self, method: str, allowed: float) -> ChainUnavailable:
        tried = ", ".join(f"{endpoint.shown} ({endpoint.reason})" for endpoint in self._endpoints)
        unavailable = ChainUnavailable(
            f"no RPC endpoint answered {method} within {allowed:.0f} s: {tried}; "
            "check that the URL is right and that the endpoint is running and reachable"
        )
        unavailable.behind = any(endpoint.behind for endpoint in self._endpoints)
        return unavailable

    # ------------------------------------------------------------------ one attempt

    def _request(self, method: str, params: Sequence[Json]) -> _Request:
        self._identity += 1
        body = {"jsonrpc": "2.0", "id": self._identity, "method": method, "params": list(params)}
        return _Request(method, self._identity, json.dumps(body).encode())

    async def _timed(self, endpoint: _Endpoint, request: _Request, seconds: float) -> Json:
        """One attempt. Raises _Failed or RpcError."""
        try:
            # The whole attempt is bounded: httpx2's own limits are per read, so a trickle would pass them.
            async with asyncio.timeout(min(self._request_seconds, max(seconds, 0.05))):
                return await self._attempt(endpoint, request)
        except TimeoutError:
            raise _Failed("no answer in time") from None
        except httpx2.HTTPError as error:
            raise _Failed(str(error) or type(error).__name__) from error

    async def _attempt(self, endpoint: _Endpoint, request: _Request) -> Json:
        self.traffic.requests += 1
        async with self._http.stream("POST", endpoint.url, content=request.body) as response:
            self.traffic.received += sum(len(name) + len(value) + 4 for name, value in response.headers.raw)
            if response.status_code == 429:
                raise _Failed("too many requests (429)", _seconds(response.headers.get("retry-after")))
            if response.status_code != 200:
                reason = f"HTTP status {response.status_code}"
                if response.status_code in _STATUS_ADVICE:
                    reason += f": {_STATUS_ADVICE[response.status_code]}"
                raise _Failed(reason, _seconds(response.headers.get("retry-after")))
            received = bytearray()
            async for part in response.aiter_bytes():
                received += part
                if len(received) > MAX_RESPONSE_BYTES:
                    raise _Failed(f"the answer is over {MAX_RESPONSE_BYTES} bytes")
        self.traffic.received += len(received)
        return _result(request.method, request.identity, received)


def _result(method: str, identity: int, received: bytearray) -> Json:
    try:
        answer = json.loads(received)
    except (ValueError, RecursionError):
        raise _Failed("the answer is not JSON") from None
    if not isinstance(answer, dict):
        raise _Failed("the answer is not a JSON-RPC object")
    if answer.get("id") not in (identity, None):
        raise _Failed("the answer belongs to another request")
    error = answer.get("error")
    if error is None:
        if "result" not in answer:
            raise _Failed("the answer has neither result nor error")
        return answer["result"]
    code = error.get("code") if isinstance(error, dict) else None
    if not isinstance(code, int):
        raise _Failed("the answer's error has no code")
    message = str(error.get("message", ""))[:500]
    if code == _BEHIND:
        raise _Failed(f"{message} (code {code})", behind=True)
    if code in _PASSING_ERRORS:
        raise _Failed(f"{message} (code {code})")
    raise RpcError(method, code, message, error.get("data"))


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds, given as such or as a date; None where it is neither."""
    if header is None:
        return None
    try:
        return max(float(header), 0.0) if math.isfinite(float(header)) else None
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
    except (ValueError, OverflowError):
        return None
    return max((date - datetime.now(UTC)).total_seconds(), 0.0) if date.tzinfo is not None else None
