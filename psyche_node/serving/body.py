"""Bodies within bounds, and clients that hang up."""

from __future__ import annotations

import asyncio
import json

from starlette.requests import ClientDisconnect, Request

from psyche_node.serving.errors import ApiError

_LARGEST = 8 << 20
_LEAST = 1 << 20
_BYTES_PER_TOKEN = 16
_SECONDS = 60.0
"""For a body to arrive; a slow one keeps its memory for so long at most."""


def largest_body(context: int | None) -> int:
    """Return how many bytes of a request are read, for a context window in tokens: what could fit, and room for tools.

    Parsing keeps all clients waiting, so there is no more of it than a long conversation needs.
    """
    return _LARGEST if context is None else min(_LARGEST, _LEAST + _BYTES_PER_TOKEN * context)


async def read_json(request: Request, largest: int) -> object:
    """Return a request's body of ``largest`` bytes at most.

    Raises:
        ApiError: it is not JSON, is too large, or takes too long. Only application/json is taken: a web page can make
            its reader's browser send other types to a server on localhost without asking that server first.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the body as JSON, with the header Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > largest:
                    raise ApiError(413, f"the body is larger than {largest} bytes", code="body_too_large")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_SECONDS:g} s") from None
    except ClientDisconnect:
        raise ApiError(499, "the client has closed the connection") from None
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None


async def gone(request: Request) -> None:
    """Return when the client has hung up. Call it after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
