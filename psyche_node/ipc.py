"""Typed messages between a node's processes, over an inherited Unix socket pair.

A frame is a 4-byte big-endian length and a JSON object ``{"id": int, "kind": str, "body": {...}}``. A request carries a
positive ``id`` and is answered by one frame with the same ``id``; an event carries ``id`` 0 and is not answered. Bulk
bytes never travel here: they cross as files, and the message names the file or its digest.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import select
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from psyche_node.exits import Exit, Reported, exit_for, message_of

log = logging.getLogger(__name__)
MAX_FRAME = 16 * 1024 * 1024
MAX_MESSAGE = 4096
_LENGTH = struct.Struct(">I")


class IpcError(Exception):
    """The peer process broke the framing, sent an unknown message, or is gone."""


class Message(BaseModel):
    """Base of everything that crosses between a node's processes; the class name is the kind on the wire."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    registry: ClassVar[dict[str, type[Message]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        other = Message.registry.get(cls.__name__)
        if other is not None and other.__module__ != cls.__module__:
            raise TypeError(f"two messages are called {cls.__name__}: in {other.__module__} and in {cls.__module__}")
        Message.registry[cls.__name__] = cls


class Ok(Message):
    """The reply of a request that has nothing to say."""


class Failure(Message):
    """The reply of a request that failed: the request's kind, and the error's class and message, which says what, where
    and what to do. ``exit_code``: what a node ends with that cannot go on without."""

    request: str
    error: str
    message: str
    exit_code: int = Exit.CHILD_PROCESS

    @classmethod
    def of(cls, request: str, error: BaseException) -> Failure:
        """What became of a request. The code is found here, where the error's class is known."""
        code = exit_for(error)
        return cls(
            request=request,
            error=type(error).__name__,
            message=message_of(error)[:MAX_MESSAGE],
            exit_code=Exit.CHILD_PROCESS if code is Exit.UNEXPECTED else code,
        )

    def __str__(self) -> str:
        return f"{self.request}: {self.error}: {self.message}"


class RemoteFailure(Reported, IpcError):
    """The process ``peer`` answered a request with an error instead of a reply."""

    def __init__(self, peer: str, failure: Failure) -> None:
        super().__init__(f"{peer}: {failure}")
        self.exit_code, self.there = failure.exit_code, (failure.error, failure.message)


M = TypeVar("M", bound=Message)


class Caller(Protocol):
    """Whom requests are put to: the endpoint of one child process, or of whichever one is alive."""

    async def call(self, message: Message, expect: type[M]) -> M:
        """Send a request and wait for its reply. Raises RemoteFailure (it said no) or IpcError (gone, or silent)."""


def encode_frame(request_id: int, message: Message) -> bytes:
    body = json.dumps(
        {"id": request_id, "kind": type(message).__name__, "body": message.model_dump(mode="json")}
    ).encode()
    if len(body) > MAX_FRAME:
        raise IpcError(f"{type(message).__name__} is {len(body)} bytes; a frame holds {MAX_FRAME}. Pass a file instead")
    return _LENGTH.pack(len(body)) + body


def decode_frame(body: bytes) -> tuple[int, Message]:
    """Return ``(request id, message)``. Raises IpcError for anything that is not a known message."""
    try:
        frame = json.loads(body)
        request_id, kind = frame["id"], Message.registry[frame["kind"]]
        if type(request_id) is not int or request_id < 0:
            raise ValueError("its id is not a whole number from 0 on")
        return request_id, kind.model_validate(frame["body"])
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        raise IpcError(f"not a message of this node's processes: {body[:120]!r} ({str(error)[:500]})") from error


class BlockingChannel:
    """The child's end: a blocking ``receive`` loop, and ``send`` from any thread."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        self._lock = threading.Lock()

    def receive(self) -> tuple[int, Message] | None:
        """Return the next frame, or None when the supervisor has closed its end (then the child ends, too)."""
        header = self._exactly(_LENGTH.size)
        if header is None:
            return None
        (length,) = _LENGTH.unpack(header)
        if length > MAX_FRAME:
            raise IpcError(f"a frame of {length} bytes exceeds {MAX_FRAME}")
        body = self._exactly(length)
        return None if body is None else decode_frame(body)

    def reply(self, request_id: int, message: Message) -> None:
        self.send(encode_frame(request_id, message))

    def send(self, frame: bytes) -> None:
        """Send an encoded frame whole. Raises ConnectionError when the supervisor is gone."""
        with self._lock:
            self._socket.sendall(frame)

    def event(self, message: Message) -> None:
        self.reply(0, message)

    def waiting(self) -> bool:
        """Whether the next frame is on its way, or the supervisor is gone: long work is then to be interrupted."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(0))

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, count: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < count:
            try:
                chunk = self._socket.recv(count - len(parts))
            except ConnectionResetError:
                return None
            if not chunk:
                return None
            parts += chunk
        return bytes(parts)


class Endpoint:
    """The supervisor's end of one child process: requests with replies, and a callback for events.

    ``patience`` is how many seconds a reply may take; None waits for as long as the process lives.
    """

    def __init__(
        self,
        name: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_event: Callable[[Message], None],
        patience: float | None = None,
    ) -> None:
        self.name = name
        self._reader, self._writer, self._on_event, self._patience = reader, writer, on_event, patience
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._next_id = 1
        self.closed = asyncio.Event()
        self.heard = False
        """Whether the process has ever said anything: before, it is still being started."""
        self._pump = asyncio.create_task(self._receive(), name=f"ipc-{name}")

    @classmethod
    async def over(
        cls, name: str, sock: socket.socket, on_event: Callable[[Message], None], patience: float | None = None
    ) -> Endpoint:
        sock.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        return cls(name, reader, writer, on_event, patience)

    async def call(self, message: Message, expect: type[M], patience: float | None = None) -> M:
        """Send a request and wait for its reply; ``patience`` is this one's own. Raises RemoteFailure (it said no) or
        IpcError (gone, or silent)."""
        what, patience = type(message).__name__, self._patience if patience is None else patience
        if self.closed.is_set():
            raise IpcError(f"the {self.name} process is gone; it cannot answer {what}")
        request_id, self._next_id = self._next_id, self._next_id + 1
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._pending[request_id] = future
        try:
            async with _patience(patience):
                self._writer.write(encode_frame(request_id, message))
                with contextlib.suppress(ConnectionError):  # then the pump fails the future, and says more
                    await self._writer.drain()
                reply = await future
        except TimeoutError:
            raise IpcError(f"the {self.name} process has not answered {what} within {patience:.0f} s") from None
        finally:
            self._pending.pop(request_id, None)
        if isinstance(reply, Failure):
            raise RemoteFailure(self.name, reply)
        if not isinstance(reply, expect):
            raise IpcError(f"{self.name} answered {what} with {type(reply).__name__}")
        return reply

    async def close(self) -> None:
        self._writer.close()
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)

    async def _receive(self) -> None:
        reason = "it closed its end"
        try:
            while True:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                if length > MAX_FRAME:
                    raise IpcError(f"a frame of {length} bytes exceeds {MAX_FRAME}")
                request_id, message = decode_frame(await self._reader.readexactly(length))
                self.heard = True
                if request_id == 0:
                    self._on_event(message)
                elif (future := self._pending.get(request_id)) is not None and not future.done():
                    future.set_result(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception as error:
            # Of the peer's framing or of the event handler: either way nobody listens any more, and all must know.
            reason = f"{type(error).__name__}: {error}"
            log.error("the conversation with the %s process ends: %s", self.name, reason, exc_info=error)
        finally:
            self.closed.set()
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(IpcError(f"the {self.name} process is gone: {reason}"))


@contextlib.asynccontextmanager
async def _patience(seconds: float | None) -> AsyncIterator[None]:
    """Raise TimeoutError after so long; None never does.

    In two halves, the second from when the first is seen to be over: if this process was stopped meanwhile (SIGSTOP, a
    machine asleep), the answer may be there and unread, and is read in the second.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        if seconds is None:
            yield
            return
        half = seconds / 2
        over = loop.call_later(half, lambda: limit.reschedule(loop.time() + half))
        try:
            yield
        finally:
            over.cancel()


def serve(channel: BlockingChannel, handle: Callable[[Message], Message]) -> None:
    """Run a child's request loop in this thread until the supervisor closes its end or ``handle`` raises SystemExit.

    An exception of ``handle`` becomes a Failure reply: a failed step leaves the round, never the process. Raises
    IpcError when the supervisor breaks the framing.
    """
    while (received := channel.receive()) is not None:
        request_id, message = received
        try:
            reply = encode_frame(request_id, handle(message))
        except Exception as error:
            # One that has an exit code says what it means, and the supervisor says it; of others, all is wanted.
            known = exit_for(error) is not Exit.UNEXPECTED
            log.log(logging.DEBUG if known else logging.ERROR, "%s failed", type(message).__name__, exc_info=True)
            reply = encode_frame(request_id, Failure.of(type(message).__name__, error))
        try:
            if request_id:
                channel.send(reply)
        except ConnectionError:
            return  # the supervisor is gone, and with it whoever wanted to know


__all__ = [
    "BlockingChannel",
    "Caller",
    "Endpoint",
    "Failure",
    "IpcError",
    "Message",
    "Ok",
    "RemoteFailure",
    "decode_frame",
    "encode_frame",
    "serve",
]
