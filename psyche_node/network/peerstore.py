"""The peers a node knew, on disk: signed records of members and bootstrap nodes, for the next start.

A node that comes back when its bootstrap nodes are gone finds the network through them. Format: the magic, the BLAKE3
digest of the rest, and a serialized ``Records``. Nothing in it is believed without its signature.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3
from google.protobuf.message import DecodeError

from psyche_node.network.directory import Known
from psyche_node.network.statements import MAX_RECORD, Malformed, NodeRecord
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
MAX_RECORDS = 512
_MAGIC = b"psyche-node peers 1\n"
_DIGEST_BYTES = 32
MAX_BYTES = len(_MAGIC) + _DIGEST_BYTES + MAX_RECORDS * (MAX_RECORD + 8)


class Peerstore:
    """The file ``path``. Its owner alone can read it: it tells with whom this node trains."""

    def __init__(self, path: Path, run: bytes, clock: Callable[[], float] = time.time) -> None:
        self._path, self._run, self._clock = path, run, clock
        self._written: frozenset[bytes] = frozenset()
        self._lock = threading.Lock()

    def load(self) -> list[Known]:
        """Return the records that are still good. A damaged file is moved aside, which the log tells."""
        try:
            with self._path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return []
        except OSError as error:
            log.warning("the known peers in %s cannot be read: %s; starting without them", self._path, error)
            return []
        try:
            records = _decode(raw)
        except Malformed as error:
            aside = self._path.with_suffix(".damaged")
            with contextlib.suppress(OSError):
                self._path.replace(aside)
            log.warning("the known peers in %s are damaged (%s); moved to %s, starting anew", self._path, error, aside)
            return []
        known = []
        for one in records:
            try:
                record = NodeRecord.parse(one, self._run)
            except Malformed as error:
                log.debug("a record in %s is of no use: %s", self._path, error)
                continue
            if record.tls_expires > self._clock():
                known.append(Known(record, one))
        self._written = frozenset(one.raw for one in known)
        log.info("%d of %d peers in %s are known and not expired", len(known), len(records), self._path)
        return known

    def save(self, records: list[bytes]) -> None:
        """Replace what is on disk, at once or not at all. Does nothing when it is the same; logs when it cannot. Any
        thread."""
        with self._lock:
            self._save(records[:MAX_RECORDS])

    def _save(self, kept: list[bytes]) -> None:
        if frozenset(kept) == self._written:
            return
        body = wire.Records(records=kept).SerializeToString()
        temporary = self._path.with_suffix(".new")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(_MAGIC + blake3(body).digest() + body)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as error:
            log.warning("the known peers cannot be written to %s: %s; trying again later", self._path, error)
            return
        self._written = frozenset(kept)


def _decode(raw: bytes) -> list[bytes]:
    if len(raw) > MAX_BYTES:
        raise Malformed(f"more than {MAX_BYTES} bytes")
    body = raw[len(_MAGIC) + _DIGEST_BYTES :]
    if not raw.startswith(_MAGIC) or raw[len(_MAGIC) : len(_MAGIC) + _DIGEST_BYTES] != blake3(body).digest():
        raise Malformed("its checksum is wrong")
    message = wire.Records()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise Malformed(f"it does not parse: {error}") from None
    return list(message.records)[:MAX_RECORDS]
