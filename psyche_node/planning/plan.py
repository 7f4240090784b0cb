"""A plan: what fits on the GPUs, and if not what would, how long a round takes, and what the chain costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from coordinator.run_costs import RunFees, run_fees
from psyche_node.planning.errors import PlanError
from psyche_node.planning.exchange import CHAIN_SECONDS, Exchange, exchange
from psyche_node.planning.gpus import Gpu
from psyche_node.planning.memory import SPARE, Compute, Memory, Work, memory
from psyche_node.planning.shape import ModelShape
from psyche_node.relay.spec import LinkSpec

SHORTEST = 2048
"""Tokens below which a sequence is not shortened to make it fit."""


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
class Asked:
    """What is to be planned. ``gpus`` of kind ``gpu`` per member; ``batch`` sequences per round of all ``members``.
    ``document``: mean tokens of a document, over which attention goes; 0: as long as the sequence. ``checkpointing``
    None: only if nothing fits without."""

    gpus: int
    gpu: Gpu
    members: int
    link: LinkSpec
    sequence: int
    batch: int
    rounds: int
    rounds_per_epoch: int
    topk: int
    update_bytes: int
    overlap: bool
    lookahead: bool = True
    tensor_parallel: int = 1
    micro_batch: int = 1
    checkpointing: bool | None = None
    bf16: bool = False
    document: int = 0
    mfu: float = 0.35
    priority_fee: int = 0
    witnesses: int = 0


@dataclass(frozen=True, slots=True)
class Try:
    """A change, and what it makes of the memory."""

    change: str
    total: int
    fits: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes, seconds, tokens per second; ``usable`` is what the GPU has without what fragmentation may take."""

    model: str
    parameters: int
    gpus: int
    gpu: str
    work: Work
    memory: Memory
    usable: int
    fits: bool
    tries: tuple[Try, ...]
    exchange: Exchange
    member_tokens_per_second: float
    tokens_per_second: float
    compute_seconds: float
    round_seconds: float
    run_days: float
    fees: RunFees
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Without what depends on its running, if it does not fit."""
        values = asdict(self) | {"memory": {**self.memory.parts(), "total": self.memory.total}}
        return values if self.fits else {key: value for key, value in values.items() if key not in _OF_A_RUN}


def plan(shape: ModelShape, asked: Asked) -> Plan:
    """Raises PlanError if GPUs and tensor parallelism do not go together, or there are fewer sequences than members."""
    if asked.batch < asked.members:
        raise PlanError(f"a batch of {asked.batch} sequences leaves some of {asked.members} members without; raise it")
    work, notes = _work(shape, asked, asked.checkpointing), []
    if asked.checkpointing is None:
        work = replace(work, checkpointing=False)
        if not _fits(shape, work, asked.gpu):
            work = replace(work, checkpointing=True)
            notes.append("activation checkpointing: without, it does not fit; it costs a quarter of the speed")
    needed, fits = memory(shape, work), _fits(shape, work, asked.gpu)
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
    sent = exchange(asked.update_bytes, asked.members, asked.link.up_rate, asked.link.down_rate, asked.link.rtt)
    waiting = sent.seconds + CHAIN_SECONDS
    seconds = max(compute, waiting) if asked.overlap else compute + waiting
    if fits and waiting > compute:
        notes.append(
            "the exchange takes longer than training: a smaller topk, a larger batch or a faster line would help"
        )
    return Plan(
        model=shape.name,
        parameters=shape.parameters,
        gpus=asked.gpus,
        gpu=asked.gpu.name,
        work=work,
        memory=needed,
        usable=_usable(asked.gpu),
        fits=fits,
        tries=() if fits else tuple(_tries(shape, work, asked)),
        exchange=sent,
        member_tokens_per_second=speed / full,
        tokens_per_second=tokens / seconds,
        compute_seconds=compute,
        round_seconds=seconds,
        run_days=seconds * asked.rounds / 86_400,
        fees=run_fees(asked.members, asked.rounds, asked.rounds_per_epoch, asked.witnesses, asked.priority_fee),
        notes=tuple(notes),
    )


def _usable(gpu: Gpu) -> int:
    return int(gpu.memory * (1 - SPARE))


def _fits(shape: ModelShape, work: Work, gpu: Gpu) -> bool:
    return memory(shape, work).total <= _usable(gpu)


def _work(shape: ModelShape, asked: Asked, checkpointing: bool | None) -> Work:
    tensor = asked.tensor_parallel
    if tensor < 1 or asked.gpus % tensor or not _cuts(shape, tensor):
        raise PlanError(
            f"--tensor-parallel {tensor}: it has to divide the {asked.gpus} GPUs and the model's {shape.kv_heads} "
            "key-value heads"
        )
    share = ceil(asked.batch / asked.members / (asked.gpus // tensor))
    micro = min(asked.micro_batch, share)
    work = Work(
        sequence=asked.sequence,
        micro_batch=micro,
        checkpointing=bool(checkpointing),
        lookahead=asked.lookahead,
        weight_bytes=2 if asked.bf16 else 4,
        masters=not asked.bf16,
        micro_batches=ceil(share / micro),
    )
    return _divided(work, asked.gpus // tensor, tensor)


def _cuts(shape: ModelShape, tensor: int) -> bool:
    return shape.heads % tensor == 0 and shape.kv_heads % tensor == 0


def _tries(shape: ModelShape, work: Work, asked: Asked) -> Iterator[Try]:
    """One change after the other, each on top of those before that helped, until it fits."""
    total, usable = memory(shape, work).total, _usable(asked.gpu)
    for change in _CHANGES:
        for name, changed in change(shape, work, asked):
            needed = memory(shape, changed).total
            if needed >= total:
                continue
            work, total = changed, needed
            yield Try(name, total, total <= usable)
            if total <= usable:
                return
    state = memory(shape, replace(work, sequence=1)).total
    if state > usable:
        least = ceil(asked.gpus * state / usable)
        yield Try(f"--gpus {least}x{asked.gpu.name}, or so: weights and optimizer alone are too much", 0, False)


def _checkpointing(shape: ModelShape, work: Work, asked: Asked) -> Iterator[tuple[str, Work]]:
    if not work.checkpointing:
        yield "--checkpointing", replace(work, checkpointing=True)


def _one_at_a_time(shape: ModelShape, work: Work, asked: Asked) -> Iterator[tuple[str, Work]]:
    if work.micro_batch > 1:
        passes = work.micro_batches * work.micro_batch
        yield "--micro-batch 1", replace(work, micro_batches=passes, micro_batch=1)


def _more_tensor_parallel(shape: ModelShape, work: Work, asked: Asked) -> Iterator[tuple[str, Work]]:
    tensor = work.tensor_parallel * 2
    while asked.gpus % tensor == 0 and _cuts(shape, tensor):
        yield f"--tensor-parallel {tensor}", _divided(work, asked.gpus // tensor, tensor)
        tensor *= 2


def _bf16(shape: ModelShape, work: Work, asked: Asked) -> Iterator[tuple[str, Work]]:
    if work.weight_bytes == 4:
        yield "--precision bf16", replace(work, weight_bytes=2, masters=False, compute="bf16")


def _shorter(shape: ModelShape, work: Work, asked: Asked) -> Iterator[tuple[str, Work]]:
    length = work.sequence // 2
    while length >= SHORTEST:
        yield f"--seq {length}", replace(work, sequence=length)
        length //= 2


# In the order of what they cost: speed, then accuracy, then context.
_CHANGES = (_checkpointing, _one_at_a_time, _more_tensor_parallel, _bf16, _shorter)


def _divided(work: Work, data: int, tensor: int) -> Work:
    compute: Compute = "bf16" if data > 1 or work.weight_bytes == 2 else "autocast"
    return replace(work, tensor_parallel=tensor, data_parallel=data, compute=compute)
