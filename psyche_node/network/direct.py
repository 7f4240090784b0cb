"""Announcements handed to one connected peer: libp2p protocol /psyche/announce/1, for those whom gRPC does not reach.

A 4-byte length and an AnnounceRequest; answered by a 4-byte zero once all of it has been taken.
"""

from __future__ import annotations

import logging
import struct

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.io.utils import read_exactly

from psyche_node.network.cap import Cap
from psyche_node.network.directory import Directory
from psyche_node.network.host import Handlers, key_of, peer_of, reset
from psyche_node.network.service import MAX_ANNOUNCEMENTS_PER_CALL
from psyche_node.network.statements import MAX_ANNOUNCEMENT, Malformed
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
PROTOCOL = TProtocol("/psyche/announce/1")
MAX_BYTES = MAX_ANNOUNCEMENTS_PER_CALL * (MAX_ANNOUNCEMENT + 8)
SECONDS = 10.0
MAX_SERVED_AT_ONCE = 16
MAX_SERVED_PER_PEER = 2
_LENGTH = struct.Struct(">I")
_TAKEN = _LENGTH.pack(0)


class DirectAnnouncements:
    """Hands announcements to connected peers, and takes theirs if they are members."""

    def __init__(self, host: IHost, directory: Directory, handlers: Handlers) -> None:
        self._host, self._directory, self._handlers = host, directory, handlers
        self._serving = Cap(MAX_SERVED_AT_ONCE, MAX_SERVED_PER_PEER)
        host.set_stream_handler(PROTOCOL, self._serve)

    async def tell(self, key: bytes, announcements: list[bytes]) -> bool:
        """Return whether the connected node with this key has taken them."""
        stream: INetStream | None = None
        body = wire.AnnounceRequest(announcements=announcements).SerializeToString()
        try:
            with trio.fail_after(SECONDS):
                stream = await self._host.new_stream(peer_of(key), [PROTOCOL])
                await stream.write(_LENGTH.pack(len(body)) + body)
                taken = await read_exactly(stream, len(_TAKEN)) == _TAKEN
                await stream.close()
        except Exception as error:
            log.debug("telling %s over libp2p failed: %r", peer_of(key), error)
            await reset(stream)
            return False
        self._handlers.gossip_bytes(key, len(body), 0)
        return taken

    async def _serve(self, stream: INetStream) -> None:
        key = key_of(stream.muxed_conn.peer_id)
        if key is None or self._directory.slot(key) is None or not self._serving.enter(key):
            await reset(stream)
            return
        try:
            with trio.fail_after(SECONDS):
                (length,) = _LENGTH.unpack(await read_exactly(stream, _LENGTH.size))
                if length > MAX_BYTES:
                    raise Malformed(f"{length} bytes of announcements; at most {MAX_BYTES} are read")
                body = await read_exactly(stream, length)
                self._handlers.gossip_bytes(key, 0, length)
                self._take(body, key)
                await stream.write(_TAKEN)
                await stream.close()
        except Exception as error:
            log.debug("announcements of %s were not taken: %r", stream.muxed_conn.peer_id, error)
            await reset(stream)
        finally:
            self._serving.leave(key)

    def _take(self, body: bytes, key: bytes) -> None:
        request = wire.AnnounceRequest()
        try:
            request.ParseFromString(body)
        except DecodeError as error:
            raise Malformed(f"it does not parse: {error}") from None
        for raw in request.announcements[:MAX_ANNOUNCEMENTS_PER_CALL]:
            if self._handlers.allows(key):
                self._handlers.gossip_announcement(raw, key)
