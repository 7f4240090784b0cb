"""The duty of an elected witness: attest to the updates that this node holds and has validated."""

from __future__ import annotations

import logging

from coordinator.client import ChainUnavailable, CoordinatorClient, ProgramError, Pulse
from coordinator.state import Phase, Round
from psyche_node.node.changes import first
from psyche_node.node.exchange import UpdateExchange
from psyche_node.node.view import ChainView

log = logging.getLogger(__name__)


class Witness:
    """Follows the commitments of the rounds in flight and attests once per round, when it can say the most.

    That is as soon as everything committed has been validated or refused, or when half of ``round_witness_time`` has
    gone by while the whole run waits for attestations.
    """

    def __init__(self, chain: CoordinatorClient, view: ChainView, exchange: UpdateExchange, member: int) -> None:
        self._chain, self._view, self._exchange = chain, view, exchange
        self._member = member
        self._attested: set[int] = set()
        self.rounds: dict[int, Round] = {}

    async def run(self) -> None:
        """Run until the run is finished."""
        while self._view.pulse.run.phase is not Phase.FINISHED:
            seen, version = self._situation(self._view.pulse), self._exchange.changes.version
            self.rounds = {record.round: record for record in await self._chain.rounds()}
            for record in self.rounds.values():
                await self._exchange.follow(record.round, record.commitments.values())
                await self._attest(record)
            await first(self._different(seen), self._exchange.changes.beyond(version))

    async def _attest(self, record: Round) -> None:
        run = self._view.pulse.run
        if not self._is_due(record):
            return
        held = self._exchange.held(record.round) & record.commitments.keys()
        try:
            await self._chain.attest(record.round, held)
            self._attested.add(record.round)
            missing = record.commitments.keys() - held
            if missing:
                log.warning("round %d: attested without the updates of members %s", record.round, sorted(missing))
        except ProgramError as error:
            self._attested.add(record.round)
            log.info(
                "attestation of round %d came too late (%s; the run is in round %d)", record.round, error, run.round
            )
        except ChainUnavailable as error:
            log.warning("attestation of round %d not sent, trying again: %s", record.round, error)

    def _is_due(self, record: Round) -> bool:
        pulse = self._view.pulse
        if not record.closed or record.round < pulse.run.final_rounds or record.round in self._attested:
            return False
        if self._member not in record.witnesses or self._member in record.attestations:
            return False
        if self._exchange.settled(record.round, record.commitments):
            return True
        return self._is_late(pulse)

    @staticmethod
    def _is_late(pulse: Pulse) -> bool:
        waited = pulse.slot - pulse.run.phase_slot
        return pulse.run.phase is Phase.ROUND_WITNESS and waited * 2 >= pulse.run.limits.round_witness_time

    async def _different(self, seen: tuple[object, ...]) -> None:
        await self._view.until(lambda pulse: self._situation(pulse) != seen)

    def _situation(self, pulse: Pulse) -> tuple[object, ...]:
        run, header = pulse.run, pulse.header
        return (run.phase, run.round, run.final_rounds, header.committed, self._is_late(pulse))
