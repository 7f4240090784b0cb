"""Who is a member, how to reach whom, and who may not serve blobs any more. Shared by all threads of the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from psyche_node.network.statements import NodeRecord

MAX_CANDIDATES = 64
# A record's seq starts at its node's clock in milliseconds; one from far in the future would never be replaced.
MAX_SEQ_LEAD_MS = 86_400_000
_NO_WALLETS: Mapping[bytes, str] = {}


@dataclass(frozen=True, slots=True)
class Known:
    """A node record with its wire form, as it was signed."""

    record: NodeRecord
    raw: bytes


class Directory:
    """Members by slot and key, node records by key, bans by key.

    Records of members are all kept. Those of others (members to be, or anybody) share ``MAX_CANDIDATES`` places. A ban
    goes with the wallet where that is known: a member may take another node key at any time.
    """

    def __init__(self, own_key: bytes) -> None:
        self.own_key = own_key
        self._lock = threading.Lock()
        self._slots: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._records: dict[bytes, Known] = {}
        self._wallets: dict[bytes, str] = {}
        self._banned: set[bytes | str] = set()
        self._has_path: Callable[[bytes], bool] = lambda key: False
        self._remembered: frozenset[bytes] = frozenset()

    def set_members(self, members: Mapping[int, bytes], wallets: Mapping[bytes, str] = _NO_WALLETS) -> None:
        """Replace the member list (slot to node key), and whose wallet a node key belongs to."""
        with self._lock:
            self._wallets = dict(wallets)
            self._keys = dict(members)
            self._slots = {key: slot for slot, key in members.items()}

    def slot(self, key: bytes) -> int | None:
        """Return the slot of a member's node key; None is: not a member now."""
        return self._slots.get(key)

    @property
    def own_slot(self) -> int | None:
        """This node's slot; None while it is not a member."""
        return self.slot(self.own_key)

    def key(self, slot: int) -> bytes | None:
        return self._keys.get(slot)

    def others(self) -> dict[int, bytes]:
        """Return the members other than this node, slot to node key."""
        return {slot: key for slot, key in self._keys.items() if key != self.own_key}

    def add(self, record: NodeRecord, raw: bytes) -> bool:
        """Keep a record if it is newer than the one known. Returns whether it was."""
        if record.seq > time.time() * 1000 + MAX_SEQ_LEAD_MS:
            return False
        with self._lock:
            known = self._records.get(record.node_key)
            if known is not None and known.record.seq >= record.seq:
                return False
            self._records.pop(record.node_key, None)
            if record.node_key != self.own_key and record.node_key not in self._slots:
                kept = {self.own_key, *self._remembered} if not self._slots else {self.own_key}
                strangers = [key for key in self._records if key not in self._slots and key not in kept]
                for key in strangers[: max(0, len(strangers) - MAX_CANDIDATES + 1)]:
                    del self._records[key]
            self._records[record.node_key] = Known(record, raw)
            return True

    def remember(self, known: Iterable[Known]) -> None:
        """Take the records that an earlier life of this node kept; they count as members' until the list says more."""
        kept = {one.record.node_key: one for one in known if one.record.node_key != self.own_key}
        with self._lock:
            self._remembered = frozenset(kept)
            self._records = {**kept, **self._records}

    def lasting(self, also: Iterable[bytes]) -> list[bytes]:
        """Return the wire forms of the records worth keeping for the next life: those of members and of ``also``."""
        with self._lock:
            wanted = {*(self._slots or self._remembered), *also} - {self.own_key}
            return [known.raw for key, known in self._records.items() if key in wanted]

    def holds(self, raw: bytes) -> bool:
        """Return whether this very record is the one known of its node."""
        with self._lock:
            return any(known.raw == raw for known in self._records.values())

    def known(self, key: bytes) -> Known | None:
        return self._records.get(key)

    def record(self, key: bytes) -> NodeRecord | None:
        known = self._records.get(key)
        return None if known is None else known.record

    def raw_records(self, limit: int) -> list[bytes]:
        """Return wire forms for another node: this node's own first, then members', then the newest others'."""
        with self._lock:
            newest = list(self._records.items())[::-1]
        newest.sort(key=lambda item: (item[0] != self.own_key, item[0] not in self._slots))
        return [known.raw for _, known in newest[:limit]]

    def unknown_members(self) -> list[int]:
        """Return the slots of members of whom no record is known."""
        return [slot for slot, key in self.others().items() if key not in self._records]

    def ban(self, key: bytes) -> bool:
        """Never take a blob from this node again. Returns whether that is new."""
        with self._lock:
            new = not self.banned(key)
            self._banned |= {key, self._wallets.get(key, key)}
            return new

    def banned(self, key: bytes) -> bool:
        return key in self._banned or self._wallets.get(key) in self._banned

    def sources(self, keys: Iterable[bytes]) -> list[bytes]:
        """Return those of ``keys`` that may serve blobs: members with a record, not banned, not this node."""
        return [
            key
            for key in keys
            if key in self._slots and key in self._records and not self.banned(key) and key != self.own_key
        ]

    def public(self, keys: Iterable[bytes]) -> list[bytes]:
        """Return those of ``sources`` that do not say that they are private."""
        return [key for key in self.sources(keys) if not self._records[key].record.is_private]

    def private(self) -> set[bytes]:
        """Return the members that say that they are private, this node among them if it does."""
        with self._lock:
            return {key for key, known in self._records.items() if known.record.is_private and key in self._slots}

    def on_paths(self, has_path: Callable[[bytes], bool]) -> None:
        """Have ``has_path(key)`` asked whether there is another way to a private node."""
        self._has_path = has_path

    def reachable(self, key: bytes) -> bool:
        """Return whether there is a way to a node: an address to connect to, or a path through its NAT."""
        record = self.record(key)
        return record is not None and (not self.hidden(record) or self._has_path(key))

    def own_private(self) -> bool:
        """Return whether this node's own record says that it is private: then nobody else will connect to it."""
        own = self._records.get(self.own_key)
        return own is not None and own.record.is_private

    def hidden(self, record: NodeRecord) -> bool:
        """Return whether connecting to the node's addresses is in vain: it is private, and not in this network."""
        own = self._records.get(self.own_key)
        near = own is not None and own.record.observed_ip != "" and own.record.observed_ip == record.observed_ip
        return record.is_private and not near
