"""Whom this node knew in its earlier lives, and keeps for the next one. Runs on trio."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import trio

from psyche_node.network.directory import Directory
from psyche_node.network.peerstore import Peerstore
from psyche_node.network.threads import in_thread

SAVE_EVERY = 2.0
# So many of them stand in for bootstrap nodes that are gone, until the members are known.
MAX_STAND_INS = 16


class Acquaintances:
    """Fills the directory from disk when made, and keeps the disk up to date."""

    def __init__(self, path: Path, run: bytes, directory: Directory, bootstrap: list[tuple[bytes, str]]) -> None:
        """``bootstrap``: (node key, multiaddr) of those that the operator named."""
        self._directory, self._named = directory, [key for key, _ in bootstrap]
        self._store = Peerstore(path, run)
        remembered = self._store.load()
        directory.remember(remembered)
        chosen = random.sample(remembered, min(MAX_STAND_INS, len(remembered)))
        self.bootstrap = [
            *bootstrap,
            *((known.record.node_key, address) for known in chosen for address in known.record.p2p_addresses),
        ]
        """Where to start: those named, and some of those remembered."""

    async def keep(self) -> None:
        """Write what is new every two seconds until cancelled, and then once more."""
        try:
            while True:
                await trio.sleep(SAVE_EVERY)
                await in_thread(partial(self._store.save, self._directory.lasting(self._named)))
        finally:
            self._store.save(self._directory.lasting(self._named))
