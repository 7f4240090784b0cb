"""A plan: what fits on the GPUs, and if not what would, how long a round takes, and what the chain costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from coordinator.run_costs import RunFees, run_fees
from psyche_node.planning.advice import Try, advice
from psyche_node.planning.asked import Asked, load, usable
from psyche_node.planning.context import beyond
from psyche_node.planning.errors import PlanError
from psyche_node.planning.exchange import CHAIN_SLOTS, Exchange
from psyche_node.planning.memory import Memory, Work
from psyche_node.planning.shape import ModelShape
from psyche_node.planning.times import exchange_of, warnings
from psyche_node.units import seconds_text

_OF_A_RUN = frozenset(
    {
        "member_tokens_per_second",
        "tokens_per_second",
        "compute_seconds",
        "round_seconds",
        "run_days",
        "fees",
    }
)


@dataclass(frozen=True, slots=True)
class Terms:
    """Of a run: ``batch`` sequences of ``sequence`` tokens a round, of all ``members`` together."""

    members: int
    rounds: int
    batch: int
    sequence: int
    topk: int
    overlap: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes, seconds, tokens per second; ``usable`` is what the GPU has without what fragmentation may take. ``tries``:
    changes that make it fit, if it does not; none if nothing does. ``terms``: what all members of the run have in
    common."""

    model: str
    parameters: int
    gpus: int
    gpu: str
    terms: Terms
    work: Work
    memory: Memory
    usable: int
    fits: bool
    tries: tuple[Try, ...]
    exchange: Exchange
    member_tokens_per_second: float
    tokens_per_second: float
    compute_seconds: float
    chain_seconds: float
    round_seconds: float
    run_days: float
    fees: RunFees
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Without what depends on its running, if it does not fit."""
        values = asdict(self) | {"memory": {**self.memory.parts(), "total": self.memory.total}}
        return values if self.fits else {key: value for key, value in values.items() if key not in _OF_A_RUN}


def plan(shape: ModelShape, asked: Asked) -> Plan:
    """Raises PlanError if GPUs and tensor parallelism do not go together, or there are fewer sequences than members."""
    if asked.batch < asked.members:
        raise PlanError(f"a batch of {asked.batch} sequences leaves some of {asked.members} members without; raise it")
    loaded = load(shape, asked)
    work, fits, notes = loaded.work, loaded.fits, list[str]()
    if fits and work.checkpointing and asked.checkpointing is None:
        notes.append("activation checkpointing: without, it does not fit; it costs a quarter of the speed")
    if asked.bf16:
        notes.append("the precision of the weights is the run's: members that keep them in fp32 cannot take part")
    if shape.assumed:
        notes.append(f"activations of {shape.kind} models are counted as Llama's")
    length = min(asked.document or asked.sequence, asked.sequence)
    flops = shape.flops_per_token(length)
    # Checkpointing computes the forward pass twice: four thirds of the work, of which model FLOPs count three.
    speed = asked.gpus * asked.gpu.flops * asked.mfu * (0.75 if work.checkpointing else 1.0) / flops
    tokens = asked.batch * asked.sequence
    # Every data-parallel rank works through as many micro-batches as the fullest; what the others lack is lost.
    ranks = asked.members * work.data_parallel
    full = ceil(asked.batch / ranks) * ranks / asked.batch
    compute = tokens / (asked.members * speed) * full
    if fits and full > 1.25:
        notes.append(f"{asked.batch} sequences over {ranks} data-parallel ranks leave some idle; raise the batch")
    slow = tuple(warnings(shape, asked, compute)) if fits else ()
    unseen = beyond(shape.context, asked.sequence)
    sent, chain = exchange_of(asked), CHAIN_SLOTS * asked.slot_seconds
    waiting = sent.seconds + chain
    seconds = max(compute, waiting) if asked.overlap else compute + waiting
    if fits and chain > compute:
        notes.append(
            f"the chain takes {seconds_text(chain)} a round, which is more than training: a larger batch would help"
        )
    elif fits and not slow and waiting > compute:
        notes.append(
            "the exchange takes longer than training: a smaller topk, a larger batch or a faster line would help"
        )
    if asked.link.loss or asked.link.jitter:
        notes.append("what a line loses, and how much its delay varies, is not reckoned with")
    return Plan(
        model=shape.name,
        parameters=shape.parameters,
        gpus=asked.gpus,
        gpu=asked.gpu.name,
        terms=Terms(asked.members, asked.rounds, asked.batch, asked.sequence, asked.topk, asked.overlap),
        work=work,
        memory=loaded.memory,
        usable=usable(asked.gpu),
        fits=fits,
        tries=() if fits else advice(shape, asked),
        exchange=sent,
        member_tokens_per_second=speed / full,
        tokens_per_second=tokens / seconds,
        compute_seconds=compute,
        chain_seconds=chain,
        round_seconds=seconds,
        run_days=seconds * asked.rounds / 86_400,
        fees=run_fees(asked.members, asked.rounds, asked.rounds_per_epoch, asked.witnesses, asked.priority_fee),
        warnings=slow if unseen is None else (unseen, *slow),
        notes=tuple(notes),
    )
