"""The exchange of node records between two connected peers: libp2p protocol /psyche/records/1.

It is the one thing that a node does for a peer that is not a member (yet): everybody starts as a stranger who knows one
address. Each side sends what it knows, the dialler first; a 4-byte length and a Records message.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Awaitable, Callable

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.io.utils import read_exactly

from psyche_node.network.cap import Cap
from psyche_node.network.directory import Directory
from psyche_node.network.host import Handlers, key_of, peer_of, reset
from psyche_node.network.statements import Malformed
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
PROTOCOL = TProtocol("/psyche/records/1")
MAX_BYTES = 1 << 20
MAX_RECORDS = 300
SECONDS = 10.0
MAX_SERVED_AT_ONCE = 16
MAX_SERVED_PER_PEER = 2
# One Yamux frame and its header then fill exactly one Noise message; larger writes cost twice the CPU.
WRITE_BYTES = 65_507
_LENGTH = struct.Struct(">I")


class RecordExchange:
    """Asks peers for records, and answers them."""

    def __init__(
        self, host: IHost, directory: Directory, handlers: Handlers, spread: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """``spread`` passes on, by gossip, a record that was new here."""
        self._host, self._directory, self._handlers, self._spread = host, directory, handlers, spread
        self._serving = Cap(MAX_SERVED_AT_ONCE, MAX_SERVED_PER_PEER)
        host.set_stream_handler(PROTOCOL, self._serve)

    async def ask(self, key: bytes) -> None:
        """Exchange records with a connected peer; a failure is left to the next time."""
        stream: INetStream | None = None
        try:
            with trio.fail_after(SECONDS):
                stream = await self._host.new_stream(peer_of(key), [PROTOCOL])
                await self._send(stream, key)
                await self._receive(stream, key)
                await stream.close()
        except Exception as error:
            log.debug("exchange of records with %s failed: %r", peer_of(key), error)
            await reset(stream)

    async def _serve(self, stream: INetStream) -> None:
        key = key_of(stream.muxed_conn.peer_id)
        if key is None or not self._serving.enter(key):
            await reset(stream)
            return
        try:
            with trio.fail_after(SECONDS):
                await self._receive(stream, key)
                await self._send(stream, key)
                await stream.close()
        except Exception as error:
            log.debug("serving records failed: %r", error)
            await reset(stream)
        finally:
            self._serving.leave(key)

    async def _send(self, stream: INetStream, key: bytes) -> None:
        body = wire.Records(records=self._directory.raw_records(MAX_RECORDS)).SerializeToString()
        frame = _LENGTH.pack(len(body)) + body
        for at in range(0, len(frame), WRITE_BYTES):
            await stream.write(frame[at : at + WRITE_BYTES])
        self._handlers.gossip_bytes(key, len(frame), 0)

    async def _receive(self, stream: INetStream, key: bytes) -> None:
        (length,) = _LENGTH.unpack(await read_exactly(stream, _LENGTH.size))
        if length > MAX_BYTES:
            raise Malformed(f"{length} bytes of records; at most {MAX_BYTES} are read")
        body = bytearray()
        while len(body) < length:
            chunk = await stream.read(min(length - len(body), WRITE_BYTES))
            if not chunk:
                raise Malformed("the stream ended within the records")
            body += chunk
        self._handlers.gossip_bytes(key, 0, len(body))
        message = wire.Records()
        try:
            message.ParseFromString(bytes(body))
        except DecodeError as error:
            raise Malformed(f"the records do not parse: {error}") from None
        for raw in self._handlers.records_received(list(message.records)[:MAX_RECORDS], key):
            await self._spread(raw)
