"""How the others know this node: its certificate and its signed record, renewed in time. Runs on trio."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import trio

from psyche_node.identity import NodeKey
from psyche_node.network.addresses import Addresses
from psyche_node.network.certificates import LIFETIME_SECONDS, Leaf, issue
from psyche_node.network.directory import Directory
from psyche_node.network.nat.reachability import Reachability
from psyche_node.network.statements import NodeRecord

RENEW_EVERY = 3600.0


class OwnRecord:
    """The certificate is there when this is made, the record from ``begin`` on."""

    def __init__(self, key: NodeKey, run: bytes, directory: Directory) -> None:
        self._key, self._run, self._directory = key, run, directory
        self._leaf = issue(key)
        self._addresses: Addresses
        self._reachability: Reachability
        self._publish: Callable[[bytes], Awaitable[None]]

    def leaf(self) -> Leaf:
        """Return the certificate of now. Any thread."""
        return self._leaf

    async def begin(
        self, addresses: Addresses, reachability: Reachability, publish: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """Make the first record; this one and each that follows is given to ``publish``."""
        self._addresses, self._reachability, self._publish = addresses, reachability, publish
        await self.renew()

    async def keep(self) -> None:
        """Issue a new certificate when half of its lifetime is over, until cancelled."""
        while True:
            await trio.sleep(RENEW_EVERY)
            if self._leaf.expires - time.time() < LIFETIME_SECONDS / 2:
                self._leaf = issue(self._key)
                await self.renew()

    async def renew(self) -> None:
        """Publish a record, unless it would say what the last one said."""
        standing = self._reachability.standing
        # A public node behind a NAT that forwards its ports is reached where others see it.
        outside = "" if standing.private else standing.ip
        record = NodeRecord(
            self._run,
            self._key.public,
            int(time.time() * 1000),  # larger than those of earlier lives of this node
            self._addresses.p2p(outside),
            self._addresses.grpc(outside),
            self._leaf.der_hash,
            self._leaf.expires,
            self._reachability.private,
            standing.ip if standing.private else "",
            "" if self._reachability.private else self._addresses.bulk(outside),
        )
        known = self._directory.record(self._key.public)
        if known is not None and replace(known, seq=record.seq) == record:
            return
        raw = record.sign(self._key)
        self._directory.add(record, raw)
        await self._publish(raw)
