"""The outsider (`--fault outsider`): a node that is no member, and announces and fetches all the same."""

from __future__ import annotations

import logging
import secrets

from coordinator.client import CoordinatorClient, Pulse
from coordinator.state import Phase
from psyche_node.ipc import Caller, Ok
from psyche_node.network.messages import Publish, Want, WantEntry
from psyche_node.network.store import BlobStore
from psyche_node.node.view import ChainView

log = logging.getLogger(__name__)


async def intrude(chain: CoordinatorClient, view: ChainView, network: Caller, store: BlobStore) -> None:
    """Every round, claim to be member 0 with made-up bytes, and ask for all updates, until the run is finished."""
    seen = -1
    while True:
        pulse = await _next_round(view, seen)
        if pulse.run.phase is Phase.FINISHED:
            return
        seen = pulse.run.round
        digest, length = store.put(secrets.token_bytes(pulse.run.terms.update_bytes), seen)
        log.info("round %d: announcing an update as member 0 without being one", seen)
        await network.call(Publish(round=seen, member=0, digest=digest.hex(), length=length), Ok)
        for record in await chain.rounds():
            wants = [
                WantEntry(member=c.member, digest=c.digest.hex(), length=c.length) for c in record.commitments.values()
            ]
            if wants:
                await network.call(Want(round=record.round, wants=wants), Ok)


async def _next_round(view: ChainView, seen: int) -> Pulse:
    def news(pulse: Pulse) -> bool:
        run = pulse.run
        return run.phase is Phase.FINISHED or (run.phase is Phase.ROUND_TRAIN and run.round > seen)

    return await view.until(news)
