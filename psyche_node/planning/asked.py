"""What is to be planned, and how one of its GPUs would work at it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Final

from psyche_node.planning.errors import PlanError
from psyche_node.planning.gpus import Gpu
from psyche_node.planning.memory import SPARE, Compute, Memory, Work, memory
from psyche_node.planning.shape import ModelShape
from psyche_node.relay.spec import LinkSpec

SLOT_SECONDS: Final = 0.4
"""Of mainnet and devnet."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be planned. ``gpus`` of kind ``gpu`` per member; ``batch`` sequences per round of all ``members``.
    ``document``: mean tokens of a document, over which attention goes; 0: as long as the sequence. ``checkpointing``
    None: only if nothing fits without. ``train_slots`` and ``witness_slots``: the run's max_round_train_time and
    round_witness_time, in slots of ``slot_seconds``; 0: without end. ``joining``: the run exists, and what all its
    members have in common stays as it is."""

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
    z_loss: bool = False
    tensor_parallel: int = 1
    micro_batch: int = 1
    checkpointing: bool | None = None
    bf16: bool = False
    document: int = 0
    mfu: float = 0.35
    priority_fee: int = 0
    witnesses: int = 0
    train_slots: int = 0
    witness_slots: int = 0
    slot_seconds: float = SLOT_SECONDS
    joining: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """How one GPU works, what it needs for that, and whether it has it."""

    work: Work
    memory: Memory
    fits: bool


def usable(gpu: Gpu) -> int:
    """Bytes of a GPU without what fragmentation may take."""
    return int(gpu.memory * (1 - SPARE))


def load(shape: ModelShape, asked: Asked) -> Load:
    """What is asked for, on the fullest GPU; where nothing is said about checkpointing, with it if it does not fit
    without. Raises PlanError if GPUs and tensor parallelism do not go together."""
    tried = [asked.checkpointing] if asked.checkpointing is not None else [False, True]
    for checkpointing in tried:
        work = _work(shape, asked, checkpointing)
        needed = memory(shape, work)
        if needed.total <= usable(asked.gpu):
            return Load(work, needed, True)
    return Load(work, needed, False)


def _work(shape: ModelShape, asked: Asked, checkpointing: bool) -> Work:
    tensor = asked.tensor_parallel
    if tensor < 1 or asked.gpus % tensor or shape.heads % tensor or shape.kv_heads % tensor:
        raise PlanError(
            f"--tensor-parallel {tensor}: it has to divide the {asked.gpus} GPUs and the model's {shape.kv_heads} "
            "key-value heads"
        )
    data = asked.gpus // tensor
    share = ceil(asked.batch / asked.members / data)
    micro = min(asked.micro_batch, share)
    compute: Compute = "bf16" if data > 1 or asked.bf16 else "autocast"
    return Work(
        sequence=asked.sequence,
        micro_batch=micro,
        data_parallel=data,
        tensor_parallel=tensor,
        compute=compute,
        checkpointing=checkpointing,
        lookahead=asked.lookahead,
        weight_bytes=2 if asked.bf16 else 4,
        micro_batches=ceil(share / micro),
        masters=not asked.bf16,
        z_loss=asked.z_loss,
    )
