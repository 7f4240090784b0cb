"""The report: what it claims follows from the data, it makes no request, and no text in it becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError
from report_data import synthetic_run

from psyche_node import units
from psyche_node.sim import charts
from psyche_node.sim.report import headline, render_html, write_report
from psyche_node.sim.result import (
    Event,
    NodeResult,
    ReplicaCheck,
    RunResult,
    load_result,
    mean_loss,
    replicas,
)
from psyche_node.sim.tasks import tasks_view
from psyche_node.sim.traffic import dense_allreduce_bytes

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}\x1b[31m\u202e"
ISSUE_FIELDS = {
    "rounds",
    "loss",
    "heldout_loss",
    "unigram_entropy",
    "baseline",
    "nodes",
    "ledger",
    "update_bytes",
    "dense_bytes",
    "checkpoint",
    "wall_seconds",
}
NODE_FIELDS = {
    "wallet",
    "node_id",
    "weights_sha256",
    "fingerprint",
    "bytes_sent",
    "bytes_received",
    "train_seconds",
    "wait_seconds",
    "updates_included",
}


UNCOMPARED: dict[str, object] = {"replicas_identical": None, "weights_sha256": None}


class Page(HTMLParser):
    """Collects what a browser would see: the tags with attributes, and the text per kind of element."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open != "style":
            self.text.append(data)


def test_report_json_has_what_the_format_promises(tmp_path: Path) -> None:
    result = synthetic_run()
    json_path, html_path = write_report(result, tmp_path / "out")
    raw = json.loads(json_path.read_text())
    assert raw.keys() >= ISSUE_FIELDS
    assert all(node.keys() >= NODE_FIELDS for node in raw["nodes"])
    assert raw["ledger"].keys() >= {"transactions", "lamports", "program_id"}
    assert isinstance(raw["rounds"], int)
    assert len(raw["loss"]) == raw["rounds"]
    assert load_result(json_path) == result
    assert sorted(path.name for path in html_path.parent.iterdir()) == ["report.html", "report.json"]


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    json_path, _ = write_report(synthetic_run(seed=1), tmp_path)
    before = json_path.read_bytes()

    def no_space(self: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(OSError, match="no space"):
        write_report(synthetic_run(seed=2), tmp_path)
    assert json_path.read_bytes() == before


def test_the_page_makes_no_request() -> None:
    page = Page(render_html(synthetic_run()))
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "audio", "video", "a", "use"}
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            assert name not in {"src", "href", "action", "srcset"}, f"<{tag} {name}={value!r}>"
    style = render_html(synthetic_run()).split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_only_its_own_script_may_run() -> None:
    html = render_html(synthetic_run(texts=HOSTILE))
    page = Page(html)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    data, script = page.scripts
    assert allowed == [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()]
    assert json.loads(data)["grid"]["names"][0] == "node-0" + HOSTILE, "data reaches the script unchanged, as data"


def test_hostile_text_is_shown_as_text() -> None:
    plain = Page(render_html(synthetic_run(tamper=True, tasks=True)))
    hostile_html = render_html(synthetic_run(tamper=True, tasks=True, texts=HOSTILE))
    hostile = Page(hostile_html)

    def shape(page: Page) -> list[str]:
        return [tag for tag, _ in page.tags]

    assert shape(hostile) == shape(plain), "text must not add or remove an element"
    assert "<img src=x" in "".join(hostile.text)
    visible = "".join(hostile.text) + "".join(str(v) for _, a in hostile.tags for k, v in a.items() if k != "title")
    assert "\x1b" not in visible
    assert "\u202e" not in visible
    assert "{{7*7}}" in visible, "no template inside a template"


@pytest.mark.parametrize(
    ("nodes", "rounds", "baseline"), [(1, 1, False), (2, 2, True), (4, 60, True), (16, 400, False), (64, 3, True)]
)
def test_any_size_of_run_renders(nodes: int, rounds: int, baseline: bool) -> None:
    result = synthetic_run(nodes, rounds, baseline=baseline, kill=nodes > 2, void=rounds > 2)
    html = render_html(result)
    assert len(html) < 800_000
    page = Page(html)
    text = "".join(page.text)
    assert ("AdamW beside it" in text) == baseline
    assert not re.search(r"\bnan\b|\binf\b|None|Undefined", text)
    paths = [attributes["d"] or "" for tag, attributes in page.tags if tag == "path"]
    assert paths
    assert all(re.fullmatch(r"[MLHVlmhv0-9 .\-e]+", path) for path in paths)


def test_a_run_that_never_began_renders() -> None:
    result = synthetic_run(2, 2, baseline=False)
    empty = RunResult.model_validate(
        result.model_dump()
        | {
            "rounds": 0,
            "loss": [],
            "heldout_curve": [],
            "heldout_loss": None,
            "timeline": [],
            "nodes": [],
            "events": [],
            "checks": [],
            "replicas_identical": False,
            "weights_sha256": None,
            "checkpoint": None,
            "outcome": "failed",
            "bytes_sent_total": 0,
            "dense_bytes": 0,
            "update_bytes": 0,
            "settings": {},
        }
    )
    text = "".join(Page(render_html(empty)).text)
    assert "No round was trained" in text
    assert "No loss was recorded" in text
    assert "before a checkpoint was written" in text


def test_the_page_shows_the_runs_numbers() -> None:
    result = synthetic_run()
    text = " ".join("".join(Page(render_html(result)).text).split())
    assert f"{result.heldout_loss:.3f}" in text
    assert "Identical" in text
    assert result.ledger.program_id in text
    assert units.bytes_text(result.dense_bytes_total) in text
    assert result.reduction is not None
    assert f"{units.times_text(result.reduction)} less" in text
    assert "node-3 was killed" in text


def test_tasks_have_a_row_per_figure_and_columns_that_fit() -> None:
    result = synthetic_run(tasks=True)
    view = tasks_view(result)
    assert view is not None
    assert len(result.evaluations) == 11
    assert (view["rounds"], view["left_out"]) == (["0", "12", "24", "36", "48", "60"], 5)
    by_figure = {(row["thinking"], row["measure"]): row["figures"] for row in view["rows"]}
    assert by_figure["thinking", "exact match"][:2] == [("0.0%", "± 3.0"), ("20.0%", "± 3.0")]
    assert by_figure["not thinking", "overlong"][-1] == ("100.0%", "")
    assert by_figure["thinking", "tokens"][1] == ("0.200", "± 4.500")
    assert [one["on_chain"] for one in view["recorded"]] == [False, *[True] * 10]
    text = "".join(Page(render_html(result)).text)
    assert "Tasks" in text
    assert "5 more evaluations" in text
    assert tasks_view(synthetic_run()) is None


def test_different_replicas_are_loud() -> None:
    result = synthetic_run()
    raw = result.model_dump()
    raw["nodes"][0]["weights_sha256"] = "0" * 64
    with pytest.raises(ValidationError, match="replicas_identical is true"):
        RunResult.model_validate(raw)
    raw |= {"replicas_identical": False, "weights_sha256": None}
    text = "".join(Page(render_html(RunResult.model_validate(raw))).text)
    assert "Different" in text
    assert "Identical" not in text
    assert "The replicas differ." in headline(RunResult.model_validate(raw))


def test_replicas_that_nobody_compared_at_the_end_are_not_called_different() -> None:
    raw = synthetic_run().model_dump() | {"outcome": "interrupted"}
    for node in raw["nodes"]:
        node |= {"exit": "interrupted", "weights_sha256": None}
    identical, sha = replicas(RunResult.model_validate(raw | UNCOMPARED).nodes, [])
    assert (identical, sha) == (None, None)
    stopped = RunResult.model_validate(raw | UNCOMPARED)
    text = "".join(Page(render_html(stopped)).text)
    assert not re.search("[Dd]iffer", text)
    said = f"no node got to the end; identical {len(stopped.checks)} times on the way, last after round"
    assert said in " ".join(text.split())
    assert f"The replicas were not compared at the end: {said}" in headline(stopped)
    for node in raw["nodes"]:
        node["slot"] = None
    early = RunResult.model_validate(raw | UNCOMPARED | {"checks": [], "rounds": 0, "loss": [], "timeline": []})
    assert headline(early).startswith("Four nodes were stopped before training a model of")


def test_a_difference_on_the_way_is_told_where_no_node_got_to_the_end() -> None:
    raw = synthetic_run().model_dump()
    for node in raw["nodes"]:
        node |= {"exit": "failed", "weights_sha256": None}
    raw["checks"][-1]["weights_sha256"] = {"node-0": "0" * 64, "node-1": "1" * 64}
    nodes = RunResult.model_validate(raw | UNCOMPARED).nodes
    assert replicas(nodes, RunResult.model_validate(raw | UNCOMPARED).checks) == (False, None)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"loss": [1.0]}, "1 losses for 60 rounds"),
        ({"surprise": 1}, "surprise"),
        ({"rounds": -1}, "rounds"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        RunResult.model_validate(synthetic_run().model_dump() | change)


def test_the_timeline_may_only_name_nodes() -> None:
    raw = synthetic_run().model_dump()
    raw["timeline"][3]["members"][0]["node"] = "stranger"
    with pytest.raises(ValidationError, match="round 3 of the timeline names 'stranger'"):
        RunResult.model_validate(raw)


def test_a_diverged_loss_is_null_in_json() -> None:
    raw = synthetic_run().model_dump()
    raw["loss"][5] = float("nan")
    raw["heldout_curve"][1]["loss"] = float("inf")
    result = RunResult.model_validate(raw)
    assert result.loss[5] is None
    text = result.model_dump_json()
    assert "NaN" not in text
    assert RunResult.model_validate_json(text) == result
    render_html(result)


def test_repeated_events_become_one_line() -> None:
    events = [Event(time=n, level="warning", node="node-0", message=f"round {n}: piece {n} is bad") for n in range(900)]
    events += [Event(time=950, message=f"quiet {word}") for word in ("a", "b")]
    result = RunResult.model_validate(synthetic_run().model_dump() | {"events": [e.model_dump() for e in events]})
    html = render_html(result)
    assert html.count("is bad") == 1
    assert "and 899 more like it until 14:59" in html


def node(name: str, sha: str | None, *, slot: int | None = 0, exit_: str = "finished") -> NodeResult:
    return NodeResult.model_validate(
        {
            "name": name,
            "slot": slot,
            "wallet": "w",
            "node_id": "n",
            "status": "active",
            "exit": exit_,
            "weights_sha256": sha,
            "fingerprint": None,
            "bytes_sent": 0,
            "bytes_received": 0,
            "train_seconds": 0,
            "wait_seconds": 0,
            "updates_included": 0,
        }
    )


def test_replicas_needs_every_finished_member() -> None:
    good = ReplicaCheck(round=10, weights_sha256={"a": "1", "b": "1"})
    bad = ReplicaCheck(round=20, weights_sha256={"a": "1", "b": "2"})
    assert replicas([node("a", "x"), node("b", "x")], [good]) == (True, "x")
    assert replicas([node("a", "x"), node("b", None, exit_="killed")], [good]) == (True, "x")
    assert replicas([node("a", "x"), node("b", None, slot=None)], [good]) == (True, "x"), "an outsider has no replica"
    assert replicas([node("a", "x"), node("b", None)], [good]) == (False, "x"), "finished, but silent"
    assert replicas([node("a", "x"), node("b", "y")], []) == (False, None)
    assert replicas([node("a", "x"), node("b", "x")], [good, bad]) == (False, "x")
    assert replicas([], []) == (None, None)


def test_dense_allreduce_is_the_ring() -> None:
    assert dense_allreduce_bytes(1_000, 1) == 0
    assert dense_allreduce_bytes(1_000, 2) == 4_000
    assert dense_allreduce_bytes(1_000, 4) == 6_000
    assert dense_allreduce_bytes(1_000, 0) == 0


def test_mean_loss_is_weighted_by_tokens() -> None:
    assert mean_loss({"a": (1.0, 300), "b": (5.0, 100)}) == pytest.approx(2.0)
    assert mean_loss({}) is None


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0.0, 10.0, 5, [0, 2, 4, 6, 8, 10]),
        (3.1, 7.2, 4, [4, 5, 6, 7]),
        (0.0, 0.3, 3, [0, 0.1, 0.2, 0.3]),
        (5.0, 5.0, 3, [5.0]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, count: int, expected: list[float]) -> None:
    assert charts.nice_ticks(low, high, count) == pytest.approx(expected)


def test_labels_do_not_touch_and_stay_inside() -> None:
    placed = charts.spread([300.0, 298.0, 305.0, 20.0], 30, 10, 310)
    ordered = sorted(placed)
    assert all(late - early >= 30 for early, late in pairwise(ordered))
    assert ordered[0] >= 10
    assert ordered[-1] <= 310
    assert sorted(range(4), key=placed.__getitem__) == [3, 1, 0, 2], "their order is kept"


def test_smoothing_keeps_a_straight_line() -> None:
    line = [(float(x), 7.0 - 0.1 * x) for x in range(60)]
    smoothed = charts.smooth(line, 60)
    assert [x for x, _ in smoothed] == [x for x, _ in line]
    assert [y for _, y in smoothed] == pytest.approx([y for _, y in line])


def test_units() -> None:
    assert [units.bytes_text(n) for n in (0, 999, 1_000, 20_992, 12_800_000, 999_999)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "21.0 kB",
        "12.8 MB",
        "1.00 MB",
    ]
    assert units.memory_text(3_480_000_000) == "3.24 GiB"
    assert [units.seconds_text(s) for s in (0, 0.0035, 0.4, 12.34)] == ["0.00 s", "3.50 ms", "0.40 s", "12.3 s"]
    assert [units.seconds_text(s) for s in (161, 3_900, 311_000)] == ["2 min 41 s", "1 h 05 min", "3.6 days"]
    assert [units.count_text(n) for n in (7, 1_455, 20_900, 2_134_528)] == ["7", "1,455", "20.9 k", "2.13 M"]
    assert units.sol_text(45_700_000) == "0.0457 SOL"
    assert units.short("12D3KooWabcdefghij") == "12D3Ko…ghij"


def test_printable_keeps_text_on_one_clean_line() -> None:
    assert units.printable("a\nb\tc") == "a b c"
    assert units.printable("\x1b]0;title\x07\u202e") == "\ufffd]0;title\ufffd\ufffd"
    assert units.printable("größer ≥ 日本") == "größer ≥ 日本"
    assert len(units.printable("x" * 10_000)) == 500


def test_few_rounds_have_their_numbers_over_their_columns() -> None:
    row = charts.Row("node-0", dict.fromkeys(range(6), "included"), [], [], [], None)
    few = charts.state_grid([row], rounds=6, width=600, row_height=22).svg
    assert [f'x="{50 + 100 * number}.0"' in few for number in range(6)] == [True] * 6
    many = charts.state_grid([replace(row, states={})], rounds=600, width=600, row_height=22).svg
    assert 'class="tick start" x="0.0"' in many


def test_a_chart_of_lines_scrolls_before_its_words_are_too_small() -> None:
    page = render_html(synthetic_run())
    assert page.count('<div class="scroll"><svg') == 5
    assert 'style="min-width: 552px"' in page
