"""Write ``report.json`` and ``report.html`` of a run: the page is one file, makes no request and trusts no text."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from psyche_node import units
from psyche_node.sim import charts
from psyche_node.sim.cards import cards
from psyche_node.sim.result import Event, NodeResult, RunResult
from psyche_node.sim.samples import passes_text
from psyche_node.sim.tasks import tasks_view

_SHOWN_EVENTS = 250
_WIDTH = 1080
_DIGITS = re.compile(r"[0-9a-f]{16,}|[0-9]+")
_STATES = {
    "included": "included",
    "committed": "committed, not included",
    "trained": "trained, not on chain",
    "missed": "missed",
    "void": "round void",
}
_BADGES = {"finished": "good", "killed": "bad", "failed": "bad", "stopped": "calm", "interrupted": "warn"}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def write_report(result: RunResult, folder: Path) -> tuple[Path, Path]:
    """Write both files into ``folder`` and return their paths. A reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    return (
        _write(folder / "report.json", result.model_dump_json(indent=1) + "\n"),
        _write(folder / "report.html", render_html(result)),
    )


def _write(path: Path, text: str) -> Path:
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return path


def render_html(result: RunResult) -> str:
    """Return the page. Text from nodes and the chain is escaped by the template and by the charts' canvas."""
    folder = files("psyche_node.sim")
    script, style = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(folder.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.render(script=Markup(script), style=Markup(style), script_digest=digest, **_view(result))


def headline(result: RunResult) -> str:
    """Return the run in two sentences."""
    honest = [node for node in result.nodes if node.fault is None]
    members = [node for node in honest if node.slot is not None] or honest  # none has joined: it is they who failed
    what = f"{_number(len(members)).capitalize()} node{'s' * (len(members) != 1)}"
    were = "was" if len(members) == 1 else "were"
    verb = {"finished": "trained", "interrupted": f"{were} stopped while training", "failed": "failed while training"}
    model, took = (
        f"a model of {units.count_text(result.parameters)} parameters",
        units.seconds_text(result.wall_seconds),
    )
    if result.rounds or result.outcome == "finished":
        text = f"{what} {verb[result.outcome]} {model} for {units.counted(result.rounds, 'round')} in {took}."
    else:
        text = f"{what} {verb[result.outcome].removesuffix('while training')}before training {model}, after {took}."
    killed = [node for node in members if node.exit == "killed"]
    left = len(members) - len(killed)
    if killed:
        names = ", ".join(units.printable(node.name, 24) for node in killed)
        text += (
            f" {names} {'was' if len(killed) == 1 else 'were'} killed on the way; the other {_number(left)} went on."
        )
    faulty = [node for node in result.nodes if node.fault is not None]
    if faulty:
        text += " " + ", ".join(f"{units.printable(node.name, 24)} misbehaved ({node.fault})" for node in faulty) + "."
    compared = {
        True: "All replicas ended byte-identical.",
        False: "The replicas differ.",
        None: f"The replicas were not compared at the end: {result.compared_text}." if result.rounds else "",
    }
    return f"{text} {compared[result.replicas_identical]}".rstrip()


def _number(count: int) -> str:
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


def _view(result: RunResult) -> dict[str, Any]:
    """Everything the template prints, as text; the template makes no decision but what to leave out."""
    rows = _rows(result)
    drawn = {
        "loss": _loss_chart(result),
        "bytes": _bytes_chart(result),
        "waiting": _waiting_chart(result),
        "grid": _grid_chart(result, rows),
        "lanes": _lanes_chart(result, rows),
    }
    counts = {state: sum(value == state for row in rows for value in row.states.values()) for state in _STATES}
    events = _events(result)
    chat = None if result.checkpoint is None else chat_command(result.checkpoint, result.question)
    return {
        "result": result,
        "headline": headline(result),
        "cards": cards(result),
        "charts": {name: chart.svg if chart else None for name, chart in drawn.items()},
        "data": _script_json({name: chart.data for name, chart in drawn.items() if chart}),
        "names": [units.printable(row.name, 24) for row in rows],
        "row_heights": {"grid": _row_height(rows, 22, 16), "lanes": _row_height(rows, 34, 26)},
        "legend": [(state, text, counts[state]) for state, text in _STATES.items() if counts[state]],
        "deaths": any(row.ended for row in rows),
        "nodes": [_node_row(result, node) for node in result.nodes],
        "checks": [
            {"round": f"{check.round:,}", "identical": check.identical,
             "digest": units.short(next(iter(check.weights_sha256.values()), "no hash")),
             "title": "\n".join(f"{name}: {digest}" for name, digest in check.weights_sha256.items())}
            for check in result.checks
        ],
        "ledger": _ledger_rows(result),
        "skipped": [units.printable(line, 300) for line in result.data.skipped] if result.data else [],
        "passes": passes_text(result.passes),
        "tasks": tasks_view(result),
        "instructions": sorted(result.ledger.instructions.items(), key=lambda item: -item[1]),
        "events": events,
        "events_left_out": len(result.events) - sum(event["times"] for event in events),
        "run_id": units.printable(result.run_id, 64), "started_at": _when(result.started_at),
        "checkpoint": None if result.checkpoint is None else units.printable(result.checkpoint, 400),
        "settings": [(name, _setting(value)) for name, value in result.settings.items()],
        "chat": None if chat is None else units.printable(chat, 500),
        "wall": units.seconds_text(result.wall_seconds),
    }  # fmt: skip


def _when(iso: str) -> str:
    try:
        return f"{datetime.fromisoformat(iso).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return units.printable(iso, 40)


def _setting(value: str | int | float | bool | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value in (None, "") else units.printable(str(value), 200)


def chat_command(checkpoint: str, question: str | None) -> str:
    """Return the shell command that talks to the trained model, with a question to begin with if there is one."""
    words = ["psyche-sim", "chat", checkpoint]
    if question:
        words += ["--", question] if question.startswith("-") else [question]
    return shlex.join(words)


def _script_json(data: object) -> Markup:
    """JSON that cannot end the script element it is put into, whatever the strings in it say."""
    text = json.dumps(data, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _events(result: RunResult) -> list[dict[str, Any]]:
    """The events to show: those that say the same up to numbers are one line, and what went wrong goes first if not all
    fit."""
    groups: dict[tuple[str, str | None, str], list[Event]] = {}
    for event in result.events:
        groups.setdefault((event.level, event.node, _DIGITS.sub("#", event.message)), []).append(event)
    kept = sorted(groups.values(), key=lambda group: group[0].level == "info")[:_SHOWN_EVENTS]
    return [
        {
            "time": units.clock_text(group[0].time),
            "level": group[0].level,
            "node": units.printable(group[0].node or "", 40),
            "round": "" if group[0].round is None else f"{group[0].round:,}",
            "message": units.printable(group[0].message),
            "times": len(group),
            "until": units.clock_text(group[-1].time),
        }
        for group in sorted(kept, key=lambda group: group[0].time)
    ]


# The charts.


def _loss_chart(result: RunResult) -> charts.Chart | None:
    train = [(float(index + 1), loss) for index, loss in enumerate(result.loss) if loss is not None]
    heldout = [(float(point.round), point.loss) for point in result.heldout_curve if point.loss is not None]
    if not train and not heldout:
        return None
    span = [(0.0, result.unigram_entropy), (float(max(result.rounds, 1)), result.unigram_entropy)]
    series = [charts.Series("single tokens", "entropy", span, hover=False)]
    series.append(charts.Series("", "train-raw", train, named=False))
    series.append(charts.Series("training", "train", charts.smooth(train, result.rounds), hover=False))
    if result.baseline is not None:
        curve = [(float(point.round), point.loss) for point in result.baseline.heldout_curve if point.loss is not None]
        series.append(charts.Series("AdamW held-out", "baseline", curve, marked=True))
    series.append(charts.Series("held-out", "heldout", heldout, marked=True))
    chart = charts.line_chart(
        series, rounds=result.rounds, frame=charts.Frame(690, 350), name="loss", label="Loss over the rounds",
        y_text=lambda value: f"{value:g}", value_text=lambda value: f"{value:.3f}",
    )  # fmt: skip
    for entry in chart.data["series"]:
        entry["label"] = entry["label"] or "training"
    return chart


def _bytes_chart(result: RunResult) -> charts.Chart | None:
    sent: dict[str, list[charts.Point]] = {}
    middle: list[charts.Point] = []
    for record in result.timeline:
        values = [float(member.bytes_sent) for member in record.members if member.bytes_sent > 0]
        for member in record.members:
            if member.bytes_sent > 0:
                sent.setdefault(member.node, []).append((float(record.round), float(member.bytes_sent)))
        if values:
            middle.append((float(record.round), median(values)))
    last = float(max(result.rounds - 1, 1))
    series = []
    if result.dense_bytes:
        dense = float(result.dense_bytes)
        series.append(charts.Series("fp32 all-reduce", "dense", [(0.0, dense), (last, dense)]))
    series += [charts.Series(name, "each", points, named=False, hover=False) for name, points in sent.items()]
    series.append(charts.Series("sent by a node", "heldout", middle))
    if result.update_bytes:
        size = float(result.update_bytes)
        series.append(charts.Series("one update", "entropy", [(0.0, size), (last, size)]))
    if not any(one.points for one in series):
        return None
    return charts.line_chart(
        series, rounds=max(result.rounds - 1, 1), frame=charts.Frame(500, 350, left=58, right=138), name="bytes",
        label="Bytes sent per round and node", y_text=_tick_bytes, value_text=units.bytes_text, log=True,
    )  # fmt: skip


def _waiting_chart(result: RunResult) -> charts.Chart | None:
    waited: dict[str, list[charts.Point]] = {}
    trained: list[charts.Point] = []
    middle: list[charts.Point] = []
    for record in result.timeline:
        number = float(record.round)
        times = [m.train_end - m.train_start for m in record.members if m.train_start is not None and m.train_end]
        for member in record.members:
            if member.went_on:
                waited.setdefault(member.node, []).append((number, member.wait_seconds))
        if times:
            trained.append((number, median(times)))
        if record.waited is not None:
            middle.append((number, record.waited))
    if not middle:
        return None
    series = [charts.Series(name, "each", points, named=False, hover=False) for name, points in waited.items()]
    series += [charts.Series("training", "train", trained), charts.Series("waiting", "heldout", middle)]
    return charts.line_chart(
        series, rounds=max(result.rounds - 1, 1), frame=charts.Frame(_WIDTH, 220, left=58, right=118), name="waiting",
        label="Seconds per round", y_text=lambda value: f"{value:g} s", value_text=units.seconds_text,
    )  # fmt: skip


def _tick_bytes(count: float) -> str:
    return units.bytes_text(count).replace(".00 ", " ").replace(".0 ", " ")


def _row_height(rows: Sequence[charts.Row], roomy: int, dense: int) -> int:
    return roomy if len(rows) <= 8 else dense


def _grid_chart(result: RunResult, rows: Sequence[charts.Row]) -> charts.Chart | None:
    if not result.timeline or not rows:
        return None
    return charts.state_grid(rows, rounds=result.rounds, width=_WIDTH, row_height=_row_height(rows, 22, 16))


def _lanes_chart(result: RunResult, rows: Sequence[charts.Row]) -> charts.Chart | None:
    bounds = [(record.round, record.start, record.end, record.void) for record in result.timeline]
    if not bounds or not rows:
        return None
    return charts.lanes(rows, bounds, width=_WIDTH, row_height=_row_height(rows, 34, 26))


def _rows(result: RunResult) -> list[charts.Row]:
    """The members' rows, in the nodes' order."""
    rows = []
    for node in result.members:
        states: dict[int, str] = {}
        training, waiting, marks = [], [], []
        for record in result.timeline:
            for member in record.members:
                if member.node != node.name:
                    continue
                states[record.round] = member.state
                at = (record.start + record.end) / 2
                if member.train_start is not None and member.train_end is not None:
                    training.append((member.train_start, member.train_end))
                    arrived = member.train_end + member.wait_seconds
                    waiting.append((member.train_end, arrived))
                    training.append((arrived, arrived + member.apply_seconds))
                    at = (member.train_start + member.train_end) / 2
                marks.append((at, member.state))
        ended = None
        if node.ended_at is not None and node.exit in ("killed", "failed"):
            started = [record.round for record in result.timeline if record.start <= node.ended_at]
            ended = (node.ended_at, max(started, default=0))
        rows.append(charts.Row(node.name, states, training, waiting, marks, ended))
    return rows


# The tables.


def _node_row(result: RunResult, node: NodeResult) -> dict[str, Any]:
    total = node.train_seconds + node.wait_seconds
    return {
        "name": units.printable(node.name, 40),
        "badge": _BADGES[node.exit],
        "exit": f"{node.exit} ({node.exit_code})" if node.exit == "failed" and node.exit_code else node.exit,
        "fault": node.fault,
        "status": units.printable(node.status, 24),
        "slot": "" if node.slot is None else str(node.slot),
        "wallet": node.wallet, "wallet_short": units.short(node.wallet),
        "node_id": node.node_id, "node_id_short": units.short(node.node_id, 4, 6),
        "device": units.printable(node.device, 60),
        "sha": node.weights_sha256, "sha_short": units.short(node.weights_sha256, 8, 4) if node.weights_sha256 else "",
        "odd": node.weights_sha256 is not None and not result.replicas_identical,
        "fingerprint": node.fingerprint or "",
        "sent": units.bytes_text(node.bytes_sent), "received": units.bytes_text(node.bytes_received),
        "train": units.seconds_text(node.train_seconds), "wait": units.seconds_text(node.wait_seconds),
        "busy": round(100 * node.train_seconds / total) if total else None,
        "included": f"{node.updates_included:,}", "credit": units.count_text(node.credit),
    }  # fmt: skip


def _ledger_rows(result: RunResult) -> list[tuple[str, str, str]]:
    """(name, value, explanation)"""
    ledger = result.ledger
    refused = f"{ledger.failed_transactions:,} of them refused by the program" if ledger.failed_transactions else ""
    rows = [
        ("Program", ledger.program_id, ""),
        ("Run account", ledger.run_address, ""),
        ("Transactions", f"{ledger.transactions:,}", refused),
        ("Fees", units.sol_text(ledger.lamports), f"{ledger.lamports:,} lamports"),
    ]
    if ledger.rent_lamports:
        rows.append(("Deposits", units.sol_text(ledger.rent_lamports), "returned when the accounts are closed"))
    if ledger.slots:
        rows.append(("Slots", f"{ledger.slots:,}", f"of {ledger.slot_ms} ms" if ledger.slot_ms else ""))
    if ledger.rpc:
        rows.append(("RPC", units.printable(ledger.rpc, 120), ""))
    return rows
