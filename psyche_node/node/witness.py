"""The duty of an elected witness: attest to the updates that this node holds and has validated."""

from __future__ import annotations

import logging

from coordinator.client import ChainError, ChainUnavailable, CoordinatorClient, ProgramError, Pulse, RpcError
from coordinator.errors import ErrorCode
from coordinator.state import Phase, Round
from coordinator.tables import RoundTables
from psyche_node.node.changes import first
from psyche_node.node.exchange import UpdateExchange
from psyche_node.node.view import ChainView

log = logging.getLogger(__name__)


class Witness:
    """Follows the commitments of the rounds in flight and attests once per round, when it can say the most.

    That is as soon as everything committed has been validated or refused, or when half of ``round_witness_time`` has
    gone by while the whole run waits for attestations of this round.
    """

    def __init__(self, chain: CoordinatorClient, view: ChainView, exchange: UpdateExchange, member: int) -> None:
        self._chain, self._view, self._exchange = chain, view, exchange
        self._member = member
        self._attested: set[int] = set()
        self._tables = RoundTables(chain)

    async def run(self) -> None:
        """Run until the run is finished."""
        while self._view.pulse.run.phase is not Phase.FINISHED:
            seen, version = self._situation(self._view.pulse), self._exchange.changes.version
            sent = [await self._look_at(record) for record in (await self._refresh()).values()]
            if not all(sent):
                await self._view.next()  # the chain is back
                continue
            await first(self._different(seen), self._exchange.changes.beyond(version))

    async def record(self, round_number: int, *, closed: bool) -> Round | None:
        """Return a round, at least as it began or as it was ``closed``; None if the chain does not keep it any more."""
        return await self._view.read(lambda: self._tables.record(round_number, self._view.pulse, closed=closed))

    async def _refresh(self) -> dict[int, Round]:
        rounds = await self._view.read(lambda: self._tables.refresh(self._view.pulse))
        self._attested &= rounds.keys()
        return rounds

    async def _look_at(self, record: Round) -> bool:
        """Follow the round's commitments, attest if it is time. Returns whether nothing is left to be sent again."""
        await self._exchange.follow(record.round, record.commitments.values())
        return not self._is_due(record) or await self._attest(record)

    async def _attest(self, record: Round) -> bool:
        run = self._view.pulse.run
        held = self._exchange.held(record.round) & record.commitments.keys()
        missing = record.commitments.keys() - held
        try:
            await self._chain.attest(record.round, held)
            self._attested.add(record.round)
            if missing:
                log.warning("round %d: attested without the updates of members %s", record.round, sorted(missing))
        except ProgramError as error:
            self._attested.add(record.round)
            if error.code == ErrorCode.ALREADY_ATTESTED:
                log.debug("round %d: attested before, by an attempt whose answer was lost", record.round)
            elif error.code == ErrorCode.ROUND_FINAL:
                why = "had all its updates" if missing else "could say that it has them"
                log.info("round %d was decided by other witnesses before this node %s", record.round, why)
            else:
                log.info("round %d: not attested (the run is in round %d): %s", record.round, run.round, error)
        except (ChainUnavailable, RpcError) as error:
            log.warning("attestation of round %d not sent, trying again: %s", record.round, error)
            return False
        except ChainError as error:
            # A wallet that cannot pay, say: the same again would fail again, and the next round is another chance.
            self._attested.add(record.round)
            log.warning("round %d: not attested: %s", record.round, error)
        return True

    def _is_due(self, record: Round) -> bool:
        final = record.final or record.round < self._view.pulse.run.final_rounds
        if not record.closed or final or record.round in self._attested:
            return False
        if self._member not in record.witnesses or self._member in record.attestations:
            return False
        if self._exchange.settled(record.round, record.commitments):
            return True
        pulse = self._view.pulse
        run = pulse.run
        awaited = record.round < run.round or not run.limits.overlap or pulse.header.draining
        return awaited and self._is_late(pulse)

    @staticmethod
    def _is_late(pulse: Pulse) -> bool:
        """Whether the run has waited long for attestations."""
        waited = pulse.slot - pulse.run.phase_slot
        return pulse.run.phase is Phase.ROUND_WITNESS and waited * 2 >= pulse.run.limits.round_witness_time

    async def _different(self, seen: tuple[object, ...]) -> None:
        await self._view.until(lambda pulse: self._situation(pulse) != seen)

    def _situation(self, pulse: Pulse) -> tuple[object, ...]:
        run, header = pulse.run, pulse.header
        return (run.phase, run.round, run.final_rounds, header.committed, header.draining, self._is_late(pulse))
