"""A commitment whose answer is lost may have landed: nobody gives such an update up, or serves one that has not."""

from __future__ import annotations

import logging

from coordinator.client import ChainUnavailable, CoordinatorClient, ProgramError
from coordinator.errors import ErrorCode
from psyche_node.node.view import ChainView
from psyche_node.node.witness import Witness
from psyche_node.training.messages import Trained

log = logging.getLogger(__name__)


class Committing:
    """Commits this member's updates, each once: the program takes one of a member and round, and refuses a second."""

    def __init__(self, chain: CoordinatorClient, view: ChainView, witness: Witness, member: int) -> None:
        self._chain, self._view, self._witness, self._member = chain, view, witness, member

    async def commit(self, number: int, digest: bytes, length: int, trained: Trained) -> None:
        """Return when the update is committed on chain. Raises ChainError when it is not, and will not be.

        Where nobody can say whether it has landed, it is sent again when the chain is back, until the round has closed;
        then the round's table tells.
        """
        unknown = False
        while True:
            try:
                await self._chain.commit(number, digest, length, trained.tokens, trained.fingerprint_before)
                return
            except ChainUnavailable as error:
                log.warning("round %d: nobody knows yet whether the update is committed: %s", number, error)
                unknown = True
            except ProgramError as error:
                landed = error.code == ErrorCode.ALREADY_COMMITTED
                if landed or (unknown and await self._has_landed(number, digest)):
                    return
                raise
            await self._view.next()

    async def _has_landed(self, number: int, digest: bytes) -> bool:
        record = await self._witness.record(number, closed=True)
        mine = None if record is None else record.commitments.get(self._member)
        return mine is not None and mine.digest == digest
