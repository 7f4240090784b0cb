"""A run as an operator reads it: a value with everything that the chain says, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from solders.pubkey import Pubkey

from coordinator.addresses import RunAddresses
from coordinator.base58 import peer_id
from coordinator.printable import printable
from coordinator.run_config import term_values
from coordinator.snapshot import Snapshot
from coordinator.state import UNKNOWN_SLOT, Header, Member, MemberStatus, Phase, Request, Round, Run

_ROWS: Final = 16
PHASE_STYLES: Final = {
    Phase.ROUND_TRAIN: "bold green",
    Phase.ROUND_WITNESS: "bold green",
    Phase.WARMUP: "bold cyan",
    Phase.COOLDOWN: "bold cyan",
    Phase.FINISHED: "bold blue",
    Phase.PAUSED: "bold yellow",
}
STATUS_STYLES: Final = {
    MemberStatus.ACTIVE: "green",
    MemberStatus.PENDING: "cyan",
    MemberStatus.DESYNCED: "yellow",
    MemberStatus.DROPPED: "red",
    MemberStatus.EJECTED: "red",
    MemberStatus.LEFT: "dim",
}


@dataclass(frozen=True, slots=True)
class RunReport:
    """What the chain says of a run."""

    program: Pubkey
    addresses: RunAddresses
    now: Snapshot

    # ------------------------------------------------------------------ JSON

    def to_json(self) -> dict[str, Any]:
        """Everything, with keys and digests as the tools print them: base58 for addresses, hex for the rest."""
        run, header = self.now.run, self.now.header
        return {
            "run_id": run.run_id,
            "address": str(self.addresses.run),
            "members_address": str(self.addresses.members),
            "rounds_address": str(self.addresses.rounds),
            "program": str(self.program),
            "owner": str(run.owner),
            "slot": self.now.slot,
            "state": run.phase.name,
            "state_since_slot": run.phase_slot,
            "due_slot": None if header.due_slot == UNKNOWN_SLOT else header.due_slot,
            "round": run.round,
            "total_rounds": run.limits.total_rounds,
            "final_rounds": run.final_rounds,
            "epoch": run.epoch,
            "cursor": run.cursor,
            "tokens": run.tokens,
            "requeued_positions": header.requeued,
            "checkpoint": {"round": run.checkpoint_round, "root": run.checkpoint_root.hex()},
            "request": run.request.name,
            "config_version": run.config_version,
            "limits": asdict(run.limits),
            "next_limits": None if run.next_limits is None else asdict(run.next_limits),
            "join_authority": None if run.join_authority is None else str(run.join_authority),
            "banned": [str(key) for key in self.now.membership.banned],
            "model_round": run.model_round,
            "terms": term_values(run.terms),
            "members": [self._member(member) for member in self.now.members],
            "rounds": [self._round(entry) for entry in self.now.rounds],
            "inclusion_sets": [
                {"round": kept.round, "members": sorted(kept.members), "void": kept.void} for kept in run.inclusion
            ],
            "credit": {
                "total": self.now.credit,
                "archived": self.now.membership.archived_credit,
                "by_wallet": {str(member.wallet): member.credit for member in self.now.members},
            },
            "rewards": {
                "lamports_per_million_tokens": run.reward_rate,
                "earned": run.reward_earned,
                "paid": run.reward_paid,
                "by_wallet": {str(member.wallet): member.reward for member in self.now.members},
            },
        }

    @staticmethod
    def _member(member: Member) -> dict[str, Any]:
        return {
            "slot": member.slot,
            "wallet": str(member.wallet),
            "node_key": member.node_key.hex(),
            "node_id": peer_id(member.node_key),
            "status": member.status.name,
            "share": member.share,
            "ready": member.ready,
            "joined_round": member.joined_round,
            "missed": member.missed,
            "credit": member.credit,
            "updates_included": member.updates_included,
            "reward": member.reward,
            "reward_claimed": member.reward_claimed,
            "grant": None if member.grant is None else str(member.grant),
        }

    def _round(self, entry: Round) -> dict[str, Any]:
        return {
            "round": entry.round,
            "state": _round_state(entry),
            "start_slot": entry.start_slot,
            "active": sorted(entry.active),
            "witnesses": list(entry.witnesses),
            "ranges": [list(one) for one in entry.ranges],
            "slices": {str(slot): list(one) for slot, one in entry.slices.items()},
            "commitments": [
                {
                    "member": one.member,
                    "digest": one.digest.hex(),
                    "length": one.length,
                    "tokens": one.tokens,
                    "fingerprint": f"{one.fingerprint:016x}",
                    "slot": one.slot,
                }
                for one in entry.commitments.values()
            ],
            "attestations": {str(witness): sorted(members) for witness, members in entry.attestations.items()},
            "included": sorted(entry.included) if entry.final else None,
        }

    # ------------------------------------------------------------------ tables

    def render(self, *, everything: bool = False) -> RenderableType:
        """For a terminal of 100 columns or more. `everything` lists all members and commitments."""
        rows = None if everything else _ROWS
        parts: list[RenderableType] = [self._summary(), self._members_table(rows)]
        if self.now.rounds:
            parts += [self._rounds_table(), self._commitments_table(rows)]
        if self.now.run.inclusion:
            parts.append(self._inclusion_table())
        return Group(*parts)

    def _summary(self) -> RenderableType:
        run, header = self.now.run, self.now.header
        limits, terms = run.limits, run.terms
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        state = Text(run.phase.name, style=PHASE_STYLES.get(run.phase, "bold"))
        state.append(f"  since slot {run.phase_slot:,}", style="dim")
        if run.request is not Request.NONE:
            state.append(f", {run.request.name.lower()} requested", style="yellow")
        if header.due_slot != UNKNOWN_SLOT and run.phase is not Phase.FINISHED:
            wait = header.due_slot - self.now.slot
            state.append(f", next step {f'in {wait:,} slots' if wait > 0 else 'due'}", style="dim")
        grid.add_row("state", state)
        done = f"{run.final_rounds:,} of {limits.total_rounds:,} final"
        void = f"  [yellow]{words}[/yellow]" if (words := void_words(run)) else ""
        grid.add_row("round", f"{run.round:,}  [dim]({done}, epoch {run.epoch:,})[/dim]{void}")
        counts = f"{header.members:,} of {limits.max_members:,}, {active_words(run, header)}"
        grid.add_row("members", f"{counts}  [dim](at least {limits.min_members:,})[/dim]")
        credit = self.now.credit
        balanced = "" if credit == run.tokens else f"  [red]but the run counts {run.tokens:,}[/red]"
        grid.add_row("credit", f"{credit:,} tokens in included updates{balanced}")
        if run.reward_rate or run.reward_earned:
            rewards = f"{run.reward_rate:,} lamports per million tokens"
            grid.add_row("rewards", f"{rewards}  [dim]({run.reward_earned:,} earned, {run.reward_paid:,} paid)[/dim]")
        if run.join_authority is not None:
            grid.add_row("admission", f"by grants of {run.join_authority}")
        if run.next_limits is not None:
            grid.add_row("changes", f"[yellow]{_changes(run)}[/yellow]  [dim](from the next round on)[/dim]")
        if self.now.membership.banned:
            grid.add_row("banned", f"{len(self.now.membership.banned)} keys")
        batch = f"{limits.batch:,} sequences of {terms.sequence_length:,} tokens per round"
        if run.round - run.model_round < terms.ramp_rounds:
            batch += f", growing from {terms.ramp_batch:,} until round {run.model_round + terms.ramp_rounds:,}"
        again = f", {header.requeued:,} to be drawn again" if header.requeued else ""
        grid.add_row("data", f"{batch}  [dim](position {run.cursor:,}, {terms.samples:,} per pass{again})[/dim]")
        grid.add_row("update", f"{terms.update_bytes:,} bytes per member and round")
        if terms.model_source or terms.data_source:
            sources = " · ".join(filter(None, (terms.model_source, terms.data_source)))
            grid.add_row("sources", Text(printable(sources)))
        checkpoint = run.checkpoint_root.hex()
        grid.add_row("checkpoint", f"before round {run.checkpoint_round:,}  [dim]{checkpoint[:32]}…[/dim]")
        grid.add_row("address", str(self.addresses.run))
        grid.add_row("owner", str(run.owner))
        grid.add_row("program", str(self.program))
        title = Text(f" {printable(run.run_id)} ", style="bold")
        subtitle = Text(f" slot {self.now.slot:,} ", style="dim")
        return Panel(grid, title=title, subtitle=subtitle, title_align="left", subtitle_align="right", padding=(1, 2))

    def _members_table(self, rows: int | None) -> RenderableType:
        table = _table("Members")
        for name in ("#", "wallet / node id", "status"):
            table.add_column(name, justify="right" if name == "#" else "left", overflow="fold")
        for name in ("share", "updates", "missed", "credit"):
            table.add_column(name, justify="right")
        shown = self.now.members[:rows]
        # Shares are weights, whatever their unit: what they come to is the part of the batch.
        total = sum(one.share for one in self.now.members if one.status is MemberStatus.ACTIVE)
        for member in shown:
            share = Text(f"{member.share:,}")
            if member.status is MemberStatus.ACTIVE:
                share.append(f"\n{member.share / total:.1%}", style="dim")
            identity = Text(str(member.wallet))
            identity.append(f"\n{peer_id(member.node_key)}", style="dim")
            status = Text(member.status.name, style=STATUS_STYLES.get(member.status, ""))
            if member.ready and self.now.run.phase is Phase.WARMUP:
                status.append("\nready", style="dim")
            table.add_row(
                str(member.slot),
                identity,
                status,
                share,
                f"{member.updates_included:,}",
                f"{member.missed:,}",
                f"{member.credit:,}",
            )
        return _with_rest(table, len(self.now.members) - len(shown), "members")

    def _rounds_table(self) -> RenderableType:
        table = _table("Rounds kept in full")
        for name in ("round", "state", "started", "active", "committed", "attested", "included"):
            table.add_column(name, justify="left" if name in ("state", "included") else "right")
        for entry in self.now.rounds:
            included = _ranges(entry.included) or "nobody: void" if entry.final else "[dim]not final[/dim]"
            table.add_row(
                f"{entry.round:,}",
                _round_state(entry),
                f"{entry.start_slot:,}",
                f"{len(entry.active):,}",
                f"{len(entry.commitments):,}",
                f"{len(entry.attestations):,} of {len(entry.witnesses):,}",
                included,
            )
        return Padding(table, (1, 0, 0, 0))

    def _commitments_table(self, rows: int | None) -> RenderableType:
        table = _table("Commitments")
        for name in ("round", "member", "update digest", "bytes", "tokens", "weights", "slot", "attested"):
            table.add_column(name, justify="left" if name in ("update digest", "weights") else "right", no_wrap=True)
        entries = [(entry, one) for entry in reversed(self.now.rounds) for one in entry.commitments.values()]
        for entry, one in entries[:rows]:
            votes = sum(one.member in held for held in entry.attestations.values())
            mark = " [green]✓[/green]" if entry.final and one.member in entry.included else ""
            mark = mark or (" [red]✗[/red]" if entry.final else "  ")
            table.add_row(
                f"{entry.round:,}",
                str(one.member),
                one.digest.hex()[:16] + "…",
                f"{one.length:,}",
                f"{one.tokens:,}",
                f"{one.fingerprint:016x}",
                f"{one.slot:,}",
                f"{votes} of {len(entry.witnesses)}{mark}",
            )
        hidden = 0 if rows is None else max(len(entries) - rows, 0)
        return _with_rest(table, hidden, "commitments")

    def _inclusion_table(self) -> RenderableType:
        table = _table("Inclusion sets")
        table.add_column("round", justify="right")
        table.add_column("members", justify="right")
        table.add_column("which", overflow="fold")
        for kept in self.now.run.inclusion:
            which = (
                "[yellow]void: nothing applied, positions drawn again[/yellow]" if kept.void else _ranges(kept.members)
            )
            table.add_row(f"{kept.round:,}", f"{len(kept.members):,}", which)
        return Padding(table, (1, 0, 0, 0))


def active_words(run: Run, header: Header) -> str:
    """How many members train, or trained last."""
    return f"{header.active:,} active{' at the end' if run.phase is Phase.FINISHED else ''}"


def void_words(run: Run) -> str:
    """How many of the rounds that are remembered brought the run no further; empty for none."""
    void = sum(kept.void for kept in run.inclusion)
    return f"{void} of the last {len(run.inclusion)} void: nothing was applied in them" if void else ""


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=None, header_style="dim", padding=(0, 2, 0, 0)
    )


def _with_rest(table: Table, hidden: int, what: str) -> RenderableType:
    if hidden <= 0:
        return Padding(table, (1, 0, 0, 0))
    more = Text(f"… {hidden:,} more {what}: --all shows them", style="dim")
    return Padding(Group(table, more), (1, 0, 0, 0))


def _changes(run: Run) -> str:
    before, after = asdict(run.limits), asdict(run.next_limits or run.limits)
    return ", ".join(f"{name} {before[name]:,} → {value:,}" for name, value in after.items() if value != before[name])


def _round_state(entry: Round) -> str:
    return "final" if entry.final else "closed" if entry.closed else "open"


def _ranges(slots: Iterable[int]) -> str:
    """`0-3, 7` for {0, 1, 2, 3, 7}."""
    runs: list[list[int]] = []
    for slot in sorted(slots):
        if runs and slot == runs[-1][1] + 1:
            runs[-1][1] = slot
        else:
            runs.append([slot, slot])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
