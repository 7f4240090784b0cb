"""A libp2p host with the settings this network wants: TCP, Noise and Yamux only.

py-libp2p's QUIC loses data without an error, and its mplex resets slow readers. Other settings that differ from its
defaults each have a reason beside them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetConn, INetStream, INetwork, INotifee
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key
from libp2p.custom_types import TProtocol
from libp2p.identity_utils import create_identity_from_seed
from libp2p.network.config import ConnectionConfig
from libp2p.network.swarm import Swarm as Network
from libp2p.peer.id import ID
from libp2p.rcmgr.manager import ResourceLimits, ResourceManager
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from psyche_node.identity import IdentityError, NodeKey, node_id, public_key
from psyche_node.network.addresses import NetworkError
from psyche_node.network.gate import Gate
from psyche_node.network.messages import Why
from psyche_node.network.statements import join_multiaddr

log = logging.getLogger(__name__)
MAX_CONNECTIONS = 128
# Of a peer that dials: a machine that trains is slow.
HANDSHAKE_SECONDS = 20.0


class Handlers(Protocol):
    """What the libp2p side tells the node."""

    def allows(self, peer: bytes | str) -> bool:
        """Count a statement that ``peer`` sent; return False when it has sent too many to look at this one."""

    def gossip_announcement(self, raw: bytes, forwarder: bytes | str) -> bool:
        """Take an announcement from gossip; return whether to pass it on."""

    def gossip_record(self, raw: bytes, forwarder: bytes | str) -> bool:
        """Take a node record from gossip; return whether to pass it on."""

    def records_received(self, raw: list[bytes], sender: bytes) -> list[bytes]:
        """Take the records of a peer; return those that were new."""

    def connection_changed(self, peer: bytes, up: bool) -> None:
        """The first connection to ``peer`` came up, or the last one went down."""

    def gossip_bytes(self, peer: bytes, sent: int, received: int) -> None:
        """Count bytes that went over libp2p."""

    def probed(self) -> None:
        """Somebody connected, proved nothing and was gone."""

    def refused(self, what: str, peer: bytes | str, reason: str, why: Why) -> None:
        """Something of a peer (its node key, or an address) was refused."""


def make_host(key: NodeKey, gate: Gate | None = None) -> IHost:
    """Make a host that does not listen yet. ``gate`` decides who may connect; without one everybody may."""
    pair = create_identity_from_seed(key.seed)
    noise = Noise(pair, noise_privkey=create_noise_key().private_key)
    host = new_host(
        key_pair=pair,
        sec_opt={NOISE: noise},
        muxer_opt={TProtocol(YAMUX): Yamux},
        transports=[TCP() if gate is None else gate.transport()],
        negotiate_timeout=10,
        disable_identify_address_discovery=True,
        connection_config=ConnectionConfig(
            max_connections=MAX_CONNECTIONS,
            min_connections=0,
            low_watermark=0,
            high_watermark=MAX_CONNECTIONS,
            max_connections_per_peer=2,
            inbound_upgrade_timeout=HANDSHAKE_SECONDS,
        ),
        # Its extras are off: one of them refuses every connection for a minute after five failures, another one when
        # the machine (which is busy training) is short of memory.
        resource_manager=ResourceManager(
            limits=ResourceLimits(max_connections=4 * MAX_CONNECTIONS, max_streams=1 << 20),
            enable_metrics=False,
            enable_connection_tracking=False,
            enable_memory_limits=False,
            enable_circuit_breaker=False,
            enable_graceful_degradation=False,
        ),
    )
    network = network_of(host)
    network.set_stream_handler(_contained(network.common_stream_handler))
    if gate is not None:
        gate.watch(network)
    return host


def _contained(handler: Callable[[INetStream], Awaitable[None]]) -> Callable[[INetStream], Awaitable[None]]:
    """Let a stream that breaks its protocol's handler end that stream; otherwise it would end the whole host."""

    async def handle(stream: INetStream) -> None:
        try:
            await handler(stream)
        except Exception as error:
            log.debug("a stream of %s broke: %r", stream.muxed_conn.peer_id, error)
            await reset(stream)

    return handle


@contextlib.asynccontextmanager
async def listening(host: IHost, ip: str, port: int) -> AsyncIterator[int]:
    """Run ``host`` on ``ip``:``port`` (0: any port); yields the port. Raises NetworkError when it cannot be had."""
    async with host.run([Multiaddr(join_multiaddr(ip, port))]):
        network = network_of(host)
        # It would dial whomever it has heard of until there are 64 connections; the swarm knows who is a member.
        await network.auto_connector.stop()
        addresses = [address for listener in network.listeners.values() for address in listener.get_addrs()]
        if not addresses:
            raise NetworkError(f"libp2p cannot listen on {ip} port {port}. Is the port taken?")
        yield int(addresses[0].value_for_protocol("tcp"))


def network_of(host: IHost) -> Network:
    """Return the host's network, of which more is used than its interface tells."""
    network = host.get_network()
    assert isinstance(network, Network)
    return network


async def dial(host: IHost, key: bytes, address: str, seconds: float) -> None:
    """Connect to the node with ``key`` at one address. Raises what libp2p raises, or TooSlowError."""
    network = network_of(host)
    peer = peer_of(key)
    # A peer that failed once is otherwise blocked for a minute; host.connect would try one address, and sleep first.
    network.unblock_peer(peer)
    with trio.fail_after(seconds):
        await network.dial_addr(Multiaddr(address), peer)


class Notifee(INotifee):
    """libp2p's callbacks, of which two are of interest."""

    def __init__(self, up: Callable[[INetConn], Awaitable[None]], down: Callable[[INetConn], Awaitable[None]]) -> None:
        self._up, self._down = up, down

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        await self._up(conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        await self._down(conn)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        pass

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        pass


@functools.lru_cache(4096)
def peer_of(key: bytes) -> ID:
    return ID.from_base58(node_id(key))


@functools.lru_cache(4096)
def key_of(peer: ID) -> bytes | None:
    """Return the node key of a peer; None for one that has another kind of key, which no node of this network has."""
    try:
        return public_key(str(peer))
    except IdentityError:
        return None


async def reset(stream: INetStream | None) -> None:
    """Give a stream up, whatever state it is in."""
    if stream is not None:
        with trio.move_on_after(1.0) as scope, contextlib.suppress(Exception):
            scope.shield = True
            await stream.reset()
