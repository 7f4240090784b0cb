from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from node_stage import ScriptedChain, run_async, settle, watching
from node_values import commitment, pulse_of, round_of

from coordinator.client import ChainUnavailable, ProgramError, RpcError
from coordinator.errors import ErrorCode
from coordinator.failures import refused
from coordinator.state import Commitment, Phase, Round
from psyche_node.node.changes import Changes
from psyche_node.node.view import ChainView
from psyche_node.node.witness import Witness

ME = 1
ALL = [commitment(member) for member in range(4)]


class Held:
    """Stands in for the exchange: the test says which updates are valid and which are refused."""

    def __init__(self, valid: Iterable[int] = (), refused: Iterable[int] = ()) -> None:
        self.valid, self.refused = set(valid), set(refused)
        self.changes = Changes()

    async def follow(self, round: int, commitments: Iterable[Commitment]) -> None:
        pass

    def held(self, round: int) -> frozenset[int]:
        return frozenset(self.valid)

    def settled(self, round: int, committed: Iterable[int]) -> bool:
        return set(committed) <= self.valid | self.refused


def witness_of(chain: ScriptedChain, view: ChainView, held: Held) -> Witness:
    return Witness(chain, view, held, ME)  # type: ignore[arg-type]


TRAINING = pulse_of(Phase.ROUND_TRAIN, 6)
EARLY = pulse_of(Phase.ROUND_WITNESS, 6, slot=104, phase_slot=100)
LATE = pulse_of(Phase.ROUND_WITNESS, 6, slot=105, phase_slot=100)


@pytest.mark.parametrize(
    ("record", "pulse", "valid", "due"),
    [
        (round_of(5, ALL), TRAINING, range(4), True),
        (round_of(5, ALL), TRAINING, range(3), False),
        (round_of(5, []), TRAINING, [], True),
        (round_of(6, ALL, closed=False), TRAINING, range(4), False),
        (round_of(5, ALL, final=True), TRAINING, range(4), False),
        (round_of(5, ALL, witnesses=(0, 2)), TRAINING, range(4), False),
        (round_of(5, ALL, attestations={ME: frozenset()}), TRAINING, range(4), False),
        (round_of(5, ALL), EARLY, range(3), False),
        (round_of(5, ALL), LATE, range(3), True),
        # Nobody waits for the newest round yet when rounds overlap, unless it is the last before a cooldown.
        (round_of(6, ALL), LATE, range(3), False),
        (round_of(6, ALL), pulse_of(Phase.ROUND_WITNESS, 6, slot=105, phase_slot=100, draining=True), [], True),
        (round_of(6, ALL), pulse_of(Phase.ROUND_WITNESS, 6, slot=105, phase_slot=100, overlap=0), [], True),
        (round_of(5, ALL), pulse_of(Phase.ROUND_TRAIN, 6, slot=900, phase_slot=100), range(3), False),
    ],
    ids=[
        "everything is here",
        "something is on its way",
        "nothing was committed",
        "commitments are still open",
        "final",
        "not elected",
        "has attested",
        "waits, not for long",
        "waits for long",
        "waits for long for the round before",
        "waits for long, draining",
        "waits for long, no overlap",
        "training is on",
    ],
)
def test_when_an_attestation_is_due(record: Round, pulse: Any, valid: Iterable[int], due: bool) -> None:
    async def test() -> None:
        chain = ScriptedChain()
        chain.push(pulse)
        async with watching(chain) as view:
            await view.until(lambda p: True)
            assert witness_of(chain, view, Held(valid))._is_due(record) is due

    run_async(test())


def test_attests_once_everything_is_validated_or_refused_and_not_again() -> None:
    async def test() -> None:
        chain, held = ScriptedChain(), Held([0, 1])
        chain.table = (round_of(5, ALL),)
        chain.push(TRAINING)
        async with watching(chain) as view:
            await view.until(lambda p: True)
            duty = asyncio.create_task(witness_of(chain, view, held).run())
            held.refused.add(2)
            held.changes.fire()
            await asyncio.sleep(0)
            assert chain.sent == []
            held.valid.add(3)
            held.changes.fire()
            await settle(lambda: len(chain.sent) == 1)
            held.changes.fire()
            chain.push(pulse_of(Phase.ROUND_WITNESS, 6))
            chain.push(pulse_of(Phase.FINISHED, 7))
            await duty
            assert chain.sent == [("attest", 5, {0, 1, 3})]

    run_async(test())


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (ChainUnavailable("away"), 2),
        (RpcError("getLatestBlockhash", -32000, "busy"), 2),
        (ProgramError(ErrorCode.ROUND_FINAL, ()), 1),
        (ProgramError(ErrorCode.ALREADY_ATTESTED, ()), 1),
        (refused("no lamports"), 1),
    ],
)
def test_attestation_is_sent_again_when_the_chain_is_back_and_only_then(error: Exception, attempts: int) -> None:
    async def test() -> None:
        chain = ScriptedChain()
        chain.table = (round_of(5, ALL),)
        chain.errors["attest"] = [error]
        chain.push(TRAINING)
        async with watching(chain) as view:
            await view.until(lambda p: True)
            duty = asyncio.create_task(witness_of(chain, view, Held(range(4))).run())
            await settle(lambda: len(chain.sent) == 1)
            chain.push(pulse_of(Phase.ROUND_TRAIN, 6, slot=1))  # nothing has changed but the slot
            await settle(lambda: len(chain.sent) == attempts)
            chain.push(pulse_of(Phase.FINISHED, 7))
            await duty
            assert len(chain.sent) == attempts

    run_async(test())


def test_change_while_the_chain_is_read_is_not_missed() -> None:
    async def test() -> None:
        chain, held = ScriptedChain(), Held(range(3))
        chain.table = (round_of(5, ALL),)
        chain.push(TRAINING)

        async def rounds() -> tuple[Round, ...]:
            if held.valid == {0, 1, 2}:
                held.valid.add(3)
                held.changes.fire()
            return (round_of(5, ALL),) if chain.reads else (round_of(5, ALL, closed=False),)

        reads = 0

        async def counted() -> tuple[Round, ...]:
            nonlocal reads
            reads += 1
            chain.reads = reads > 1  # type: ignore[attr-defined]
            return await rounds()

        chain.rounds = counted  # type: ignore[method-assign]
        async with watching(chain) as view:
            await view.until(lambda p: True)
            duty = asyncio.create_task(witness_of(chain, view, held).run())
            await settle(lambda: chain.sent == [("attest", 5, {0, 1, 2, 3})])
            duty.cancel()
            await asyncio.gather(duty, return_exceptions=True)

    run_async(test())
