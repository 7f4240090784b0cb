"""What the fuzzed code has at the other end: the context of a call, a libp2p stream, a gRPC channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc


class Aborted(Exception):
    """What a call's context raises when a method ends the call."""


class Context:
    """A call's context, as gRPC gives it to a method."""

    def __init__(self) -> None:
        self.ended: Callable[[], None] = lambda: None
        self.aborted: grpc.StatusCode | None = None
        self.where = "ipv4:127.0.0.1:5"

    def abort(self, code: grpc.StatusCode, reason: str) -> None:
        assert code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.OK)
        self.aborted = code
        raise Aborted(reason)

    def cancel(self) -> None:
        pass

    def peer(self) -> str:
        return self.where

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.ended = callback
        return True


class Stream:
    """A libp2p stream that gives what was sent before, in small and large parts, and then ends."""

    muxed_conn: Any = None
    metric_send_channel = None

    async def reset(self) -> None:
        """It ends anyway."""

    def __init__(self, data: bytes, part: int) -> None:
        self._data, self._at, self._part = data, 0, part

    async def read(self, n: int | None = None) -> bytes:
        """What libp2p's streams do."""
        size = min(self._part, len(self._data) if n is None or n < 0 else n)
        self._at += size
        return self._data[self._at - size : self._at]


class Peer:
    """The far end of a gRPC channel: it answers with the bytes it is told to."""

    def __init__(self) -> None:
        self.reply, self.pieces = b"", list[bytes]()

    def unary_unary(self, path: str) -> Callable[..., bytes]:
        return lambda raw, timeout: self.reply

    def unary_stream(self, path: str) -> Callable[..., Any]:
        return lambda raw, timeout: _Call(self.pieces)


class _Call:
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = iter(pieces)

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def cancel(self) -> None:
        self._pieces = iter(())
