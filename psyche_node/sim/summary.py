"""What matters about a run that has ended, in about twenty lines."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.text import Text

from psyche_node import units
from psyche_node.sim.report import chat_command
from psyche_node.sim.result import RunResult
from psyche_node.sim.samples import passes_text
from psyche_node.sim.tasks import task_lines
from psyche_node.sim.traffic import reduction

_FIRST_WARNINGS = 3
_CLEARLY = 0.01
"""Share of the loss by which an earlier model was better, that is told."""


def print_summary(result: RunResult, *, report: str | None = None, console: Console | None = None) -> None:
    """Print what matters about a run in about twenty lines. ``report`` is the path of ``report.html``."""
    console = console or Console(highlight=False)
    console.print()
    mark, style = {"finished": ("✓", "green"), "interrupted": ("■", "yellow"), "failed": ("✗", "red")}[result.outcome]
    title = Text(f"{mark} {result.outcome}", style=f"bold {style}")
    rounds, time = units.counted(result.rounds, "round"), units.seconds_text(result.wall_seconds)
    title.append(f" after {rounds}, {time}", style="not bold default")
    console.print(title)
    for name, text, kind in _summary(result):
        console.print(Text(f"  {name:<15}", style="dim").append(text, style=f"not dim {kind}"), soft_wrap=True)
    model = result.checkpoint or "none is kept: no node had written a checkpoint"
    rows = [("report", report), ("model", model)]
    places = [(name, units.printable(place, 400)) for name, place in rows if place]
    if places:
        console.print()
    for name, place in places:
        console.print(Text(f"  {name:<15}", style="dim").append(place, style="not dim"), soft_wrap=True)
    if result.checkpoint:
        command = units.printable(chat_command(result.checkpoint, result.question), 400)
        console.print(Text(f"  {'talk to it':<15}", style="dim").append(command, style="not dim bold"), soft_wrap=True)


def _summary(result: RunResult) -> list[tuple[str, str, str]]:
    """(name, text, style)"""
    rows: list[tuple[str, str, str]] = []
    heldout, entropy = result.heldout_loss, result.unigram_entropy
    if heldout is None:
        rows.append(("held-out loss", result.heldout_text, "yellow"))
    else:
        below = heldout < entropy
        text = (
            f"{result.heldout_text} ({'below' if below else 'not below'} the entropy of single tokens, {entropy:.3f})"
        )
        rows.append(("held-out loss", text, "" if below else "yellow"))
        if best := _best_before(result, heldout):
            rows.append(("", best, "yellow"))
        if result.baseline is not None and result.baseline.heldout_loss is not None:
            dense = result.baseline.heldout_loss
            rows.append(("AdamW", f"{dense:.3f} on the same tokens in one process: {heldout / dense - 1:+.1%}", ""))
    holders = sum(node.weights_sha256 is not None for node in result.members)
    if result.replicas_identical and result.weights_sha256:
        compared = units.times_of(len(result.checks))
        text = f"{holders} identical, byte for byte; compared {compared} on the way"
        rows += [("replicas", text, "green"), ("", f"SHA-256 {result.weights_sha256}", "")]
    elif result.replicas_identical is None:
        rows.append(("replicas", f"not compared at the end: {result.compared_text}", "yellow"))
    else:
        rows.append(("replicas", "DIFFERENT: the report says which and since when", "bold red"))
    rows += _data(result)
    rows += _tasks(result)
    if sent := _sent(result):
        rows.append(("sent", sent, ""))
    update = f"{units.bytes_text(result.update_bytes)} per node and round, for {units.count_text(result.parameters)}"
    rows.append(("update", f"{update} parameters", ""))
    speed = (
        f"{units.count_text(result.tokens_per_second)} tokens/s, {units.memory_text(result.peak_memory_bytes)} at peak"
    )
    rows.append(("speed", f"{speed}, all processes together", ""))
    if result.busy is not None and result.waited is not None:
        link = result.settings.get("link")
        over = f" over {units.printable(str(link), 60)}" if link else ""
        text = f"{units.seconds_text(result.waited)} a round at the median{over}; busy {result.busy:.0%} of the time"
        rows.append(("waiting", text, ""))
    ledger = result.ledger
    written = units.counted(ledger.transactions, "transaction")
    rows.append(("on chain", f"{written}, {units.sol_text(ledger.lamports)} in fees", ""))
    rows.append(("run", units.printable(ledger.run_address, 60), ""))
    gone = [
        f"{units.printable(node.name, 30)} {node.exit}" for node in result.nodes if node.exit in ("killed", "failed")
    ]
    if gone:
        rows.append(("nodes", ", ".join(gone[:6]) + (f" and {len(gone) - 6} more" if len(gone) > 6 else ""), "yellow"))
    if result.void_rounds:
        rows.append(("void rounds", f"{len(result.void_rounds)}, their data requeued", "yellow"))
    return rows + _warnings(result)


def _sent(result: RunResult) -> str:
    """What was sent, beside dense all-reduces."""
    factor = reduction(result)
    text = f"{units.bytes_text(result.bytes_sent_total)} by all nodes"
    if result.outcome != "finished":
        return f"{text}, as far as counted" + (
            "" if factor is None else f"; updates {units.times_text(factor)} less than dense"
        )
    if factor is None:
        return ""
    dense = units.bytes_text(result.dense_bytes_total)
    return f"{text}; dense all-reduces: {dense} ({units.times_text(factor)} as much)"


def _best_before(result: RunResult, last: float) -> str:
    """Where the held-out loss was clearly lower than at the end; empty if it was not."""
    measured = [(point.loss, point.round) for point in result.heldout_curve if point.loss is not None]
    loss, number = min(measured, default=(last, 0))
    if loss >= (1 - _CLEARLY) * last:
        return ""
    again = "; the data was seen too often" if passes_text(result.passes) else ""
    return f"best {loss:.3f} after {f'round {number:,}' if number else 'no round at all'}{again}"


def _tasks(result: RunResult) -> list[tuple[str, str, str]]:
    """The newest figures of each task; that there are none, where some were asked for."""
    if not result.evaluations:
        unseen = bool(result.settings.get("tasks"))
        return [("tasks", "none was evaluated: the node had no time to spare, or no round was left", "yellow")] * unseen
    newest = result.evaluations[-1]
    when = f"after {units.counted(newest.round, 'round')}, by {units.printable(newest.node, 30)}"
    return [("tasks", when, ""), *(("", line, "") for line in task_lines(newest))]


def _data(result: RunResult) -> list[tuple[str, str, str]]:
    """What became of the samples."""
    if result.data is None:
        return []
    rows = [("data", result.data.taken_text(), "")]
    if dropped := result.data.dropped_text():
        rows.append(("", dropped, "yellow" if result.data.alarming else ""))
    if passes := passes_text(result.passes):
        rows.append(("", passes, ""))
    return rows


def _warnings(result: RunResult) -> list[tuple[str, str, str]]:
    """How many, of whom, and the first different ones."""
    loud = [event for event in result.events if event.level != "info"]
    if not loud:
        return []
    counts = Counter(units.printable(event.node or "the simulation", 30) for event in loud)
    of = ", ".join(f"{count} of {name}" for name, count in counts.most_common(6))
    more = f" and {len(counts) - 6} more" if len(counts) > 6 else ""
    rows = [("warnings", f"{len(loud)}: {of}{more}; all are in the report, and in the logs of the nodes", "yellow")]
    first = list(dict.fromkeys((event.node or "", event.message) for event in loud))[:_FIRST_WARNINGS]
    for name, message in first:
        said = units.printable(message, 160)
        rows.append(("", f"{units.printable(name, 30)}: {said}" if name else said, "yellow"))
    return rows
