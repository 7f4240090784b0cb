"""Two private nodes are brought together by a public member that both are connected to. Runs on trio.

    caller --/psyche/punch/1--> helper --/psyche/punched/1--> target

Before it asks or answers, each side makes a connection to the helper from a fresh port and learns from it (DialBack)
the address that its NAT gave to that port. The helper passes on these two addresses, and the target's TLS certificate;
then both sides connect from those ports to each other at the same moment. The helper passes on only addresses that it
has seen itself, and each side connects only to an IP address that the other one has signed in its node record. So
neither the helper alone nor the other one alone can have a node connect to a stranger. Two that conspire can, as what
is signed is a claim: to six attempts at a connection from a punch, and to six punches at once and then one in 10 s.
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
from psyche_node.network.guard import Pace
from psyche_node.network.host import dial, key_of, peer_of, reset
from psyche_node.network.nat.dialback import DialBack
from psyche_node.network.statements import Malformed
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
PUNCH = TProtocol("/psyche/punch/1")
PUNCHED = TProtocol("/psyche/punched/1")
MAX_BYTES = 12 * 1024
SECONDS = 10.0
DIAL_SECONDS = 5.0
MAX_AT_ONCE = 16
MAX_AT_ONCE_PER_PEER = 4
# For a pair of members: six at once, and then one each ten seconds. For one who asks or helps: ten times that.
PUNCHES_AT_ONCE = 6.0
PUNCHES_PER_SECOND = 0.1
_LENGTH = struct.Struct(">I")
_MAX_REFUSAL = 200

# Told who asks, where that is, and who helps; returns the reply.
Invited = Callable[[bytes, str, bytes], Awaitable[wire.Punch]]


class Refused(Exception):
    """The helper or the target will not; the message says why."""


class Rendezvous:
    """The three roles of the protocol."""

    def __init__(self, host: IHost, directory: Directory, dialback: DialBack, invited: Invited) -> None:
        """``invited(caller, address, helper)`` answers an invitation; it raises Refused when it will not."""
        self._host, self._directory, self._dialback, self._invited = host, directory, dialback, invited
        self._serving = Cap(MAX_AT_ONCE, MAX_AT_ONCE_PER_PEER)
        self._pace = Pace(10 * PUNCHES_PER_SECOND, 10 * PUNCHES_AT_ONCE)
        self._pair_pace = Pace(PUNCHES_PER_SECOND, PUNCHES_AT_ONCE)
        host.set_stream_handler(PUNCH, self._help)
        host.set_stream_handler(PUNCHED, self._be_invited)

    async def ask(self, helper: bytes, target: bytes, address: str) -> wire.Punch:
        """Ask ``helper`` to bring this node, which it sees at ``address``, together with ``target``.

        Raises Refused, or whatever libp2p does.
        """
        request = wire.Punch(peer=target, address=address)
        record = self._directory.record(helper)
        if record is not None and not self._host.get_network().get_connections(peer_of(helper)):
            await dial(self._host, helper, record.p2p_addresses[0], DIAL_SECONDS)
        reply = await self._converse(helper, PUNCH, request)
        if reply.refusal or not reply.address:
            raise Refused(reply.refusal[:_MAX_REFUSAL] or "no address")
        return reply

    async def _help(self, stream: INetStream) -> None:
        async def answer(caller: bytes, request: wire.Punch) -> wire.Punch:
            target = request.peer
            if not self._dialback.seen_at(caller, request.address):
                raise Refused("no connection of yours came from that address in the last minute")
            if not self._host.get_network().get_connections(peer_of(target)):
                raise Refused("not connected to it")
            reply = await self._converse(target, PUNCHED, wire.Punch(peer=caller, address=request.address))
            if not reply.refusal and not self._dialback.seen_at(target, reply.address):
                raise Refused("it names an address that its connections do not come from")
            return reply

        await self._serve(stream, answer)

    async def _be_invited(self, stream: INetStream) -> None:
        async def answer(helper: bytes, request: wire.Punch) -> wire.Punch:
            return await self._invited(request.peer, request.address, helper)

        await self._serve(stream, answer)

    async def _serve(self, stream: INetStream, answer: Callable[[bytes, wire.Punch], Awaitable[wire.Punch]]) -> None:
        sender = key_of(stream.muxed_conn.peer_id)
        if sender is None or self._directory.slot(sender) is None or not self._serving.enter(sender):
            await reset(stream)
            return
        try:
            with trio.fail_after(SECONDS):
                request = await _receive(stream)
                try:
                    self._check(sender, request.peer)
                    reply = await answer(sender, request)
                except Refused as error:
                    reply = wire.Punch(refusal=str(error)[:_MAX_REFUSAL])
                await _send(stream, reply)
                await stream.close()
        except Exception as error:
            log.debug("a rendezvous with %s failed: %r", peer_of(sender), error)
            await reset(stream)
        finally:
            self._serving.leave(sender)

    def _check(self, sender: bytes, other: bytes) -> None:
        if self._directory.slot(other) is None or other == sender or other == self._directory.own_key:
            raise Refused("no other member has that key")
        if not self._pace.allows(sender) or not self._pair_pace.allows(sender + other):
            raise Refused("too many punches lately")

    async def _converse(self, peer: bytes, protocol: TProtocol, request: wire.Punch) -> wire.Punch:
        stream: INetStream | None = None
        try:
            with trio.fail_after(SECONDS):
                stream = await self._host.new_stream(peer_of(peer), [protocol])
                await _send(stream, request)
                reply = await _receive(stream)
                await stream.close()
                return reply
        except BaseException:
            await reset(stream)
            raise


async def _send(stream: INetStream, message: wire.Punch) -> None:
    body = message.SerializeToString()
    await stream.write(_LENGTH.pack(len(body)) + body)


async def _receive(stream: INetStream) -> wire.Punch:
    (length,) = _LENGTH.unpack(await read_exactly(stream, _LENGTH.size))
    if length > MAX_BYTES:
        raise Malformed(f"{length} bytes; a Punch has at most {MAX_BYTES}")
    message = wire.Punch()
    try:
        message.ParseFromString(await read_exactly(stream, length))
    except DecodeError as error:
        raise Malformed(f"it does not parse: {error}") from None
    return message
