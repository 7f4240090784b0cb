"""However a simulation ends, it says so and leaves no process behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_harness import Simulate, journal, processes_of, until

from psyche_node.sim.result import load_result

pytestmark = pytest.mark.e2e


def trains(out: Path) -> Callable[[], bool]:
    return lambda: any(line["kind"] == "trained" for line in journal(out, "node-0"))


def test_ctrl_c_stops_everything_and_reports_what_was_trained(started) -> None:
    process, out = started("--nodes", "2", "--rounds", "500")
    until(trains(out), "the first round")
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 130, text
    assert processes_of(out) == []
    result = load_result(out / "report.json")
    assert result.outcome == "interrupted"
    assert 1 <= result.rounds < 500
    assert [(node.exit, node.exit_code) for node in result.nodes] == [("interrupted", 130)] * 2
    assert "Traceback" not in text


def test_sigkill_of_the_simulation_takes_its_processes_along(started) -> None:
    process, out = started("--nodes", "2", "--rounds", "500")
    until(trains(out), "the first round")
    process.kill()
    process.wait()
    until(lambda: processes_of(out) == [], "the end of every process", 240)


def test_used_output_folder_is_refused(simulate: Simulate, tmp_path: Path) -> None:
    (tmp_path / "sim").mkdir()
    (tmp_path / "sim" / "precious").write_text("mine")
    finished = simulate("--nodes", "2", "--rounds", "2")
    assert finished.code == 13
    assert "not empty" in finished.text
    assert [path.name for path in (tmp_path / "sim").iterdir()] == ["precious"]


def test_bad_line_of_the_users_data_is_named(simulate: Simulate, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"messages": 7}\n')
    finished = simulate("--nodes", "2", "--rounds", "2", "--data", str(data))
    assert finished.code == 40, finished.text
    assert f"{data}:" in finished.text.replace("\n", "")
    assert not finished.out.exists(), "the corrected command may name the same folder"
    assert "Traceback" not in finished.text


def test_flag_out_of_range_is_named(simulate: Simulate) -> None:
    finished = simulate("--nodes", "0")
    assert finished.code == 2
    assert "nodes" in finished.text
