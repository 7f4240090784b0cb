"""A run as it goes: a live panel on a terminal, a line per round elsewhere.

The display is fed with snapshots and holds no other state than what it needs for estimates; it never asks anybody.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from psyche_node import units
from psyche_node.sim.result import Level

_STATUS = {
    "training": "bright_blue",
    "waiting": "dim",
    "committed": "cyan",
    "fetching": "cyan",
    "starting": "yellow",
    "joining": "yellow",
    "ready": "green",
    "finished": "green",
    "missed": "yellow",
    "desynced": "magenta",
    "dropped": "red",
    "killed": "red",
    "failed": "red",
}
_LEVEL: dict[Level, str] = {"info": "dim", "warning": "yellow", "error": "red"}
_BLOCKS = "▁▂▃▄▅▆▇█"
_SHOWN_EVENTS = 4
_SHOWN_MEMBERS = 12


@dataclass(frozen=True, slots=True)
class MemberProgress:
    """One node in a snapshot."""

    name: str
    status: str
    """One word: starting, joining, training, waiting, committed, missed, dropped, killed, finished, failed..."""
    fault: str | None = None
    """The misbehaviour it was started with."""
    included: int = 0
    """Updates in inclusion sets so far."""
    rounds: int = 0
    """Rounds it took part in so far."""
    loss: float | None = None
    """Of the last round it trained."""
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """A snapshot of the run."""

    stage: str
    """What is going on, in a few words: "starting the ledger", "training", "comparing with AdamW"."""
    round: int = 0
    """The round in flight; equal to ``rounds`` when all are done."""
    rounds: int = 0
    """Rounds of the whole run."""
    phase: str = ""
    """The run's state on chain: RoundTrain, RoundWitness..."""
    loss: float | None = None
    """Training loss of the last complete round."""
    heldout: float | None = None
    """Last held-out loss."""
    heldout_round: int = 0
    """Rounds that were complete when it was measured."""
    entropy: float | None = None
    """Entropy of single tokens, what the held-out loss has to beat."""
    tokens_per_second: float = 0.0
    bytes_sent: int = 0
    """By all nodes so far."""
    bytes_received: int = 0
    reduction: float | None = None
    """How many times fewer bytes a node's update is, sent to every other node, than its part of a dense all-reduce."""
    memory_bytes: int = 0
    """Resident memory of all processes together."""
    members: tuple[MemberProgress, ...] = ()
    ending: bool = False
    """No more is trained, whatever is left of the rounds."""


class Estimate:
    """Time left, from the median of the last rounds' durations: a killed node's slow round does not disturb it.

    The first round counts for nothing: the nodes' start lies before it, and in it whatever is done only once.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, window: int = 12) -> None:
        self._clock = clock
        self._starts: deque[tuple[int, float]] = deque(maxlen=window + 1)

    def see(self, round_number: int) -> None:
        newest = self._starts[-1][0] if self._starts else 0
        if round_number > newest:
            self._starts.append((round_number, self._clock()))

    def seconds_left(self, rounds: int) -> float | None:
        """None until a round after the first was seen to begin and to end."""
        if len(self._starts) < 2:
            return None
        each = median((late - early) / (b - a) for (a, early), (b, late) in pairwise(self._starts))
        number, began = self._starts[-1]
        return max(0.0, (rounds - number) * each - (self._clock() - began))


class ProgressDisplay:
    """Context manager that shows snapshots. On a terminal a live panel, elsewhere one line per round and stage.

    ``console`` decides which: ``console.is_terminal``. The clock is the caller's to replace in tests;
    ``passed`` are the seconds since the run's beginning, so that what is shown is the time that the summary will name.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        title: str = "psyche-sim",
        clock: Callable[[], float] = time.monotonic,
        passed: float = 0.0,
    ) -> None:
        self.console = console or Console(highlight=False)
        self._title, self._clock = title, clock
        self._began = clock() - passed
        self._estimate = Estimate(clock)
        self._losses: deque[float] = deque(maxlen=240)
        self._events: deque[tuple[float, Level, str]] = deque(maxlen=_SHOWN_EVENTS)
        self._now = Progress(stage="starting")
        self._told: tuple[str, int] = ("", -1)
        self._spinner = Spinner("dots", style="bright_blue")
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self.render, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, progress: Progress) -> None:
        """Show a newer snapshot."""
        before, self._now = self._now, progress
        if progress.rounds and progress.phase:
            self._estimate.see(progress.round)
        if progress.loss is not None and (progress.round, progress.loss) != (before.round, before.loss):
            self._losses.append(progress.loss)
        if self._live is None:
            self._tell(progress)

    def log(self, message: str, level: Level = "info") -> None:
        """Show an event: in the panel's last lines, or as a line of its own. The text may be hostile."""
        text = units.printable(message, 1200 if level == "error" else 300)  # an error's end is what to do
        at = self._clock() - self._began
        self._events.append((at, level, text))
        if self._live is None:
            self._print(at, f"{level}: {text}" if level != "info" else text, _LEVEL[level] if level != "info" else "")

    def _print(self, at: float, text: str, style: str = "") -> None:
        self.console.print(Text(f"{units.clock_text(at):>7}  {text}", style=style), soft_wrap=True)

    def _tell(self, progress: Progress) -> None:
        """Print a line when the stage changes and one when a round is complete."""
        stage, round_number = self._told
        at = self._clock() - self._began
        if progress.stage != stage:
            self._print(at, progress.stage)
        if progress.round > max(round_number, 0):
            self._print(at, self._round_line(progress))
        self._told = (progress.stage, max(progress.round, round_number))

    def _round_line(self, progress: Progress) -> str:
        width = len(str(progress.rounds))
        parts = [f"round {progress.round:>{width}}/{progress.rounds}"]
        if progress.loss is not None:
            parts.append(f"loss {progress.loss:.3f}")
        if progress.heldout is not None:
            parts.append(f"held-out {progress.heldout:.3f} (round {progress.heldout_round})")
        parts.append(f"{units.count_text(progress.tokens_per_second)} tok/s")
        parts.append(_traffic(progress))
        alive = sum(member.status not in ("killed", "dropped", "failed") for member in progress.members)
        parts.append(f"{alive} of {len(progress.members)} nodes")
        if (left := self._left(progress)) is not None:
            parts.append(f"{units.clock_text(left)} left")
        return " · ".join(parts)

    def _left(self, now: Progress) -> float | None:
        """Seconds, as far as there are any to tell of."""
        return None if now.ending or now.round >= now.rounds else self._estimate.seconds_left(now.rounds)

    # The live panel.

    def render(self) -> RenderableType:
        """Return the panel for the newest snapshot."""
        now = self._now
        parts: list[RenderableType] = [self._header(now)]
        if now.rounds:
            parts += [self._bar(now), Text(""), self._facts(now)]
        if now.members:
            parts += [Text(""), _member_table(now)]
        if self._events:
            parts += [Text(""), *(self._event_line(*event) for event in self._events)]
        width = min(self.console.width, 112)
        return Panel(Group(*parts), title=f"[bold]{self._title}[/]", title_align="left", border_style="dim",
                     padding=(0, 2), width=width)  # fmt: skip

    def _header(self, now: Progress) -> RenderableType:
        table = Table.grid(expand=True, padding=(0, 1))
        table.add_column(width=1)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column(justify="right", no_wrap=True)
        text = Text(now.stage, style="bold")
        if now.phase:
            text.append(f"  {now.phase}", style="cyan")
        right = Text(units.clock_text(self._clock() - self._began))
        if (left := self._left(now)) is not None:
            right.append(f"  about {units.clock_text(left)} left", style="dim")
        table.add_row(self._spinner, text, right)
        return table

    def _bar(self, now: Progress) -> RenderableType:
        table = Table.grid(expand=True, padding=(0, 1))
        table.add_column(width=1)
        table.add_column(ratio=1)
        table.add_column(justify="right", no_wrap=True)
        bar = ProgressBar(total=now.rounds, completed=min(now.round, now.rounds), complete_style="bright_blue",
                          finished_style="green", style="grey23")  # fmt: skip
        table.add_row("", bar, Text(f"round {min(now.round, now.rounds)} of {now.rounds}"))
        return table

    def _facts(self, now: Progress) -> RenderableType:
        table = Table.grid(padding=(0, 3, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True)
        loss = Text("-" if now.loss is None else f"{now.loss:.3f}", style="bold")
        loss.append(f"   {sparkline(list(self._losses), 40)}", style="bright_blue")
        table.add_row("  training loss", loss)
        heldout = Text("-" if now.heldout is None else f"{now.heldout:.3f}", style="bold")
        if now.heldout is not None:
            heldout.append(f"   after round {now.heldout_round}", style="dim")
        if now.entropy is not None:
            heldout.append(f"   single tokens {now.entropy:.3f}", style="dim")
        table.add_row("  held-out loss", heldout)
        table.add_row("  sent", Text(_traffic(now)))
        speed = f"{units.count_text(now.tokens_per_second)} tokens/s"
        if now.memory_bytes:
            speed += f" · {units.memory_text(now.memory_bytes)} of memory"
        table.add_row("  speed", Text(speed))
        return table

    @staticmethod
    def _event_line(at: float, level: Level, text: str) -> Text:
        return Text(f"  {units.clock_text(at):>5}  {text}", style=_LEVEL[level], no_wrap=True, overflow="ellipsis")


def _traffic(now: Progress) -> str:
    text = f"{units.bytes_text(now.bytes_sent)} up, {units.bytes_text(now.bytes_received)} down"
    if now.reduction is not None:
        text += f" (updates {units.times_text(now.reduction)} less than dense)"
    return text


def _member_table(now: Progress) -> RenderableType:
    table = Table.grid(padding=(0, 3, 0, 0))
    heads = ("  node", "", "included", "loss", "up", "down")
    for head in heads:
        table.add_column(justify="right" if head in heads[2:] else "left", no_wrap=True, max_width=28)
    table.add_row(*(Text(head, style="dim") for head in heads))
    for member in now.members[:_SHOWN_MEMBERS]:
        status = units.printable(member.status, 16)
        label = Text(f"  {units.printable(member.name, 20)}")
        if member.fault is not None:
            label.append(f" {member.fault}", style="yellow")
        table.add_row(
            label,
            Text(f"● {status}", style=_STATUS.get(status, "")),
            Text(f"{member.included}/{member.rounds}"),
            Text("-" if member.loss is None else f"{member.loss:.3f}"),
            Text(units.bytes_text(member.bytes_sent)),
            Text(units.bytes_text(member.bytes_received)),
        )
    if (more := len(now.members) - _SHOWN_MEMBERS) > 0:
        table.add_row(Text(f"  and {more} more", style="dim"))
    return table


def sparkline(values: list[float], width: int) -> str:
    """Return ``values`` as at most ``width`` block characters, the means of equal stretches; "" for fewer than two."""
    if len(values) < 2:
        return ""
    width = min(width, len(values))
    edges = [index * len(values) // width for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BLOCKS[min(7, int((value - low) / span * 8))] for value in means)
