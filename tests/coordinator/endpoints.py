"""Endpoints that misbehave on purpose: in front of a ledger, or instead of one."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx2

Handler = Callable[[dict[str, Any]], Awaitable[tuple[int, bytes, str]]]


def result(request: dict[str, Any], value: Any) -> tuple[int, bytes, str]:
    return 200, json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": value}).encode(), ""


def failure(request: dict[str, Any], code: int, message: str) -> tuple[int, bytes, str]:
    error = {"code": code, "message": message}
    return 200, json.dumps({"jsonrpc": "2.0", "id": request["id"], "error": error}).encode(), ""


@contextlib.asynccontextmanager
async def endpoint(handler: Handler, port: int = 0) -> AsyncIterator[str]:
    """An HTTP server that answers every request with what `handler` says: status, body, header lines.

    A status of 0 closes the connection without an answer.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length:")[2].partition("\r\n")[0])
                status, body, headers = await handler(json.loads(await reader.readexactly(length)))
                if status == 0:
                    return
                writer.write(f"HTTP/1.1 {status} x\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def forwarding(rpc: str, change: Callable[[dict[str, Any]], Awaitable[tuple[int, bytes, str] | None]]) -> Handler:
    """A handler that passes requests on to a ledger, unless `change` answers them itself."""

    async def handle(request: dict[str, Any]) -> tuple[int, bytes, str]:
        answer = await change(request)
        return answer if answer is not None else await forward(rpc, request)

    return handle


async def forward(rpc: str, request: dict[str, Any]) -> tuple[int, bytes, str]:
    async with httpx2.AsyncClient(timeout=90) as client:
        return 200, (await client.post(rpc, json=request)).content, ""


class Relay:
    """A relay of a ledger's WebSocket that can be cut: connections are closed and new ones refused."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.accepted = 0

    async def up(self, port: int) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", port)

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._target)
        ends = {writer, inner_writer}
        self._writers |= ends
        try:
            await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))
        except OSError:
            pass
        finally:
            self._writers -= ends
            for end in ends:
                end.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while part := await reader.read(65536):
        writer.write(part)
        await writer.drain()
    writer.close()
