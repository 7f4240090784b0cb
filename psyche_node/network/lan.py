"""mDNS: members on the same network segment, without a server. What it says is a hint; libp2p verifies who answers.

The service is libp2p's for private networks, ``_p2p-XXXXXXXX._udp.local`` with the first 8 hex digits of the run, and
its TXT record has ``dnsaddr=/ip4/.../tcp/.../p2p/ID``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial

import trio
from zeroconf import Error, InterfaceChoice, IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from psyche_node.identity import IdentityError
from psyche_node.network.statements import MAX_ADDRESS, MAX_ADDRESSES, Malformed, parse_bootstrap, split_multiaddr
from psyche_node.network.threads import in_thread

log = logging.getLogger(__name__)
ANSWER_MS = 1500
MAX_SERVICES = 256
_ID_BYTES = 80


async def look_around(
    run: bytes, node_id: str, address: str, listen_host: str, found: Callable[[bytes, str], None]
) -> None:
    """Take part in mDNS until cancelled; ``found`` is called on trio. Ends with a log line where it cannot be used."""
    token = trio.lowlevel.current_trio_token()

    def tell(key: bytes, where: str) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(found, key, where)

    try:
        local = await in_thread(partial(LocalNetwork, run, node_id, address, listen_host, tell))
    except OSError as error:
        log.warning("mDNS cannot be used on %s: %s; set mdns = false if it is not wanted", listen_host, error)
        return
    try:
        await in_thread(local.announce)
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            await in_thread(local.close)


class LocalNetwork:
    """Answers mDNS questions about this node and tells ``found(node key, multiaddr)`` of others. Blocking; threads of
    its own."""

    def __init__(
        self, run: bytes, node_id: str, address: str, listen_host: str, found: Callable[[bytes, str], None]
    ) -> None:
        """``address`` is this node's multiaddr. Raises OSError when multicast cannot be used on this host."""
        self._found = found
        self._type = f"_p2p-{run.hex()[:8]}._udp.local."
        ip, port = split_multiaddr(address)
        everywhere = listen_host in ("0.0.0.0", "::")
        version = IPVersion.V6Only if ":" in ip else IPVersion.V4Only
        self._zeroconf = Zeroconf(InterfaceChoice.All if everywhere else [listen_host], ip_version=version)
        # A label has at most 63 bytes; the PeerId itself is in the TXT record.
        self._name = f"{node_id[-32:].lower()}.{self._type}"
        self._service = ServiceInfo(
            self._type,
            self._name,
            port=port,
            parsed_addresses=[ip],
            properties={"dnsaddr": f"{address}/p2p/{node_id}"},
            server=f"{node_id[-32:].lower()}.local.",
        )
        self._seen: set[str] = set()
        self._full = False
        self._browser = ServiceBrowser(self._zeroconf, self._type, handlers=[self._changed])

    def announce(self) -> None:
        """Begin to answer questions about this node; takes a second."""
        try:
            self._zeroconf.register_service(self._service, cooperating_responders=True)
        except (Error, OSError) as error:
            log.warning("mDNS does not announce this node: %r", error)

    def close(self) -> None:
        self._zeroconf.close()

    def _changed(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if name == self._name:
            return
        if state_change is ServiceStateChange.Removed:
            self._seen.discard(name)
            return
        if len(self._seen) >= MAX_SERVICES and name not in self._seen:
            if not self._full:
                log.warning("%d nodes say by mDNS where they are; more are not listened to", MAX_SERVICES)
            self._full = True
            return
        self._seen.add(name)
        info = ServiceInfo(service_type, name)
        if not info.load_from_cache(zeroconf) and not info.request(zeroconf, ANSWER_MS):
            return
        said = [value for key, value in info.properties.items() if key.startswith(b"dnsaddr") and value is not None]
        for value in said[:MAX_ADDRESSES]:
            try:
                key, address = parse_bootstrap(value[: MAX_ADDRESS + _ID_BYTES].decode())
            except (Malformed, IdentityError, UnicodeDecodeError) as error:
                log.debug("%s says %r by mDNS: %s", name[:80], value[:80], error)
                continue
            self._found(key, address)
