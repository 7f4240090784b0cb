"""The gate of the libp2p host: who may connect how often, how many handshakes run at once, what a connection may hold.

py-libp2p 0.8.1 bounds the time of a handshake and the connections in all. It does not bound what one address may
have of them; it keeps the place of every connection that ever came in, ended ones included, so that after as many as
there are places nobody is let in any more; and its Yamux takes whatever arrives for a stream that nobody reads, beyond
the window that it granted. All of that is bounded here (docs/decisions/0023-hostile-peers.md).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import trio
from libp2p.abc import IMuxedConn, IRawConnection, ISecureConn
from libp2p.custom_types import THandler
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.trio import TrioTCPStream
from libp2p.network.swarm import Swarm as Network
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectCommunicatorError, MultiselectError
from libp2p.security.noise.exceptions import InvalidSignature, PeerIDMismatchesPubkey
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.tcp.tcp import TCP, TCPListener
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from psyche_node.network.guard import Pace
from psyche_node.network.messages import Why

HANDSHAKES = 96
HANDSHAKES_PER_ADDRESS = 32
# A whole network behind one address may start at once; after that nobody needs to come again and again.
CONNECTIONS_PER_SECOND = 10.0
CONNECTIONS_AT_ONCE = 300.0
# Streams of one connection, own ones included, and bytes that arrived in them and were not read yet.
MAX_STREAMS = 512
MAX_UNREAD_OF_MEMBER = 16 << 20
MAX_UNREAD_OF_STRANGER = 2 << 20
_NOT_BEGUN = (MultiselectError, MultiselectCommunicatorError)
_NO_PROOF = (InvalidSignature, PeerIDMismatchesPubkey)


class Refused(Protocol):
    """Where refusals are told: what, of whom (node key, or an address), for what reason, of which class."""

    def __call__(self, what: str, peer: bytes | str, reason: str, why: Why) -> None: ...


class Exceeded(trio.TooSlowError):
    """A connection holds more than it may. Yamux ends a connection for this base class, and for no other of its own."""


class Gate:
    """Counts of one host. Everything runs on its trio thread."""

    def __init__(self, is_member: Callable[[ID], bool], refused: Refused, probed: Callable[[], None]) -> None:
        """``probed`` is told of connections that ended before they proved anything."""
        self._is_member, self._refused, self._probed = is_member, refused, probed
        self._pace = Pace(CONNECTIONS_PER_SECOND, CONNECTIONS_AT_ONCE)
        self._handshakes: Counter[str] = Counter()

    def transport(self) -> TCP:
        """Return the TCP transport whose listeners ask this gate."""
        return _GatedTcp(self)

    def watch(self, network: Network) -> None:
        """Have the connections of ``network`` bounded, and its failed handshakes told. Call it before it listens."""
        upgrade_inbound, upgrade_muxer = network.upgrade_inbound_raw_conn, network.upgrader.upgrade_connection

        async def inbound(raw_conn: IRawConnection, maddr: Multiaddr) -> IMuxedConn:
            stream = getattr(raw_conn, "stream", None)
            try:
                return await upgrade_inbound(raw_conn, maddr)
            except Exception as error:
                if isinstance(stream, _Watched):
                    self._failed(stream.host, error)
                raise
            finally:
                if isinstance(stream, _Watched):
                    self.leave(stream)

        async def muxed(conn: ISecureConn, peer_id: ID) -> IMuxedConn:
            connection = await upgrade_muxer(conn, peer_id)
            if isinstance(connection, Yamux):
                self._bound(connection, peer_id)
            return connection

        # These are the two places where both ends of what happens can be seen; py-libp2p has no hook for them.
        network.upgrade_inbound_raw_conn = inbound  # type: ignore[method-assign]
        network.upgrader.upgrade_connection = muxed  # type: ignore[method-assign]

    def enter(self, stream: _Watched) -> bool:
        """Let a new connection begin its handshake, or not."""
        host = stream.host
        if not self._pace.allows(host.encode()):
            reason = f"more than {CONNECTIONS_PER_SECOND:.0f} connections a second"
        elif self._handshakes[host] >= HANDSHAKES_PER_ADDRESS:
            reason = f"{HANDSHAKES_PER_ADDRESS} of its connections are in their handshake already"
        elif self._handshakes.total() >= HANDSHAKES:
            reason = f"{HANDSHAKES} connections of all addresses are in their handshake"
        else:
            self._handshakes[host] += 1
            stream.in_handshake = True
            return True
        self._refused("connection", host, reason, Why.TOO_MANY)
        return False

    def leave(self, stream: _Watched) -> None:
        """Its handshake is over, one way or the other. May be called again."""
        if stream.in_handshake:
            stream.in_handshake = False
            self._handshakes[stream.host] -= 1
            if not self._handshakes[stream.host]:
                del self._handshakes[stream.host]

    def _failed(self, host: str, error: BaseException) -> None:
        """Tell of a handshake that failed. One that ended before Noise began is not worth a word: somebody looked
        whether anybody is there, as this node does with itself, or spoke another protocol."""
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None and len(causes) < 10:
            causes.append(cause)
        if any(isinstance(one, _NOT_BEGUN) for one in causes):
            self._probed()
            return
        why = Why.IDENTITY if any(isinstance(one, _NO_PROOF) for one in causes) else Why.PROTOCOL
        reason = ": ".join(str(one)[:100] or type(one).__name__ for one in causes)
        self._refused("handshake", host, f"its libp2p handshake failed: {reason[:300]}", why)

    def _bound(self, connection: Yamux, peer: ID) -> None:
        read = connection._read_data_body

        def exceeded(reason: str) -> Exceeded:
            self._refused("connection", str(peer), reason, Why.TOO_MANY)
            return Exceeded(reason)

        async def bounded(length: int) -> bytes:
            unread = sum(map(len, connection.stream_buffers.values())) + length
            limit = MAX_UNREAD_OF_MEMBER if self._is_member(peer) else MAX_UNREAD_OF_STRANGER
            if unread > limit:
                raise exceeded(f"{unread} bytes of it would wait to be read; {limit} may")
            return await read(length)

        connection._read_data_body = bounded  # type: ignore[method-assign]
        connection.streams = _Bounded(exceeded)


class _Bounded(OrderedDict[int, Any]):
    """The streams of a connection by number."""

    def __init__(self, exceeded: Callable[[str], Exception]) -> None:
        super().__init__()
        self._exceeded = exceeded

    def __setitem__(self, number: int, stream: Any) -> None:
        if len(self) >= MAX_STREAMS and number not in self:
            raise self._exceeded(f"it has {MAX_STREAMS} streams open")
        super().__setitem__(number, stream)


class _GatedTcp(TCP):
    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    def create_listener(self, handler_function: THandler) -> TCPListener:
        async def handle(stream: ReadWriteCloser) -> None:
            assert isinstance(stream, TrioTCPStream)
            watched = _Watched(stream.stream)
            if not self._gate.enter(watched):
                return
            try:
                # The handler of py-libp2p waits for the end of the host, and only its end gives the place back.
                with watched.open:
                    await handler_function(watched)
            finally:
                self._gate.leave(watched)

        return TCPListener(handle)


class _Watched(TrioTCPStream):
    """A connection that came in. ``open`` is cancelled when it is closed."""

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        self.open = trio.CancelScope()
        self.in_handshake = False
        try:
            # Of IPv6 it has four parts, which py-libp2p takes for none.
            name = stream.socket.getpeername()
        except OSError:
            name = ("gone", 0)
        self.host = str(name[0])
        self._cached_remote_address = (self.host, int(name[1]))

    async def close(self) -> None:
        await super().close()
        # A handshake that fails closes its connection, and then ends by itself, with the reason.
        if not self.in_handshake:
            self.open.cancel()


__all__ = ["Gate", "Refused"]
