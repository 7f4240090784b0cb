"""What the figures say: a table, and the criteria."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.length_control.experiment import Figures
from psyche_node.evaluation import Measure

LEAST_KNOWN, LEAST_OVERLONG = 0.8, 0.25
FALL, LOSS, BY_ITSELF = 0.9, 0.04, 0.5


@dataclass(frozen=True, slots=True)
class Criterion:
    text: str
    met: bool


def criteria(figures: Figures) -> list[Criterion]:
    """The floors under stage 1, without which the rest would mean nothing, and what stage 2 has to do."""
    before, after = (figures.value(model, "overlong") for model in ("stage-1", "stage-2"))
    exact, forced = figures.value("stage-2", "exact_match"), figures.closed_by_force.value
    plain = figures.value("stage-1", "exact_match")
    fall = {name: 1 - figures.value(name, "overlong") / before if before else 0.0 for name in figures.models}
    others = max(fall["continued"], fall["unmasked"])
    return [
        Criterion(
            f"stage 1, ended by force, answers {forced:.1%} right (floor: {LEAST_KNOWN:.0%})", forced >= LEAST_KNOWN
        ),
        Criterion(f"stage 1 is overlong in {before:.1%} (floor: {LEAST_OVERLONG:.0%})", before >= LEAST_OVERLONG),
        Criterion(
            f"overlong falls by {fall['stage-2']:.1%}, to {after:.1%} (at least {FALL:.0%})", fall["stage-2"] >= FALL
        ),
        Criterion(
            f"exact match is {100 * (exact - forced):+.1f} points from stage 1's ended by force (at least "
            f"{-100 * LOSS:.0f}), and {100 * (exact - plain):+.1f} from stage 1's as it is",
            exact - forced >= -LOSS,
        ),
        Criterion(
            f"of the baselines overlong falls by {others:.1%} at most (allowed: {BY_ITSELF:.0%})", others <= BY_ITSELF
        ),
    ]


def table(figures: Figures) -> str:
    """A row per model, in Markdown."""
    lines = ["| model | exact match | overlong | tokens |", "|---|---|---|---|"]
    for name, found in figures.models.items():
        exact, overlong = (_percent(found.measures[one]) for one in ("exact_match", "overlong"))
        lines.append(f"| {name} | {exact} | {overlong} | {found.measures['tokens'].value:.1f} |")
    lines.insert(3, f"| stage-1, ended by force at {figures.budget} | {_percent(figures.closed_by_force)} | | |")
    asked = next(iter(figures.models.values())).samples
    return f"{asked} held-out questions, {figures.room} tokens; ± one standard error\n\n" + "\n".join(lines)


def _percent(measure: Measure) -> str:
    return f"{100 * measure.value:.1f} ± {100 * (measure.stderr or 0.0):.1f}%"
