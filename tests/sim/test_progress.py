"""The live display: estimates, lines per round, and no escape sequence of a peer reaches the terminal."""

from __future__ import annotations

import io

from report_data import synthetic_run
from rich.console import Console

from psyche_node import units
from psyche_node.sim.cards import cards
from psyche_node.sim.progress import Estimate, MemberProgress, Progress, ProgressDisplay, sparkline
from psyche_node.sim.result import RunResult
from psyche_node.sim.summary import print_summary


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def display(clock: Clock, *, terminal: bool) -> tuple[ProgressDisplay, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=110, color_system=None, highlight=False)
    return ProgressDisplay(console, clock=clock), stream


def snapshot(round_number: int, rounds: int = 10, **fields: object) -> Progress:
    members = (
        MemberProgress("node-0", "training", included=round_number, rounds=round_number, loss=5.0),
        MemberProgress("node-1\x1b[2J", "killed", fault="tamper"),
    )
    values: dict[str, object] = {
        "stage": "training",
        "phase": "RoundTrain",
        "round": round_number,
        "rounds": rounds,
        "tokens_per_second": 1_455.0,
        "bytes_sent": 1_000 * round_number,
        "bytes_received": 900 * round_number,
        "reduction": 57.0,
        "loss": 6.0 - 0.1 * round_number,
        "members": members,
    }
    return Progress(**(values | fields))  # type: ignore[arg-type]


def test_estimate_is_the_median_round_and_forgives_one_slow_round() -> None:
    clock = Clock()
    estimate = Estimate(clock)
    assert estimate.seconds_left(60) is None
    for number in range(10):
        estimate.see(number)
        estimate.see(number)
        clock.now += 30.0 if number == 5 else 2.0
    assert estimate.seconds_left(60) == 51 * 2.0 - 2.0
    clock.now += 1_000
    assert estimate.seconds_left(60) == 0.0


def test_estimate_counts_rounds_that_were_not_seen() -> None:
    clock = Clock()
    estimate = Estimate(clock)
    estimate.see(1)
    clock.now += 8.0
    estimate.see(5)
    assert estimate.seconds_left(10) == 10.0


def test_estimate_leaves_the_start_and_the_first_round_out() -> None:
    clock = Clock()
    estimate = Estimate(clock)
    for seconds in (14.0, 5.0):  # the nodes start, then the first round
        estimate.see(0)
        clock.now += seconds
    for number in (1, 2, 3):
        estimate.see(number)
        assert estimate.seconds_left(100) == (None if number == 1 else (100 - number) * 1.5)
        clock.now += 1.5


def test_nothing_is_left_to_wait_for_once_it_stops() -> None:
    clock = Clock()
    shown, stream = display(clock, terminal=True)
    for number in range(4):
        shown.update(snapshot(number))
        clock.now += 2.0
    shown.update(snapshot(3, stage="stopping the nodes", ending=True))
    shown.console.print(shown.render())
    assert "stopping the nodes" in stream.getvalue()
    assert "left" not in stream.getvalue()


def test_the_clock_counts_from_the_beginning_of_the_run() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=110, highlight=False)
    ProgressDisplay(console, clock=Clock(), passed=11.0).log("prepared")
    assert stream.getvalue().split()[0] == "0:11"


def test_without_a_terminal_there_is_one_line_per_round_and_stage() -> None:
    clock = Clock()
    shown, stream = display(clock, terminal=False)
    with shown:
        shown.update(Progress(stage="starting the ledger"))
        shown.update(Progress(stage="starting the ledger"))
        for number in range(4):
            shown.update(snapshot(number))
            shown.update(snapshot(number))
            clock.now += 2.0
        shown.log("node-1 was killed\nwith SIGKILL", "warning")
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["starting", "training", "round", "round", "round", "warning:"]
    assert "round  3/10 · loss 5.700" in lines[4]
    assert "updates 57\N{MULTIPLICATION SIGN} less than dense" in lines[4]
    assert "1 of 2 nodes" in lines[4]
    assert "0:14 left" in lines[4]
    assert "\x1b" not in stream.getvalue()


def test_the_panel_shows_the_run_and_nothing_of_a_peers_escapes() -> None:
    clock = Clock()
    shown, stream = display(clock, terminal=True)
    for number in range(4):
        shown.update(snapshot(number, heldout=5.5, heldout_round=2, entropy=5.914, memory_bytes=3 * 2**30))
        clock.now += 2.0
    shown.log("rejected \x1b[31m[bold]x[/bold]", "error")
    shown.console.print(shown.render())
    text = stream.getvalue()
    for expected in (
        "round 3 of 10",
        "RoundTrain",
        "5.700",
        "5.500   after round 2",
        "single tokens 5.914",
        "57\N{MULTIPLICATION SIGN} less",
        "3.00 GiB",
        "● training",
        "● killed",
        "tamper",
        "about 0:12 left",
        "[bold]x[/bold]",
    ):
        assert expected in text, expected
    assert "\x1b" not in text


def test_sparkline() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([1.0], 10) == ""
    assert sparkline([0.0, 1.0], 10) == "▁█"
    assert len(sparkline([float(n) for n in range(100)], 40)) == 40
    assert sparkline([2.0, 2.0, 2.0], 3) == "▁▁▁"


def summary(result: RunResult) -> str:
    stream = io.StringIO()
    print_summary(result, report="out/report.html", console=Console(file=stream, width=40, highlight=False))
    return stream.getvalue()


def test_summary_says_the_essentials() -> None:
    text = summary(synthetic_run())
    assert 12 <= len(text.splitlines()) <= 24
    for expected in (
        "✓ finished after 60 rounds",
        "below the entropy of single tokens",
        "AdamW",
        "identical",
        "node-3 killed",
        "out/report.html",
        "psyche-sim chat runs/2026-03-02/checkpoint 'What does os do?'",
    ):
        assert expected in text, expected
    assert synthetic_run().weights_sha256 in text.split(), "never broken, however narrow"


def test_summary_of_a_stopped_run_compares_updates_and_says_that_no_model_is_kept() -> None:
    raw = synthetic_run().model_dump() | {"outcome": "interrupted", "bytes_sent_total": 10, "checkpoint": None}
    result = RunResult.model_validate(raw)
    members = len(result.members)
    live = units.times_text(result.dense_bytes / ((members - 1) * result.update_bytes))
    lines = {line[2:17].strip(): line[17:] for line in summary(result).splitlines()}
    assert lines["sent"] == f"10 B by all nodes, as far as counted; updates {live} less than dense"
    assert lines["model"] == "none is kept: no node had written a checkpoint"
    assert "talk to it" not in lines
    tile = next(card for card in cards(result) if card["title"] == "Sent, against dense")
    assert (tile["value"], tile["note"]) == (f"{live} less", "updates; 10 B counted")


def test_summary_says_who_warned_how_often_and_of_what() -> None:
    raw = synthetic_run().model_dump()
    said = [
        ("node-1", "error", "out of \x1b[31mmemory"),
        *[("node-0", "warning", "slow")] * 3,
        (None, "warning", "void"),
    ]
    said += [("node-2", "warning", "late"), ("node-2", "info", "well")]
    raw["events"] = [{"time": 1.0, "node": node, "level": level, "message": text} for node, level, text in said]
    text = summary(RunResult.model_validate(raw))
    assert "6: 3 of node-0, 1 of node-1, 1 of the simulation, 1 of node-2; all are in the report" in text
    lines = [line.strip() for line in text.splitlines()]
    at = next(number for number, line in enumerate(lines) if line.startswith("warnings"))
    assert [line.replace("\N{REPLACEMENT CHARACTER}", "") for line in lines[at + 1 : at + 4]] == [
        "node-1: out of [31mmemory",
        "node-0: slow",
        "void",
    ]
    raw["events"] = raw["events"][-1:]
    assert "warnings" not in summary(RunResult.model_validate(raw))


def test_summary_of_different_replicas_is_loud() -> None:
    raw = synthetic_run(texts="\x1b[31m").model_dump()
    raw["nodes"][0]["weights_sha256"] = "0" * 64
    raw |= {"replicas_identical": False, "weights_sha256": None}
    text = summary(RunResult.model_validate(raw))
    assert "DIFFERENT" in text
    assert "\x1b" not in text


def test_summary_says_a_difference_on_the_way_and_what_was_compared_before_a_stop() -> None:
    raw = synthetic_run().model_dump() | {"outcome": "interrupted", "replicas_identical": None, "weights_sha256": None}
    for node in raw["nodes"]:
        node["weights_sha256"] = None
    checks = len(raw["checks"])
    text = summary(RunResult.model_validate(raw))
    assert f"not compared at the end: no node got to the end; identical {checks} times on the way" in text
    text = summary(RunResult.model_validate(raw | {"replicas_identical": False}))
    assert "DIFFERENT" in text, "a check on the way found it"


def test_a_held_out_loss_is_marked_with_the_round_it_is_of() -> None:
    shown, stream = display(Clock(), terminal=False)
    with shown:
        for number in (2, 3):
            shown.update(snapshot(number, heldout=5.5, heldout_round=2))
    assert "round  3/10 · loss 5.700 · held-out 5.500 (round 2)" in stream.getvalue()
