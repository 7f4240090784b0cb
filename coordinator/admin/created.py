"""A new run's settings as its owner should see them: all of them, in seconds where they are times, and what is odd."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from coordinator.chain import Chain, ChainUnavailable, RpcError
from coordinator.run_config import RunSettings

_TIMES: Final = (
    "join_grace",
    "warmup_time",
    "max_round_train_time",
    "round_witness_time",
    "cooldown_time",
    "adaptive_grace",
)
GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "members": ("init_min_members", "min_members", "max_members", "witnesses", "max_missed", "max_share"),
    "times": _TIMES,
    "rounds": ("total_rounds", "rounds_per_epoch", "batch", "ramp_batch", "ramp_rounds", "overlap"),
    "data": ("samples", "sequence_length", "data_manifest", "data_source"),
    "learning": (
        *("schedule", "warmup_rounds", "decay_rounds", "peak_lr", "final_lr", "decay", "weight_decay", "clip_norm"),
        *("z_loss", "lookahead", "clip_votes", "window"),
    ),
    "model": ("model_root", "model_source", "layout_digest", "topk", "update_bytes"),
}
"""Every limit and term is in one of them."""
_SAMPLES: Final = 4
# Slots that are looked at, for so long at most, and how often.
_COUNTED: Final = 10
_LOOK_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 0.002
_STILL_SECONDS: Final = 10.0
# Beyond these nobody means it.
_MOST_PASSES: Final = 10
_SHORTEST: Final = {"warmup_time": 10.0, "max_round_train_time": 2.0, "cooldown_time": 2.0}
_LONGEST_SECONDS: Final = 86_400.0
_HIGHEST_RATE: Final = 0.02
_ROUNDS_AT_RISK: Final = 1000


@dataclass(frozen=True, slots=True)
class Created:
    """The settings of a run on a chain whose slots take so long."""

    settings: RunSettings
    slot_seconds: float

    @property
    def passes(self) -> float:
        """How often the run goes over its data, if no round is void."""
        limits, terms = self.settings.limits, self.settings.terms
        return terms.sequences(limits.total_rounds, limits.batch) / terms.samples

    @property
    def seconds(self) -> dict[str, float]:
        """Of every time among the limits."""
        return {name: getattr(self.settings.limits, name) * self.slot_seconds for name in _TIMES}

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings.model_dump(),
            "slot_seconds": self.slot_seconds,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "passes": round(self.passes, 3),
            "warnings": list(self.cautions()),
        }

    def lines(self) -> Iterator[str]:
        """A line per group of settings."""
        values = self.settings.limits.model_dump() | self.settings.terms.model_dump()
        yield f"settings (times at slots of {self.slot_seconds * 1000:,.0f} ms):"
        for group, names in GROUPS.items():
            shown = [f"{name} {self._shown(name, values[name])}" for name in names if values[name] != ""]
            if group == "data":
                shown.insert(0, f"{self.passes:,.2f} passes")
            yield f"  {group:<9} {', '.join(shown)}"

    def cautions(self) -> Iterator[str]:
        """What is allowed and hardly meant, as sentences that say what to set instead."""
        limits, terms = self.settings.limits, self.settings.terms
        if self.passes > _MOST_PASSES:
            rounds = max(1, 3 * terms.samples // limits.batch)
            yield (
                f"the run goes {self.passes:,.0f} times over its data ({terms.samples:,} sequences): a model learns "
                f"them by heart. total_rounds={rounds:,} are three passes"
            )
        for name, seconds in self.seconds.items():
            if seconds < _SHORTEST.get(name, 0.0):
                fitting = round(60 / self.slot_seconds)
                yield f"{name} is {_time(seconds)}, which is hardly enough: {name}={fitting} is a minute on this chain"
            if seconds > _LONGEST_SECONDS:
                yield f"{name} is {_time(seconds)}: so long the run waits for a member that is silent"
        if terms.peak_lr > _HIGHEST_RATE:
            yield f"peak_lr is {terms.peak_lr:g}: each weight moves by that much every round, and models diverge"
        if limits.rounds_per_epoch >= limits.total_rounds > _ROUNDS_AT_RISK:
            yield (
                f"there is no checkpoint before the end of {limits.total_rounds:,} rounds, and nothing to go on from "
                "if all nodes fail: lower rounds_per_epoch"
            )

    def _shown(self, name: str, value: Any) -> str:
        if name in _TIMES:
            return f"{value:,} ({_time(self.seconds[name])})"
        if isinstance(value, bool):
            return "on" if value else "off"
        return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


async def slot_seconds(chain: Chain) -> float:
    """How long a slot of a chain takes: by its last minutes, or where it keeps no account of them, as
    psyche-ledger, by looking on.

    Raises ChainUnavailable, also where slots do not go on.
    """
    try:
        samples = await chain.rpc.call("getRecentPerformanceSamples", [_SAMPLES])
        slots, seconds = (sum(one[key] for one in samples) for key in ("numSlots", "samplePeriodSecs"))
        return float(seconds / slots)
    except (RpcError, TypeError, KeyError, ZeroDivisionError):
        begin, began = await _next_slot(chain)
        end, ended = begin, began
        while end < begin + _COUNTED and ended < began + _LOOK_SECONDS:
            end, ended = await _next_slot(chain)
        return float(f"{(ended - began) / (end - begin):.2g}")


async def _next_slot(chain: Chain) -> tuple[int, float]:
    """The next slot to begin, and when it did."""
    clock, before = asyncio.get_running_loop().time, await chain.slot()
    patience = clock() + _STILL_SECONDS
    while (slot := await chain.slot()) <= before:
        if clock() > patience:
            raise ChainUnavailable(
                f"the chain stands still: its slot has been {before} for {_STILL_SECONDS:g} s. Start it again, or name "
                "another RPC endpoint"
            )
        await asyncio.sleep(_POLL_SECONDS)
    return slot, clock()


def _time(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f}".removesuffix(".0") + f" {unit}"
    return f"{seconds:,.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"
