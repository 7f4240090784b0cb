"""What others send this node, and do to it: statements are counted, verified and taken in, refusals reported."""

from __future__ import annotations

import logging
from collections.abc import Callable

from psyche_node.identity import node_id
from psyche_node.network.announcements import Announcements, Outcome, Verdict
from psyche_node.network.directory import Directory
from psyche_node.network.messages import Announced, Why
from psyche_node.network.reports import Reporter, Traffic
from psyche_node.network.statements import Announcement, Malformed, NodeRecord
from psyche_node.network.throttle import Throttle

log = logging.getLogger(__name__)


class Intake:
    """The handlers of the libp2p side (``host.Handlers``), and those of what gRPC brings.

    Runs on trio, but for what says that it may be called from any thread.
    """

    def __init__(
        self,
        run: bytes,
        directory: Directory,
        announcements: Announcements,
        reporter: Reporter,
        traffic: Traffic,
        *,
        vouches: Callable[[bytes | str], bool],
        announced: Callable[[Announcement], None],
        sources_changed: Callable[[], None],
        connections_changed: Callable[[], None],
    ) -> None:
        """``vouches``: whether a peer may bring records of others. The rest is called with, or after, what is new."""
        self._run, self._directory, self._announcements = run, directory, announcements
        self._reporter, self._traffic = reporter, traffic
        self._vouches, self._announced = vouches, announced
        self._sources_changed, self._connections_changed = sources_changed, connections_changed
        self._throttle = Throttle()

    # Statements ------------------------------------------------------------------------------------------------------

    def allows(self, peer: bytes | str) -> bool:
        """Count a statement that ``peer`` sent; return whether to look at it. Any thread."""
        allowed = self._throttle.allows(peer)
        if not allowed:
            reason = "it sends more statements than are looked at; the rest is dropped"
            self._reporter.rejected("flood", peer, reason, Why.TOO_MANY)
        return allowed

    def announcement(self, raw: bytes, sender: bytes | str) -> Outcome:
        """Take in an announcement that was counted."""
        outcome = self._announcements.offer(raw)
        said = outcome.announcement
        if outcome.verdict is Verdict.REFUSED:
            blamed = sender if said is None else said.node_key
            # An honest forwarder has not seen the other one of two. A stranger's key is free: its bucket is no price.
            self._throttle.refused(sender if outcome.slot is None else blamed)
            where = "" if said is None else f" (round {said.round}, digest {said.digest.hex()[:16]})"
            self._reporter.rejected("announcement", blamed, f"{outcome.reason}{where}", outcome.why)
        elif outcome.verdict is Verdict.NEW and said is not None and outcome.slot is not None:
            self._reporter.emit(
                Announced(round=said.round, member=outcome.slot, digest=said.digest.hex(), length=said.length)
            )
            self._announced(said)
        return outcome

    def asked_announcement(self, raw: bytes, sender: bytes) -> None:
        """Take in an announcement that somebody was asked for."""
        if self.allows(sender):
            self.announcement(raw, sender)

    def gossip_announcement(self, raw: bytes, forwarder: bytes | str) -> bool:
        return self.announcement(raw, forwarder).verdict in (Verdict.NEW, Verdict.KNOWN)

    def gossip_record(self, raw: bytes, forwarder: bytes | str) -> bool:
        return self._record(raw, forwarder)

    def records_received(self, raw: list[bytes], sender: bytes) -> list[bytes]:
        fresh = [one for one in raw if not self._directory.holds(one)]
        return [one for one in fresh if self.allows(sender) and self._record(one, sender)]

    def _record(self, raw: bytes, sender: bytes | str) -> bool:
        if self._directory.holds(raw):
            return False
        try:
            record = NodeRecord.parse(raw, self._run)
        except Malformed as error:
            self._throttle.refused(sender)
            self._reporter.rejected("record", sender, str(error), Why.MALFORMED)
            return False
        # A stranger introduces itself and nobody else, or it could fill the directory with made-up nodes.
        if sender != record.node_key and not self._vouches(sender) and not self._vouches(record.node_key):
            return False
        if record.node_key == self._directory.own_key or not self._directory.add(record, raw):
            return False
        log.debug("%s is at %s, %s", record.node_id, record.grpc_address, ", ".join(record.p2p_addresses))
        self._sources_changed()
        return True

    # Connections -----------------------------------------------------------------------------------------------------

    def connection_changed(self, peer: bytes, up: bool) -> None:
        log.debug("%s %s", node_id(peer), "connected" if up else "disconnected")
        self._connections_changed()

    def gossip_bytes(self, peer: bytes, sent: int, received: int) -> None:
        self._traffic.sent(peer, sent)
        self._traffic.received(peer, received)

    def refused(self, what: str, peer: bytes | str, reason: str, why: Why) -> None:
        self._reporter.rejected(what, peer, reason, why)

    def probed(self) -> None:
        """Somebody looked whether this node is there, or at its certificate, and showed none. Any thread."""
        self._reporter.count("probe", Why.OTHER)

    def handshake_refused(self, reason: str, why: Why) -> None:
        """A TLS handshake with the gRPC server failed; who it was, gRPC does not tell. Any thread."""
        self._reporter.rejected("handshake", "at the gRPC port", reason, why)
