"""What to change so that it fits: every change is planned before it is named, and the last one fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

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


_Change = tuple[str, Any]
"""A field of `Asked`, and its new value."""
_Changes = Callable[[ModelShape, Asked, Load], Iterator[_Change]]


def advice(shape: ModelShape, asked: Asked) -> tuple[Try, ...]:
    """Changes to what does not fit, the last of which fits; none if nothing does.

    First what a member can do with its GPUs, then what the owner of a run can before it begins, then more GPUs.
    """
    ways = [_MEMBERS] if asked.joining else [_MEMBERS, _MEMBERS + _OWNERS]
    for way in ways:
        if changes := _pursued(shape, asked, way):
            return _tried(shape, asked, changes)
    for way in ways:
        for gpus in _COUNTS:
            if gpus <= asked.gpus or gpus % asked.tensor_parallel:
                continue
            first = ("gpus", gpus)
            more = _changed(asked, [first])
            if load(shape, more).fits:
                return _tried(shape, asked, [first])
            if changes := _pursued(shape, more, way):
                return _tried(shape, asked, [first, *changes])
    return ()


def _pursued(shape: ModelShape, asked: Asked, ways: tuple[_Changes, ...]) -> list[_Change]:
    """One change after the other until it fits, without those that later ones made needless; none if it never fits."""
    made: list[_Change] = []
    loaded = load(shape, asked)
    for way in ways:
        for change in way(shape, _changed(asked, made), loaded):
            then = load(shape, _changed(asked, [*made, change]))
            if then.memory.total >= loaded.memory.total:
                continue
            made.append(change)
            loaded = then
            if then.fits:
                return _needed(shape, asked, made)
    return []


def _needed(shape: ModelShape, asked: Asked, made: list[_Change]) -> list[_Change]:
    """Those of the changes without which it does not fit; what costs most is left out first."""
    for at in reversed(range(len(made) - 1)):
        fewer = made[:at] + made[at + 1 :]
        if load(shape, _changed(asked, fewer)).fits:
            made = fewer
    return made


def _changed(asked: Asked, changes: Sequence[_Change]) -> Asked:
    return replace(asked, **dict(changes))


def _tried(shape: ModelShape, asked: Asked, changes: Sequence[_Change]) -> tuple[Try, ...]:
    tries = []
    for at, (field, value) in enumerate(changes, start=1):
        loaded = load(shape, _changed(asked, changes[:at]))
        tries.append(Try(*_flag(asked, field, value), loaded.memory.total, loaded.fits, field in _COMMON))
    return tuple(tries)


def _flag(asked: Asked, field: str, value: Any) -> tuple[str, Value]:
    """What a field of what is asked is on the command line."""
    special = {"gpus": ("gpus", f"{value}x{asked.gpu.name}"), "bf16": ("precision", "bf16"), "sequence": ("seq", value)}
    return special.get(field, (field.replace("_", "-"), value))


def _checkpointing(shape: ModelShape, asked: Asked, loaded: Load) -> Iterator[_Change]:
    if not loaded.work.checkpointing:
        yield "checkpointing", True


def _one_at_a_time(shape: ModelShape, asked: Asked, loaded: Load) -> Iterator[_Change]:
    if loaded.work.micro_batch > 1:
        yield "micro_batch", 1


def _more_tensor_parallel(shape: ModelShape, asked: Asked, loaded: Load) -> Iterator[_Change]:
    for tensor in range(asked.tensor_parallel + 1, shape.kv_heads + 1):
        if not any(whole % tensor for whole in (asked.gpus, shape.heads, shape.kv_heads)):
            yield "tensor_parallel", tensor


def _bf16(shape: ModelShape, asked: Asked, loaded: Load) -> Iterator[_Change]:
    if not asked.bf16:
        yield "bf16", True


def _shorter(shape: ModelShape, asked: Asked, loaded: Load) -> Iterator[_Change]:
    length = asked.sequence // 2
    while length >= SHORTEST:
        yield "sequence", length
        length //= 2


# In the order of what they cost: speed, then accuracy, then context.
_MEMBERS: Final[tuple[_Changes, ...]] = (_checkpointing, _one_at_a_time, _more_tensor_parallel)
_OWNERS: Final[tuple[_Changes, ...]] = (_bf16, _shorter)
_COMMON: Final = frozenset({"bf16", "sequence"})
