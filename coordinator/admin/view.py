"""`run watch` on a terminal: a `Watched` as one screen that fits its width and height."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coordinator.admin.watched import Watched
from coordinator.funds import sol
from coordinator.printable import printable
from coordinator.run_report import PHASE_STYLES, STATUS_STYLES, active_words, void_words
from coordinator.state import Member, MemberStatus, Phase, Request, Round

_WIDE: Final = 110
_NARROW: Final = 80
_STALE_SECONDS: Final = 5.0
_MOST_COLUMNS: Final = 32
# Lines of each part, to share out a screen's height.
_STATE_LINES: Final = 10
_CHAIN_LINES: Final = 10
_FRAME_LINES: Final = 3
_COMPACT_LINES: Final = 3
_LEAST_MEMBERS: Final = 4
_LEAST_ROUNDS: Final = 2
_MOST_ROUNDS: Final = 8


def screen(watched: Watched, width: int, height: int) -> RenderableType:
    """The whole screen: side by side where it is wide, in three lines where it is low."""
    wide = width >= _WIDE
    chain_lines = _CHAIN_LINES + max(len(watched.endpoints) - 1, 0) + (2 if _rewarded(watched) else 0)
    top_lines = max(_STATE_LINES, chain_lines) if wide else _STATE_LINES + chain_lines
    if height - top_lines - 2 * _FRAME_LINES - 1 < _LEAST_MEMBERS + _LEAST_ROUNDS:
        rounds, members = _shared(height - _COMPACT_LINES - 3, watched)
        return Group(_compact(watched), _members(watched, width, members), _inclusion(watched, width, rounds))
    rounds, members = _shared(height - top_lines - 2 * _FRAME_LINES - 1, watched)
    parts = [_panel(_members(watched, width, members), "members"), _panel(_inclusion(watched, width, rounds), _ROUNDS)]
    if not wide:
        return Group(_state(watched), _chain(watched), *parts, _footer(watched))
    top = Table.grid(expand=True)
    top.add_column(ratio=3)
    top.add_column(ratio=2)
    top.add_row(_state(watched), _chain(watched))
    return Group(top, *parts, _footer(watched))


_ROUNDS: Final = "last rounds: whose update counts"


def _shared(lines: int, watched: Watched) -> tuple[int, int]:
    """Rows of rounds and of members in so many lines: a third for rounds, and what members leave over."""
    members = len(watched.now.members) + 1
    kept = max(len(watched.now.run.inclusion), _LEAST_ROUNDS)
    rounds = min(max(lines // 3, lines - members, _LEAST_ROUNDS), _MOST_ROUNDS, kept)
    return rounds, max(lines - rounds - 1, 1)


def _panel(inside: RenderableType, title: str) -> Panel:
    return Panel(inside, title=f" {title} ", title_align="left", padding=(0, 0))


def _compact(watched: Watched) -> RenderableType:
    run, header = watched.now.run, watched.now.header
    first = Text(f"{printable(run.run_id)} ", style="bold")
    first.append_text(_phase(watched)).append("  next step ", style="dim").append_text(_left(watched))
    second = Text.from_markup(
        f"round {run.round:,} of {run.limits.total_rounds:,} [dim]({_progress(watched)})[/dim]  "
        f"{active_words(run, header)}  {run.tokens:,} tokens  [dim]{watched.waits_for}[/dim]"
    )
    healthy = sum(one.healthy for one in watched.endpoints)
    worst = "green" if healthy == len(watched.endpoints) else "yellow" if healthy else "red"
    third = Text.from_markup(
        f"[{worst}]{healthy} of {len(watched.endpoints)} endpoints[/{worst}]  [dim]slot {int(watched.slot):,}  "
        f"~{sol(watched.costs.fees_left)} SOL of fees to go[/dim]"
    )
    third.append_text(_footer(watched))
    for line in (first, second, third):
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(first, second, third)


def _phase(watched: Watched) -> Text:
    run = watched.now.run
    phase = Text(run.phase.name, style=PHASE_STYLES.get(run.phase, "bold"))
    phase.append(f"  for {_time(watched.in_phase)}", style="dim")
    if run.request is not Request.NONE:
        phase.append(f"  {run.request.name.lower()} requested", style="yellow")
    return phase


def _progress(watched: Watched) -> str:
    ends = watched.seconds_to_end
    going = bool(ends) and watched.now.run.phase is not Phase.FINISHED
    return f"{100 * watched.share_done:.1f}%" + (f", {_time(ends or 0)} to go" if going else "")


def _rewarded(watched: Watched) -> bool:
    return bool(watched.now.run.reward_rate or watched.now.reward_owed)


# ---------------------------------------------------------------------- the run


def _state(watched: Watched) -> RenderableType:
    run, header = watched.now.run, watched.now.header
    grid = _grid()
    grid.add_row("state", _phase(watched))
    grid.add_row("waits for", Text(watched.waits_for))
    grid.add_row("next step", _left(watched))
    grid.add_row("round", f"{run.round:,} of {run.limits.total_rounds:,}  [dim]epoch {run.epoch:,}[/dim]")
    bar = Table.grid(expand=True, padding=(0, 1, 0, 0))
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    bar.add_row(ProgressBar(total=100, completed=100 * watched.share_done), _progress(watched))
    grid.add_row("progress", bar)
    if void := void_words(run):
        grid.add_row("", Text(void, style="yellow"))
    pace = watched.tokens_per_second
    speed = f"  [dim]{pace:,.0f} per second[/dim]" if pace else ""
    grid.add_row("tokens", f"{run.tokens:,}{speed}")
    members = f"{header.members:,} of {run.limits.max_members:,}, {active_words(run, header)}"
    few = header.active < run.limits.min_members and run.phase not in (Phase.WAITING_FOR_MEMBERS, Phase.WARMUP)
    style = "yellow" if few else "dim"
    grid.add_row("members", f"{members}  [{style}]at least {run.limits.min_members:,}[/{style}]")
    grid.add_row("checkpoint", f"before round {run.checkpoint_round:,}  [dim]{run.checkpoint_root.hex()[:16]}…[/dim]")
    title = Text(f" {printable(run.run_id)} ", style="bold")
    return Panel(grid, title=title, title_align="left", padding=(0, 1))


def _left(watched: Watched) -> Text:
    if watched.now.run.phase in (Phase.FINISHED, Phase.PAUSED):
        return Text("none", style="dim")
    if watched.left is None:
        return Text("when enough members have done their part", style="dim")
    if watched.left == 0:
        return Text("due", style="bold yellow")
    return Text(f"in {_time(watched.left)} at the latest")


# ---------------------------------------------------------------------- chain and cost


def _chain(watched: Watched) -> RenderableType:
    grid = _grid()
    for number, one in enumerate(watched.endpoints):
        grid.add_row("endpoint" if number == 0 else "", Text.from_markup(one.brief(), overflow="ellipsis"))
    if not watched.endpoints:
        grid.add_row("endpoint", "[dim]asking…[/dim]")
    changes = "[green]pushed[/green]" if watched.pushes else "[yellow]polled: no WebSocket[/yellow]"
    grid.add_row("changes", changes)
    grid.add_row("slot", f"{int(watched.slot):,}  [dim]{1000 * watched.slot_seconds:.0f} ms each[/dim]")
    costs = watched.costs
    grid.add_row("deposit", f"{sol(costs.deposit)} SOL")
    grid.add_row("fees", f"~{sol(costs.fees_per_round)} SOL per round")
    grid.add_row("", f"[dim]~{sol(costs.fees_left)} SOL to go[/dim]")
    if _rewarded(watched):
        short = costs.rewards_owed > costs.rewards_funded
        style = "red" if short else "dim"
        grid.add_row(
            "rewards", f"{sol(costs.rewards_owed)} SOL owed  [{style}]{sol(costs.rewards_funded)} there[/{style}]"
        )
        grid.add_row("", f"[dim]~{sol(costs.rewards_left)} SOL to go[/dim]")
    return Panel(grid, title=" chain ", title_align="left", padding=(0, 1))


# ---------------------------------------------------------------------- members


def _members(watched: Watched, width: int, rows: int) -> RenderableType:
    members = sorted(watched.now.members, key=lambda one: (not one.live, one.slot))
    total = sum(one.share for one in members if one.status is MemberStatus.ACTIVE)
    table = Table(box=None, expand=True, header_style="dim", padding=(0, 1))
    table.add_column("#", justify="right")
    table.add_column("wallet", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("status")
    table.add_column("this round", no_wrap=True)
    table.add_column("share", justify="right")
    if width >= _NARROW:
        table.add_column("updates", justify="right")
    table.add_column("missed", justify="right")
    table.add_column("credit", justify="right")
    rewarded = watched.now.run.reward_rate > 0 and width >= _WIDE
    if rewarded:
        table.add_column("reward", justify="right")
    shown = members if len(members) <= rows else members[: max(rows - 1, 1)]
    for one in shown:
        share = f"{100 * one.share / total:.1f}%" if total and one.status is MemberStatus.ACTIVE else "·"
        cells = [str(one.slot), str(one.wallet), _status(one), _part(watched, one), share]
        if width >= _NARROW:
            cells.append(f"{one.updates_included:,}")
        cells += [f"[yellow]{one.missed:,}[/yellow]" if one.missed else "0", f"{one.credit:,}"]
        if rewarded:
            cells.append(f"{sol(one.reward)}")
        table.add_row(*cells, style="" if one.live else "dim")
    if not members:
        return Text("nobody has joined yet", style="dim")
    if len(members) == len(shown):
        return table
    return Group(table, Text(f"… {len(members) - len(shown):,} more: run show --all", style="dim"))


def _status(one: Member) -> str:
    style = STATUS_STYLES.get(one.status, "")
    ready = " [dim]ready[/dim]" if one.ready else ""
    return f"[{style}]{one.status.name}[/{style}]{ready}"


def _part(watched: Watched, one: Member) -> str:
    """What a member has done in the round in flight."""
    entry = watched.current
    if entry is None or watched.now.run.phase not in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS):
        return "[dim]·[/dim]"
    if one.slot in entry.commitments:
        seconds = (entry.commitments[one.slot].slot - entry.start_slot) * watched.slot_seconds
        attested = " [dim]attested[/dim]" if one.slot in entry.attestations else ""
        return f"[green]✓[/green] committed in {_time(seconds)}{attested}"
    if one.slot in entry.expected:
        return "[red]✗ missed[/red]" if entry.closed else "[cyan]training[/cyan]"
    return "[dim]no data[/dim]" if one.slot in entry.active else "[dim]·[/dim]"


# ---------------------------------------------------------------------- inclusion sets


def _inclusion(watched: Watched, width: int, most: int) -> RenderableType:
    kept = watched.now.run.inclusion[-most:]
    if not kept:
        return Text("no round is final yet", style="dim")
    slots = sorted({member.slot for member in watched.now.members} | {slot for one in kept for slot in one.members})
    table = Table(box=None, header_style="dim", padding=(0, 1))
    table.add_column("round", justify="right")
    table.add_column("included", justify="right")
    if width >= _NARROW:
        table.add_column("tokens", justify="right")
    matrix = len(slots) <= min(_MOST_COLUMNS, (width - 40) // 3)
    if matrix:
        for slot in slots:
            table.add_column(str(slot), justify="center", no_wrap=True, width=max(len(str(slot)), 1))
    for one in reversed(kept):
        entry = watched.seen.get(one.round)
        counted = "[yellow]void[/yellow]" if one.void else f"{len(one.members):,}"
        if entry is not None:
            counted += f" [dim]of {len(entry.active):,}[/dim]"
        cells = [f"{one.round:,}", counted]
        if width >= _NARROW:
            tokens = None if entry is None else sum(entry.commitments[slot].tokens for slot in entry.included)
            cells.append("[dim]·[/dim]" if tokens is None else f"{tokens:,}")
        if matrix:
            cells += [_mark(slot, slot in one.members, entry) for slot in slots]
        table.add_row(*cells)
    return table


def _mark(slot: int, included: bool, entry: Round | None) -> str:
    if included:
        return "[green]✓[/green]"
    took_part = entry is None or slot in entry.active
    return ("[dim]·[/dim]" if entry is None else "[red]✗[/red]") if took_part else " "


# ---------------------------------------------------------------------- the rest


def _footer(watched: Watched) -> Text:
    if watched.silent > _STALE_SECONDS:
        return Text(f"  no news from the chain for {_time(watched.silent)}; trying again", style="bold red")
    return Text("  Ctrl-C leaves; the run goes on", style="dim")


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(style="dim", no_wrap=True, width=10)
    # One line each, so that the height is known.
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    return grid


def _time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    whole = timedelta(seconds=round(seconds))
    return str(whole)
