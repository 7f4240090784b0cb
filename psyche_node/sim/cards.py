"""The report's cards: what matters about a run, in six numbers."""

from __future__ import annotations

from statistics import median
from typing import Any

from psyche_node import units
from psyche_node.sim import charts
from psyche_node.sim.result import RunResult
from psyche_node.sim.traffic import reduction


def cards(result: RunResult) -> list[dict[str, Any]]:
    """Return the cards as the template prints them: title, value, note, a gauge or none, and lines."""
    heldout, entropy = result.heldout_loss, result.unigram_entropy
    gap = ""
    marks = [("heldout", heldout)] if heldout is not None else []
    lines = [("entropy", "single tokens", f"{entropy:.3f}")]
    if result.baseline is not None and result.baseline.heldout_loss is not None:
        marks.append(("baseline", result.baseline.heldout_loss))
        lines.insert(0, ("baseline", "AdamW", f"{result.baseline.heldout_loss:.3f}"))
        if heldout is not None:
            gap = f"{heldout / result.baseline.heldout_loss - 1:+.1%} against AdamW".replace("-", "\N{MINUS SIGN}")
    if heldout is not None and not gap:
        gap = f"{1 - heldout / entropy:.0%} below single tokens" if heldout < entropy else "not below single tokens"
    value, _, why = result.heldout_text.partition(": ")
    marks.append(("entropy", entropy))
    reduced = reduction(result)
    whole = result.outcome == "finished"
    sent = units.bytes_text(result.bytes_sent_total)
    durations = [record.end - record.start for record in result.timeline]
    made: list[dict[str, Any]] = [
        {"title": "Held-out loss", "value": value, "note": gap or why,
         "gauge": charts.gauge(marks) if heldout is not None else "", "lines": lines, "kind": ""},
        _replicas(result),
        {"title": "Sent, against dense", "kind": "",
         "value": "unknown" if reduced is None else f"{units.times_text(reduced)} less",
         "note": f"{sent}, not {units.bytes_text(result.dense_bytes_total)}" if whole else f"updates; {sent} counted",
         "lines": [
             ("", "one update", units.bytes_text(result.update_bytes)),
             ("", "dense, fp32", units.bytes_text(result.dense_bytes)),
         ]},
        {"title": "Rounds", "value": f"{result.rounds:,}", "kind": "",
         "note": f"{len(result.void_rounds)} void" if result.void_rounds else "none void",
         "lines": [
             ("", "median round", units.seconds_text(median(durations)) if durations else "unknown"),
             ("", "first update", "unknown" if result.first_round_seconds is None
              else units.seconds_text(result.first_round_seconds)),
         ]},
        {"title": "Speed", "value": units.count_text(result.tokens_per_second), "note": "tokens/s, all nodes",
         "kind": "", "lines": [
             ("", "tokens credited", units.count_text(sum(node.credit for node in result.nodes))),
             ("", "busy", "unknown" if result.busy is None else f"{result.busy:.0%}"),
             ("", "waiting a round", "unknown" if result.waited is None else units.seconds_text(result.waited)),
         ]},
        {"title": "Memory", "value": units.memory_text(result.peak_memory_bytes), "note": "peak, all processes",
         "kind": "", "lines": [
             ("", "largest node", units.memory_text(max((n.peak_memory_bytes for n in result.nodes), default=0))),
             ("", "wall clock", units.seconds_text(result.wall_seconds)),
         ]},
    ]  # fmt: skip
    return [{"gauge": None, **card} for card in made]


def _replicas(result: RunResult) -> dict[str, Any]:
    """Whether the replicas are identical; not called different where nobody got to the end to be compared."""
    holders = sum(node.weights_sha256 is not None for node in result.members)
    value, kind, note, sha = {
        True: ("Identical", "good", f"{units.counted(holders, 'node')}, byte for byte", ""),
        False: ("Different", "bad", "see the nodes below", "differ"),
        None: ("Unknown", "", result.compared_text, "none"),
    }[result.replicas_identical]
    return {
        "title": "Replicas", "value": value, "kind": kind, "note": note,
        "lines": [
            ("", "SHA", units.short(result.weights_sha256, 6, 4) if result.weights_sha256 else sha),
            ("", "compared", units.times_of(len(result.checks))),
        ],
    }  # fmt: skip
