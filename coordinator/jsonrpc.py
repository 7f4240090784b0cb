"""One JSON-RPC call at one RPC endpoint, over HTTP: what is sent, what an answer must be, and how it can fail.

The transport is httpx2 (solana-py's own) with JSON read here; why: docs/decisions/0018-chain-client.md.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx2

# It logs every request at INFO, several per second; what matters of them is logged where endpoints are chosen.
logging.getLogger("httpx2").setLevel(logging.WARNING)

Json = Any

MAX_RESPONSE_BYTES: Final = 32 * 2**20
NO_SHAPE: Final = "the answer does not have Solana's shape; is the URL right?"
# Errors of an endpoint, not of the request: another endpoint, or the same one a little later, can do better.
# Internal error, node unhealthy, block not available yet, and two forms of rate limit.
_PASSING_ERRORS: Final = frozenset({-32603, -32005, -32004, -32014, -32429, 429})
# The endpoint has not reached the slot asked for: well, but behind.
_BEHIND: Final = -32016
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


class RpcError(ChainError):
    """An endpoint understood the request and refused it: `code`, `message` and `data` are those of JSON-RPC.

    `not_offered`: because it does not offer such a thing; another endpoint may.
    """

    def __init__(self, method: str, code: int, message: str, data: Json = None) -> None:
        self.not_offered = code in _NOT_OFFERED
        advice = "; set an RPC endpoint that offers it" if self.not_offered else ""
        super().__init__(f"{method} refused by the RPC endpoint: {message} (code {code}){advice}")
        self.code = code
        self.message = message
        self.data = data


class Unusable(Exception):
    """Raised by what reads an answer: the answer is not what was asked for, another endpoint may do better.

    `behind`: because it is from a slot before one that was seen.
    """

    def __init__(self, reason: str, *, behind: bool = False) -> None:
        super().__init__(reason)
        self.behind = behind


class AttemptFailed(Exception):
    """One attempt at one endpoint failed; `retry_after` is what it asked for, in seconds.

    `behind`: it has not reached the slot asked for. `unusable`: its answer was not what was asked for.
    """

    def __init__(
        self, reason: str, retry_after: float | None = None, *, behind: bool = False, unusable: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after
        self.behind = behind
        self.unusable = unusable


def integer(value: Json) -> int:
    """A number as Solana has them, 64 bits without a sign. Raises Unusable for anything else that JSON can hold."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise Unusable(NO_SHAPE)
    return value


@dataclass(frozen=True, slots=True)
class Request:
    """One call: its method, its identity, and the bytes that are sent."""

    method: str
    identity: int
    body: bytes


@dataclass(slots=True)
class Traffic:
    """What this client has asked for and received, in requests and in bytes (HTTP headers and bodies)."""

    requests: int = 0
    received: int = 0


class Transport:
    """The HTTP connections of one client, and what went over them.

    Args:
        request_seconds: the time that one attempt may take at most.
    """

    def __init__(self, request_seconds: float) -> None:
        self._http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(request_seconds),
            follow_redirects=False,
            # Answers are small; a compressed one could be a bomb.
            headers={"content-type": "application/json", "accept-encoding": "identity"},
        )
        self._request_seconds = request_seconds
        self._identity = 0
        self.traffic = Traffic()

    async def close(self) -> None:
        await self._http.aclose()

    def request(self, method: str, params: Sequence[Json]) -> Request:
        """A call under an identity of its own, which every attempt at it has."""
        self._identity += 1
        body = {"jsonrpc": "2.0", "id": self._identity, "method": method, "params": list(params)}
        return Request(method, self._identity, json.dumps(body).encode())

    async def attempt(self, url: str, request: Request, seconds: float) -> Json:
        """The result of one attempt at one endpoint. Raises AttemptFailed or RpcError."""
        try:
            # The whole attempt is bounded: httpx2's own limits are per read, so a trickle would pass them.
            async with asyncio.timeout(min(self._request_seconds, max(seconds, 0.05))):
                return await self._post(url, request)
        except TimeoutError:
            raise AttemptFailed("no answer in time") from None
        except httpx2.HTTPError as error:
            raise AttemptFailed(str(error) or type(error).__name__) from error

    async def _post(self, url: str, request: Request) -> Json:
        self.traffic.requests += 1
        async with self._http.stream("POST", url, content=request.body) as response:
            self.traffic.received += sum(len(name) + len(value) + 4 for name, value in response.headers.raw)
            if response.status_code == 429:
                raise AttemptFailed("too many requests (429)", _seconds(response.headers.get("retry-after")))
            if response.status_code != 200:
                reason = f"HTTP status {response.status_code}"
                if response.status_code in _STATUS_ADVICE:
                    reason += f": {_STATUS_ADVICE[response.status_code]}"
                raise AttemptFailed(reason, _seconds(response.headers.get("retry-after")))
            received = bytearray()
            async for part in response.aiter_bytes():
                received += part
                if len(received) > MAX_RESPONSE_BYTES:
                    raise AttemptFailed(f"the answer is over {MAX_RESPONSE_BYTES} bytes")
        self.traffic.received += len(received)
        return _result(request.method, request.identity, received)


def _result(method: str, identity: int, received: bytearray) -> Json:
    try:
        answer = json.loads(received)
    except (ValueError, RecursionError):
        raise AttemptFailed("the answer is not JSON") from None
    if not isinstance(answer, dict):
        raise AttemptFailed("the answer is not a JSON-RPC object")
    if answer.get("id") not in (identity, None):
        raise AttemptFailed("the answer belongs to another request")
    error = answer.get("error")
    if error is None:
        if "result" not in answer:
            raise AttemptFailed("the answer has neither result nor error")
        return answer["result"]
    code = error.get("code") if isinstance(error, dict) else None
    if not isinstance(code, int):
        raise AttemptFailed("the answer's error has no code")
    message = str(error.get("message", ""))[:500]
    if code == _BEHIND:
        raise AttemptFailed(f"{message} (code {code})", behind=True)
    if code in _PASSING_ERRORS:
        raise AttemptFailed(f"{message} (code {code})")
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
