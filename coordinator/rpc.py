"""JSON-RPC calls to Solana RPC endpoints: fail-over, back-off, rate limits, and a bound on everything.

The transport is httpx2 (solana-py's own) with JSON read here: solana-py reads answers of any size, hides Retry-After,
and its parser panics on some error objects, none of which a node may take from an endpoint that it does not trust.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import httpx2

log = logging.getLogger(__name__)
# It logs every request at INFO, several per second; what matters of them is logged here.
logging.getLogger("httpx2").setLevel(logging.WARNING)

Json = Any

MAX_RESPONSE_BYTES: Final = 32 * 2**20
REQUEST_SECONDS: Final = 10.0
PATIENCE_SECONDS: Final = 30.0
_FIRST_PAUSE: Final = 0.2
_LONGEST_PAUSE: Final = 8.0
_LONGEST_RETRY_AFTER: Final = 30.0
# Errors of an endpoint, not of the request: another endpoint, or the same one a little later, can do better.
# Internal error, node unhealthy, block not available yet, minContextSlot not reached, and two forms of rate limit.
_PASSING_ERRORS: Final = frozenset({-32603, -32005, -32004, -32014, -32016, -32429, 429})


class ChainError(Exception):
    """Anything that goes wrong between this process and the chain."""


class ChainUnavailable(ChainError):
    """No endpoint gave a usable answer in the time allowed. Trying again later may help."""


class RpcError(ChainError):
    """An endpoint understood the request and refused it: `code`, `message` and `data` are those of JSON-RPC."""

    def __init__(self, method: str, code: int, message: str, data: Json = None) -> None:
        super().__init__(f"{method} refused by the RPC endpoint: {message} (code {code})")
        self.code = code
        self.message = message
        self.data = data


class BadUrl(ChainError, ValueError):
    """A setting that is not the URL of an RPC endpoint."""


@dataclass(slots=True)
class _Endpoint:
    url: str
    shown: str
    failures: int = 0
    retry_at: float = 0.0
    reason: str = field(default="not tried")


class _Failed(Exception):
    """One attempt at one endpoint failed; `retry_after` is what it asked for, in seconds."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after


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
    """Several RPC endpoints used as one. The first that is not in a pause is asked; the order is one of preference.

    Args:
        urls: at least one http(s) URL.
        request_seconds: the time that one attempt may take.
        patience: the time that a call may take with all its attempts, in seconds.

    Raises:
        BadUrl: for a setting that is not a URL.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        request_seconds: float = REQUEST_SECONDS,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        if not urls:
            raise BadUrl("no RPC endpoint is given; set at least one URL such as http://127.0.0.1:8899")
        self._endpoints = [_Endpoint(check_url(url), shown_url(url)) for url in urls]
        self._patience = patience
        self._http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(request_seconds),
            follow_redirects=False,
            # Answers are small; a compressed one could be a bomb.
            headers={"content-type": "application/json", "accept-encoding": "identity"},
        )
        self._request_seconds = request_seconds
        self._identity = 0

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(endpoint.url for endpoint in self._endpoints)

    async def close(self) -> None:
        await self._http.aclose()

    async def call(self, method: str, params: Sequence[Json] = (), *, patience: float | None = None) -> Json:
        """The result of one JSON-RPC call.

        Only use it for calls that may be made twice: an attempt that failed half-way may have had its effect.

        Raises:
            RpcError: the endpoint refused the request as such.
            ChainUnavailable: no endpoint gave an answer within `patience` seconds.
        """
        self._identity += 1
        identity = self._identity
        body = json.dumps({"jsonrpc": "2.0", "id": identity, "method": method, "params": list(params)}).encode()
        loop = asyncio.get_running_loop()
        allowed = self._patience if patience is None else patience
        deadline = loop.time() + allowed
        while True:
            endpoint = min(self._endpoints, key=lambda one: max(one.retry_at - loop.time(), 0.0))
            pause = endpoint.retry_at - loop.time()
            if loop.time() + max(pause, 0.0) >= deadline:
                raise self._unavailable(method, allowed)
            if pause > 0:
                await asyncio.sleep(pause)
            try:
                # The whole attempt is bounded: httpx2's own limits are per read, so a trickle would pass them.
                async with asyncio.timeout(min(self._request_seconds, max(deadline - loop.time(), 0.05))):
                    result = await self._attempt(endpoint, method, body, identity)
            except _Failed as failed:
                self._pause(endpoint, method, failed.reason, failed.retry_after)
            except TimeoutError:
                self._pause(endpoint, method, "no answer in time", None)
            except httpx2.HTTPError as error:
                self._pause(endpoint, method, str(error) or type(error).__name__, None)
            else:
                endpoint.failures = 0
                return result

    def _pause(self, endpoint: _Endpoint, method: str, reason: str, retry_after: float | None) -> None:
        endpoint.failures += 1
        endpoint.reason = reason
        pause = min(_FIRST_PAUSE * 2 ** min(endpoint.failures - 1, 10), _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
        if retry_after is not None:
            pause = min(max(pause, retry_after), _LONGEST_RETRY_AFTER)
        endpoint.retry_at = asyncio.get_running_loop().time() + pause
        log.warning("%s: %s failed (%s); next attempt there in %.1f s", endpoint.shown, method, reason, pause)

    def _unavailable(self, method: str, allowed: float) -> ChainUnavailable:
        tried = ", ".join(f"{endpoint.shown} ({endpoint.reason})" for endpoint in self._endpoints)
        return ChainUnavailable(
            f"no RPC endpoint answered {method} within {allowed:.0f} s: {tried}; "
            "check that the URL is right and that the endpoint is running and reachable"
        )

    async def _attempt(self, endpoint: _Endpoint, method: str, body: bytes, identity: int) -> Json:
        async with self._http.stream("POST", endpoint.url, content=body) as response:
            if response.status_code == 429:
                raise _Failed("too many requests (429)", _seconds(response.headers.get("retry-after")))
            if response.status_code != 200:
                raise _Failed(f"HTTP status {response.status_code}", _seconds(response.headers.get("retry-after")))
            received = bytearray()
            async for part in response.aiter_bytes():
                received += part
                if len(received) > MAX_RESPONSE_BYTES:
                    raise _Failed(f"the answer is over {MAX_RESPONSE_BYTES} bytes")
        return _result(method, identity, received)


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
    if code in _PASSING_ERRORS:
        raise _Failed(f"{message} (code {code})")
    raise RpcError(method, code, message, error.get("data"))


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds; its other form, a date, is as good as none."""
    try:
        return None if header is None else max(float(header), 0.0)
    except ValueError:
        return None
