"""Makes paths to private nodes when they are wanted, and answers those who want one to this node. Runs on trio."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio
from libp2p.abc import IHost

from psyche_node.identity import node_id
from psyche_node.network.certificates import Leaf, identify
from psyche_node.network.directory import Directory
from psyche_node.network.links import CallFailed, Links
from psyche_node.network.nat.dialback import DialBack
from psyche_node.network.nat.paths import MAX_PATHS, Paths
from psyche_node.network.nat.rendezvous import Refused, Rendezvous
from psyche_node.network.nat.sockets import connect, local_port, punch
from psyche_node.network.nat.splice import Door
from psyche_node.network.statements import Malformed, NodeRecord, split_address
from psyche_node.network.threads import in_thread
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
PUNCH_SECONDS = 5.0
OBSERVE_SECONDS = 3.0
MAX_AT_ONCE = 4
MAX_HELPERS = 3
# After a failure; the NATs of a pair seldom change their minds. Those who just refuse may soon know better.
FIRST_BACKOFF = 5.0
LONGEST_BACKOFF = 600.0
REFUSED_BACKOFF = 1.0
LONGEST_REFUSED_BACKOFF = 30.0

# Asks a helper to bring this node, which it sees at an address, together with a target: ``Rendezvous.ask``.
Ask = Callable[[bytes, bytes, str], Awaitable[wire.Punch]]


@dataclass(slots=True)
class _Try:
    failures: int = 0
    due: float = 0.0
    running: bool = False


@dataclass(slots=True)
class _Observed:
    """A connection to a helper that keeps a NAT's mapping of ``port`` open, and where the helper sees it."""

    port: int
    address: str
    close: Callable[[], None]


class Puncher:
    """Both ends of a punch: the one who asks, and the one who is asked for."""

    def __init__(
        self,
        paths: Paths,
        links: Links,
        directory: Directory,
        leaf: Callable[[], Leaf],
        made: Callable[[bytes], None],
    ) -> None:
        """``made(peer)`` is called on trio when there is a path to ``peer``."""
        self._paths, self._links, self._directory, self._leaf, self._made = paths, links, directory, leaf, made
        self._tries: dict[bytes, _Try] = {}
        self._asking = trio.CapacityLimiter(MAX_AT_ONCE)
        self._answering = trio.CapacityLimiter(MAX_AT_ONCE)

    async def run(self, host: IHost, dialback: DialBack) -> None:
        """Take part in rendezvous over ``host`` until cancelled."""
        rendezvous = Rendezvous(host, self._directory, dialback, self._invited)
        token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:

            def wanted(peer: bytes) -> None:
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(self._try, peer, rendezvous.ask)

            self._paths.on_wanted(wanted)
            await trio.sleep_forever()

    # As the one who asks ---------------------------------------------------------------------------------------------

    def _try(self, peer: bytes, ask: Ask) -> None:
        for gone in [key for key in self._tries if self._directory.slot(key) is None]:
            del self._tries[gone]
        state = self._tries.setdefault(peer, _Try())
        if not state.running and state.due <= trio.current_time() and not self._paths.full():
            state.running = True
            self._nursery.start_soon(self._make, peer, state, ask)

    async def _make(self, peer: bytes, state: _Try, ask: Ask) -> None:
        reasons = []
        first, longest = REFUSED_BACKOFF, LONGEST_REFUSED_BACKOFF
        async with self._asking:
            helpers = [key for key in self._directory.public(self._directory.others().values()) if key != peer]
            # A node keeps connections to those that are near it by XOR, so these are likely to be connected to it.
            helpers.sort(key=lambda key: int.from_bytes(key) ^ int.from_bytes(peer))
            for helper in helpers[:MAX_HELPERS]:
                try:
                    await self._through(helper, peer, ask)
                except Exception as error:  # ours, the system's and libp2p's, which have nothing in common
                    if isinstance(error, OSError):
                        first, longest = FIRST_BACKOFF, LONGEST_BACKOFF
                    reasons.append(f"with the help of {node_id(helper)}: {str(error) or type(error).__name__}")
                else:
                    self._tries.pop(peer, None)
                    log.info("there is a path through the NATs to %s", node_id(peer))
                    self._made(peer)
                    return
        state.running = False
        state.failures += 1
        wait = min(longest, first * 2.0 ** min(state.failures - 1, 10)) * random.uniform(0.8, 1.2)
        state.due = trio.current_time() + wait
        log.info(
            "no path through the NATs to %s; its updates come by way of public nodes. Next attempt in %.0f s at the "
            "earliest. %s",
            node_id(peer),
            wait,
            "; ".join(reasons) or "No public member can help",
        )

    async def _through(self, helper: bytes, peer: bytes, ask: Ask) -> None:
        observed = await in_thread(partial(self._observe, helper))
        try:
            reply = await ask(helper, peer, observed.address)
            certificate = identify(reply.certificate)
            record = self._directory.record(peer)
            if record is None or (certificate.node_key, certificate.der_hash) != (peer, record.tls_leaf):
                raise Refused("the certificate it sent is not the one in its record")
            self._check_address(record, reply.address)
            connection = await in_thread(partial(punch, observed.port, reply.address, PUNCH_SECONDS))
        finally:
            observed.close()
        self._paths.add(peer, certificate, connection)

    # As the one who is asked for -------------------------------------------------------------------------------------

    async def _invited(self, caller: bytes, address: str, helper: bytes) -> wire.Punch:
        record = self._directory.record(caller)
        if record is None:
            raise Refused("the record of the one who asks has not come here yet")
        if self._paths.full_of_incoming() or self._answering.available_tokens < 1:
            raise Refused(f"at most {MAX_AT_ONCE} punches at the same time, and {MAX_PATHS} paths")
        try:
            self._check_address(record, address)
            observed = await in_thread(partial(self._observe, helper))
        except (CallFailed, Malformed, OSError) as error:
            raise Refused(f"it cannot: {error}") from None
        self._nursery.start_soon(self._meet, caller, observed, address)
        return wire.Punch(address=observed.address, certificate=self._leaf().certificate)

    async def _meet(self, caller: bytes, observed: _Observed, address: str) -> None:
        try:
            async with self._answering:
                connection = await in_thread(partial(punch, observed.port, address, PUNCH_SECONDS))
                await in_thread(partial(self._paths.add_incoming, connection))
        except OSError as error:
            log.debug("the punch towards %s at %s failed: %s", node_id(caller), address, error)
        else:
            log.debug("%s has a path through the NATs to this node", node_id(caller))
        finally:
            observed.close()

    # Both ------------------------------------------------------------------------------------------------------------

    def _observe(self, helper: bytes) -> _Observed:
        """Connect to ``helper`` from a fresh port and ask it where that comes from. Raises CallFailed or OSError."""
        record = self._directory.record(helper)
        if record is None or not self._directory.public([helper]):
            raise Refused("the helper is not a public member")
        connection = connect(record.grpc_address, OBSERVE_SECONDS)
        port = local_port(connection)
        folder = self._paths.folder
        door = Door(folder.path(folder.name()), connection, OBSERVE_SECONDS)
        channel: Any = None
        try:
            channel = self._links.open(helper, door.target)
            request = wire.DialBackRequest()
            reply = self._links.call_over(channel, helper, "DialBack", request, wire.DialBackReply, OBSERVE_SECONDS)
            split_address(reply.observed)
        except BaseException:
            if channel is not None:
                channel.close()
            door.close()
            raise

        def close() -> None:
            channel.close()
            door.close()

        return _Observed(port, reply.observed, close)

    def _check_address(self, record: NodeRecord, address: str) -> None:
        """Raise Refused unless ``address`` is at the IP address that the node itself has signed, and on no own network.

        Those of a machine's own are for nodes that are there themselves, as in a test.
        """
        ip, _ = split_address(address)
        signed = _signed_ip(record)
        if ip != signed:
            raise Refused(f"it is said to be at {ip}, and its record says {signed or 'nothing'}")
        own = self._directory.record(self._directory.own_key)
        here = "" if own is None else _signed_ip(own)
        if _of_one_machine(ip) and not (here and _of_one_machine(here)):
            raise Refused(f"{ip} is no address of another machine")


def _signed_ip(record: NodeRecord) -> str:
    """Return the IP address that others see a node at, by its own word; "" when it says nothing."""
    return record.observed_ip if record.is_private else split_address(record.grpc_address)[0]


def _of_one_machine(ip: str) -> bool:
    """Return whether an IP address means something else to each machine or cable: no other node's is seen as such."""
    address = ipaddress.ip_address(ip)
    return address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast
