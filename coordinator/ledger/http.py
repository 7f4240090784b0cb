"""A small HTTP/1.1 server for JSON-RPC: one POST, one answer, connections kept alive. Every size and time is bounded.

It takes requests in the event loop's thread, in order per connection, one request per turn of the loop, so that no
client can hold up the others by sending many at once. The next request of a connection waits for the answer to the one
before.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from typing import Final, NamedTuple

from coordinator.ledger.descriptors import ACCEPTED_PER_TURN, Room, deepen_backlog
from coordinator.ledger.reply import Answer, Reply

log = logging.getLogger(__name__)

MAX_HEADER_BYTES: Final = 16 * 1024
MAX_BODY_BYTES: Final = 512 * 1024
MAX_CONNECTIONS: Final = 1024
# A request must be complete this many seconds after its first byte, and an answer taken this many after it was given.
REQUEST_SECONDS: Final = 15.0
IDLE_SECONDS: Final = 120.0
_SWEEP_SECONDS: Final = 5.0
_CORS: Final = (
    "access-control-allow-origin: *\r\n"
    "access-control-allow-methods: POST, GET, OPTIONS\r\n"
    "access-control-allow-headers: *\r\n"
    "access-control-max-age: 86400\r\n"
)
_REASONS: Final = {
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    411: "Length Required",
    413: "Content Too Large",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}
_OK: Final = (f"HTTP/1.1 200 OK\r\n{_CORS}content-type: application/json\r\ncontent-length: %d\r\n\r\n").encode()
_HEADS: Final = 256
_HEAD_BYTES: Final = 1024
_LINGER_NOT: Final = struct.pack("ii", 1, 0)


class _Refuse(Exception):
    """The connection cannot go on: answer with a status and close."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class _Head(NamedTuple):
    """What matters of a request's header."""

    method: str
    path: str
    keep_alive: bool
    length: int
    expects_continue: bool


def _parse_head(head: bytes) -> _Head:
    """Raises _Refuse."""
    request_line, *lines = head.decode("latin-1").split("\r\n")
    words = request_line.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/"):
        raise _Refuse(400, "not an HTTP request")
    method, path, version = words
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise _Refuse(505, "use HTTP/1.1")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or not name or name != name.strip():
            raise _Refuse(400, "malformed header line")
        if name == "content-length" and name in headers and headers[name] != value.strip():
            raise _Refuse(400, "two different lengths")
        headers[name] = value.strip()
    connection = headers.get("connection", "").lower()
    keep_alive = "close" not in connection and (version == "HTTP/1.1" or "keep-alive" in connection)
    if "transfer-encoding" in headers:
        raise _Refuse(411, "send Content-Length; transfer encodings are not supported")
    length = headers.get("content-length", "0")
    # isdecimal alone admits other scripts' digits; latin-1 has none, but has superscripts, which it refuses.
    if not length.isdecimal() or len(length) > 12:
        raise _Refuse(400, "malformed Content-Length")
    if int(length) > MAX_BODY_BYTES:
        raise _Refuse(413, f"the body is over {MAX_BODY_BYTES} bytes")
    expects_continue = headers.get("expect", "").lower() == "100-continue"
    return _Head(method, path, keep_alive, int(length), expects_continue)


class _Connection(asyncio.Protocol):
    """One client. States: waiting for a header, waiting for a body of known length, waiting for the answer, closing."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._body_at = 0
        self._body_length = 0
        self._method = ""
        self._path = ""
        self._keep_alive = True
        self._in_body = False
        self._scheduled = False
        self._waiting = False
        self._end_of_input = False
        self._peer_writes_slowly = False
        self._finished = False
        self.since = self._loop.time()

    # ------------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not self._server.admit(self):
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.forget(self)

    def data_received(self, data: bytes) -> None:
        if self._finished or self._transport is None:
            return
        if not self._buffer:
            self.since = self._loop.time()
        self._buffer += data
        if len(self._buffer) > MAX_HEADER_BYTES + MAX_BODY_BYTES and not self._peer_writes_slowly:
            # More than one whole request is waiting: answer what is here before reading on.
            self._transport.pause_reading()
        if not self._waiting and not self._scheduled:
            self._turn()

    def pause_writing(self) -> None:
        self._peer_writes_slowly = True
        self.since = self._loop.time()
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._peer_writes_slowly = False
        self._schedule()

    def eof_received(self) -> bool:
        # A client that shut its side down still gets the answers to what it sent before.
        self._end_of_input = True
        return self._scheduled or self._waiting

    # ------------------------------------------------------------------ requests

    def overdue(self, now: float) -> bool:
        if self._waiting:
            return False
        busy = bool(self._buffer) or self._in_body or self._peer_writes_slowly
        return now - self.since > (REQUEST_SECONDS if busy else IDLE_SECONDS)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Answer at most one request; come back in the loop's next turn if there are more."""
        self._scheduled = False
        if self._transport is None or self._finished or self._peer_writes_slowly or self._waiting:
            return
        try:
            answered = self._one_request()
        except _Refuse as refuse:
            self._respond(refuse.status, refuse.text.encode(), "text/plain", close=True)
            return
        self._go_on(answered)

    def _go_on(self, answered: bool) -> None:
        if self._finished or self._waiting or self._transport is None:
            return
        if answered and self._buffer:
            self._schedule()
        elif self._end_of_input:
            self._finished = True
            self._transport.close()
        elif not self._peer_writes_slowly:
            self._transport.resume_reading()

    def _one_request(self) -> bool:
        if not self._in_body and not self._read_header():
            return False
        end = self._body_at + self._body_length
        if len(self._buffer) < end:
            return False
        body = bytes(self._buffer[self._body_at : end])
        del self._buffer[:end]
        self._in_body = False
        self.since = self._loop.time()
        self._route(body)
        return True

    def _read_header(self) -> bool:
        # Clients may send empty lines between requests.
        while self._buffer.startswith(b"\r\n"):
            del self._buffer[:2]
        end = self._buffer.find(b"\r\n\r\n", 0, MAX_HEADER_BYTES)
        if end < 0:
            if len(self._buffer) >= MAX_HEADER_BYTES:
                raise _Refuse(431, f"the header is over {MAX_HEADER_BYTES} bytes")
            return False
        head = self._server.head(bytes(self._buffer[:end]))
        self._method, self._path, self._keep_alive = head.method, head.path, head.keep_alive
        if head.expects_continue and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._body_at, self._body_length, self._in_body = end + 4, head.length, True
        return True

    def _route(self, body: bytes) -> None:
        if self._method == "POST":
            self._waiting = True
            self._server.answer(body, self._deliver)
        elif self._method == "OPTIONS":
            self._respond(204, b"", None)
        elif self._method == "GET" and self._path == "/health":
            self._respond(200, b"ok", "text/plain")
        elif self._method in ("GET", "HEAD"):
            raise _Refuse(405, "" if self._method == "HEAD" else "send a JSON-RPC request by POST")
        else:
            raise _Refuse(405, "send a JSON-RPC request by POST")

    def _deliver(self, reply: Reply) -> None:
        """The answer to the request that this connection waits for."""
        self._waiting = False
        self.since = self._loop.time()
        if self._transport is None:
            return
        if not reply.status:
            reset(self._transport)
            return
        if reply.status == 200 and self._keep_alive:
            self._transport.write(_OK % len(reply.body) + reply.body)
        elif reply.status == 200:
            self._respond(200, reply.body, "application/json")
        else:
            after = () if reply.retry_after is None else (f"retry-after: {reply.retry_after}",)
            self._respond(reply.status, reply.body, "text/plain", *after)
        if not self._scheduled:
            self._go_on(True)

    def _respond(self, status: int, body: bytes, content_type: str | None, *lines: str, close: bool = False) -> None:
        if self._transport is None:
            return
        close = close or not self._keep_alive
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\n{_CORS}"
        if content_type is not None:
            head += f"content-type: {content_type}\r\ncontent-length: {len(body)}\r\n"
        for line in lines:
            head += f"{line}\r\n"
        if close:
            head += "connection: close\r\n"
        self._transport.write(head.encode() + b"\r\n" + body)
        if close:
            self._finished = True
            self._buffer.clear()
            self._transport.close()


def reset(transport: asyncio.WriteTransport) -> None:
    """Close with a TCP reset, so that the other side learns that nothing more comes."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    transport.abort()


class HttpServer:
    """Serves `answer` on a host and port.

    Args:
        answer: called in the event loop for every POST; it must not raise.
        room: where its connections take their places.
    """

    def __init__(self, answer: Answer, room: Room) -> None:
        self.answer = answer
        self._room = room
        self._heads: dict[bytes, _Head] = {}
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port (the system's choice for 0). Raises OSError when it cannot."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), host, port, backlog=ACCEPTED_PER_TURN)
        deepen_backlog(self._server.sockets)
        self._sweeper = asyncio.create_task(self._sweep())
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            self._server.close()
        for connection in tuple(self._connections):
            connection.close()

    def head(self, head: bytes) -> _Head:
        """A header, parsed. Clients send the same one over and over: it is parsed once. Raises _Refuse."""
        known = self._heads.get(head)
        if known is None:
            known = _parse_head(head)
            if len(head) <= _HEAD_BYTES:
                if len(self._heads) >= _HEADS:
                    self._heads.clear()
                self._heads[head] = known
        return known

    def admit(self, connection: _Connection) -> bool:
        if len(self._connections) >= MAX_CONNECTIONS:
            log.warning("refused a connection: %d are open, which is the limit", MAX_CONNECTIONS)
            return False
        if not self._room.take():
            return False
        self._connections.add(connection)
        return True

    def forget(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._room.leave()

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            now = loop.time()
            for connection in tuple(self._connections):
                if connection.overdue(now):
                    connection.close()
