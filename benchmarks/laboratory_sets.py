"""Named sets of runs for the convergence benchmark."""

from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.laboratory_votes import ATTACKS


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a table: options that differ from the default recipe."""

    label: str
    method: Literal["adamw", "laboratory", "library"]
    options: dict[str, Any] = field(default_factory=dict)


def _adamw(label: str = "AdamW", **options: Any) -> Entry:
    return Entry(label, "adamw", {"lr": 5e-3, "beta2": 0.95} | options)


def _one(label: str, **options: Any) -> Entry:
    return Entry(label, "laboratory", options)


_BEFORE = {"smooth": 0.0, "lookahead": "own", "decay": 0.95}
"""The algorithm before smoothing: votes of one round, lookahead by the own momentum."""
_LINEAR = {
    "values": "scaled",
    "step": "linear",
    "combine": "sum",
    "smooth": 0.0,
    "decay": 1.0,
    "lookahead": "residual",
    "normalise": True,
    "lr": 1e-2,
}
"""Error feedback of every member's Adam steps: no sign, no smoothing, lookahead by what is not sent yet."""

SETS: dict[str, list[Entry]] = {
    "default": [_adamw(), _one("default")],
    "reference": [_adamw()],
    "chosen": [_one("default")],
    "adamw": [
        _adamw(f"AdamW beta2={beta2:g} wd={wd:g}", beta2=beta2, weight_decay=wd)
        for beta2, wd in ((0.95, 0.0), (0.95, 0.1), (0.99, 0.0))
    ],
    "topk": [
        *(_one(f"topk={topk}", topk=topk) for topk in (32, 64, 128, 256, 512, 1024)),
        _one("topk=4096, no feedback", topk=4096, feedback="none", decay=0.0, combine="sum"),
    ],
    "ablation": [
        _one("default"),
        _one("before (no smoothing, own lookahead)", **_BEFORE),
        _one("before, no lookahead", **(_BEFORE | {"lookahead": "none"})),
        _one("no lookahead", lookahead="none"),
        _one("lookahead own", lookahead="own"),
        _one("lookahead of two steps", ahead=2.0),
        _one("smooth=0.8", smooth=0.8),
        _one("smooth=0.95", smooth=0.95),
        _one("decay=0.5", decay=0.5),
        _one("decay=0.95", decay=0.95),
        _one("decay=0.999", decay=0.999),
        _one("feedback value", feedback="value"),
        _one("feedback none", feedback="none"),
        _one("combine sum", combine="sum"),
        _one("combine mean", combine="mean"),
        _one("values fp32", values="fp32"),
        _one("values fp32, combine mean", values="fp32", combine="mean"),
        _one("step rms", step="rms"),
        _one("vectors at a quarter", vector_rate=0.25),
        _one("embedding at half", embedding_rate=0.5),
        _one("scheduled 1024", topk=1024, select="scheduled", combine="sum", feedback="value", decay=1.0),
        _one("Adam steps, scaled votes", **_LINEAR),
    ],
    "overlap": [
        _adamw("AdamW, one round late", overlap=True, lr=2.5e-3),
        _one("overlap, lookahead shared", overlap=True),
        _one("overlap, lookahead both", overlap=True, lookahead="both"),
        _one("overlap, lookahead both, two steps", overlap=True, lookahead="both", ahead=2.0),
        _one("before, overlap", **(_BEFORE | {"overlap": True})),
        _one("Adam steps, scaled votes, overlap", **(_LINEAR | {"overlap": True})),
    ],
    "attacks": [
        _one(f"{robust}, {how}", robust=robust, attack=how, attackers=0 if how == "none" else 2)
        for robust in ("none", "quorum", "agreement")
        for how in ATTACKS
    ],
    "library": [Entry("optimizer.DisTrO", "library")],
}
