"""What to change so that it fits: every change is planned before it is named, and the last one fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from psyche_node.planning.asked import Asked, Load, load
from psyche_node.planning.shape import ModelShape

SHORTEST: Final = 2048
"""Tokens below which a sequence is not shortened to make it fit."""
_COUNTS: Final = (1, 2, 3, 4, 5, 6, 7, 8, *range(16, 257, 8), *(1 << bits for bits in range(9, 13)))
"""GPUs of a host, of hosts, and more than anybody has."""

Value = str | int | bool


@dataclass(frozen=True, slots=True)
class Try:
    """A change, on top of those before it: the flag of `psyche-node plan` without its dashes, and its value. ``total``:
    bytes that a GPU then needs. ``owners``: all members of a run have it in common, so that its owner sets it."""

    flag: str
    value: Value
    total: int
    fits: bool
    owners: bool


_Change = tuple[str, Value, Asked]
_Changes = Callable[[ModelShape, Asked, Load], Iterator[_Change]]


def advice(shape: ModelShape, asked: Asked) -> tuple[Try, ...]:
    """Changes to what does not fit, the last of which fits; none if nothing does.

    First what a member can do with its GPUs, then what the owner of a run can before it begins, then more GPUs.
    """
    ways = [_MEMBERS] if asked.joining else [_MEMBERS, _MEMBERS + _OWNERS]
    for way in ways:
        tries = _pursued(shape, asked, load(shape, asked), way)
        if tries and tries[-1].fits:
            return tuple(tries)
    for way in ways:
        for gpus in _COUNTS:
            if gpus <= asked.gpus or gpus % asked.tensor_parallel:
                continue
            more = replace(asked, gpus=gpus)
            loaded = load(shape, more)
            first = _tried("gpus", f"{gpus}x{asked.gpu.name}", loaded)
            tries = [first, *([] if first.fits else _pursued(shape, more, loaded, way))]
            if tries[-1].fits:
                return tuple(tries)
    return ()


def _pursued(shape: ModelShape, asked: Asked, loaded: Load, changes: tuple[_Changes, ...]) -> list[Try]:
    """One change after the other, each on top of those before that helped, until it fits."""
    tries: list[Try] = []
    for change in changes:
        for flag, value, changed in change(shape, asked, loaded):
            then = load(shape, changed)
            if then.memory.total >= loaded.memory.total:
                continue
            asked, loaded = changed, then
            tries.append(_tried(flag, value, then))
            if then.fits:
                return tries
    return tries


def _tried(flag: str, value: Value, loaded: Load) -> Try:
    return Try(flag, value, loaded.memory.total, loaded.fits, flag in _COMMON)


def _checkpointing(shape: ModelShape, asked: Asked, loaded: Load) -> Iterator[_Change]:
    if not loaded.work.checkpointing:
        yield "checkpointing", True, replace(asked, checkpointing=True)


def _one_at_a_time(shape: ModelShape, asked: Asked, loaded: Load) -> Iterator[_Change]:
    if loaded.work.micro_batch > 1:
        yield "micro-batch", 1, replace(asked, micro_batch=1)


def _more_tensor_parallel(shape: ModelShape, asked: Asked, loaded: Load) -> Iterator[_Change]:
    for tensor in range(asked.tensor_parallel + 1, shape.kv_heads + 1):
        if not any(whole % tensor for whole in (asked.gpus, shape.heads, shape.kv_heads)):
            yield "tensor-parallel", tensor, replace(asked, tensor_parallel=tensor)


def _bf16(shape: ModelShape, asked: Asked, loaded: Load) -> Iterator[_Change]:
    if not asked.bf16:
        yield "precision", "bf16", replace(asked, bf16=True)


def _shorter(shape: ModelShape, asked: Asked, loaded: Load) -> Iterator[_Change]:
    length = asked.sequence // 2
    while length >= SHORTEST:
        yield "seq", length, replace(asked, sequence=length)
        length //= 2


# In the order of what they cost: speed, then accuracy, then context.
_MEMBERS: Final[tuple[_Changes, ...]] = (_checkpointing, _one_at_a_time, _more_tensor_parallel)
_OWNERS: Final[tuple[_Changes, ...]] = (_bf16, _shorter)
_COMMON: Final = frozenset({"precision", "seq"})
