"""A simulation says what became of the user's samples, and takes the flags that its messages name."""

from __future__ import annotations

import json
import shlex
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from report_data import synthetic_run
from rich.console import Console
from typer.testing import CliRunner

from psyche_node.data import BadSample, ChatTemplate, DataError
from psyche_node.data.manifest import Manifest
from psyche_node.data.preview import preview_sequence
from psyche_node.exits import Exit
from psyche_node.sim.cli import app
from psyche_node.sim.prepare import prepare, shortened
from psyche_node.sim.report import chat_command, render_html
from psyche_node.sim.result import RunResult
from psyche_node.sim.settings import Prepared, SimSettings
from psyche_node.sim.summary import print_summary

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
LENGTH = 48


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 good samples, 6 of which are too long, and one line that is no JSON."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "model.json").write_text(json.dumps(TINY))
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}. " * (40 if n % 10 == 0 else 1)} for n in range(60)]
    lines = [json.dumps(row) for row in rows]
    lines.insert(30, '{"prompt": "half of a sample", ')
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def prepared(chats: Path, cache: Path, out: Path, **changes: Any) -> Prepared:
    recipe = SimSettings(out=out).recipe.model_copy(update={"sequence_length": LENGTH, "vocabulary": 320})
    settings = {"out": out, "data": str(chats), "model": str(chats.parent / "model.json"), "recipe": recipe, **changes}
    return prepare(SimSettings(**settings), cache)


def test_counts_are_those_of_the_manifest_and_bad_samples_are_listed(chats: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(BadSample, match=r"chats\.jsonl:31: .*`--skip-bad N`"):
        prepared(chats, cache, tmp_path / "strict")
    found = prepared(chats, cache, tmp_path / "a", skip_bad="1").counts
    assert (found.samples, found.too_long, found.bad) == (61, 6, 1)
    assert found.train + found.heldout == 54
    (line,) = found.skipped
    assert line.startswith("1: ")
    assert line.endswith(f"({chats}:31)")
    again = prepared(chats, cache, tmp_path / "b", skip_bad="1")
    assert again.counts == found, "also where the data was built before"
    assert Manifest.read(again.data).counts.model_dump().items() <= found.model_dump().items()


def test_the_template_of_the_data_is_the_models(chats: Path, cache: Path, tmp_path: Path) -> None:
    own = prepared(chats, cache, tmp_path / "own", skip_bad="all")
    hermes = prepared(chats, cache, tmp_path / "hermes", skip_bad="all", template="hermes-llama3")
    assert own.data != hermes.data
    assert "Hermes" in (hermes.model / "chat_template.jinja").read_text()
    assert ChatTemplate(hermes.model).source == ChatTemplate(own.model, "hermes-llama3").source
    with pytest.raises(DataError, match=r"chatml is made of <\|im_end\|>, <\|im_start\|>, and the tokenizer that is"):
        prepared(chats, cache, tmp_path / "chatml", skip_bad="all", template="chatml")


def test_a_prepared_folder_has_its_own_sequence_length(
    chats: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[SimSettings] = []

    async def nothing(settings: SimSettings, started: float) -> Exit:
        told.append(settings)
        return Exit.OK

    monkeypatch.setattr("psyche_node.sim.run.run", nothing)
    folder = prepared(chats, cache, tmp_path / "a", skip_bad="1").data
    words = ["--data", str(folder), "--recipe", "hermes-sft"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert CliRunner().invoke(app, [*words, "--sequence-length", "64"]).exit_code == 0
    assert [settings.recipe.sequence_length for settings in told] == [LENGTH, 64]


def test_files_that_are_passed_over_are_named(chats: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_bytes(chats.read_bytes())
    found = prepared(folder, cache, tmp_path / "a", skip_bad="1", model=str(chats.parent / "model.json"))
    assert found.counts.samples == 61
    assert found.notes == (f"{folder}: passes over test.jsonl: other splits",)


@pytest.mark.parametrize("template", [None, "hermes-llama3"])
def test_something_to_ask_is_of_the_held_out_data(
    chats: Path, cache: Path, tmp_path: Path, template: str | None
) -> None:
    found = prepared(chats, cache, tmp_path / "a", skip_bad="1", template=template)
    assert found.question in {f"What is {n}?" for n in range(60)}
    folder = found.data
    preview = preview_sequence(folder, 0, found.model, heldout=True)
    assert found.question in "".join(run.text or "" for run in preview.documents[0].runs)
    (tmp_path / "plain.jsonl").write_text('{"text": "no conversation at all, and some more words"}\n' * 4)
    assert prepared(tmp_path / "plain.jsonl", cache, tmp_path / "b", model=None).question is None


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("What\n  is   'it'?\x1b[31m", "What is 'it'?[31m"),
        ("word " * 40, ("word " * 16).strip()),
        ("x" * 300, "x" * 80),
        ("", None),
        (None, None),
    ],
    ids=["one line", "long", "one word", "empty", "none"],
)
def test_a_question_fits_on_a_command_line(question: str | None, said: str | None) -> None:
    assert shortened(question) == said


def test_the_command_survives_a_shell() -> None:
    for question in ('What does `rm -rf $HOME` do? it\'s "quoted"!', "-h", None):
        words = shlex.split(chat_command("runs/my model", question))
        given = [] if question is None else ["--", question] if question == "-h" else [question]
        assert words == ["psyche-sim", "chat", "runs/my model", *given]


def printed(result: RunResult) -> str:
    console = Console(record=True, width=200, file=StringIO())
    print_summary(result, console=console)
    return console.export_text()


def test_the_summary_says_what_was_taken_and_dropped_and_why() -> None:
    text = printed(synthetic_run())
    assert "1,450 of 1,500 samples taken: 1,380 for training, 70 held out" in text
    assert (
        "50 dropped: 43 of more than 256 tokens (--sequence-length), 4 without a token that is trained, 3 bad" in text
    )


def test_the_summary_shows_the_tasks_and_counts_as_people_do() -> None:
    result = synthetic_run(tasks=True)
    text = printed(result)
    assert "after 60 rounds, by node-0" in text
    assert "sums thinking: exact match 100.0% ± 3.0, overlong 100.0%, tokens 1.000 ± 4.500" in text
    assert f"compared {len(result.checks)} times on the way" in text
    once = printed(result.model_copy(update={"checks": result.checks[:1], "rounds": 1, "evaluations": []}))
    assert "after 1 round, " in once
    assert "compared once on the way" in once
    assert "tasks " not in once
    asked = result.model_copy(update={"evaluations": [], "settings": {"tasks": "sums.toml"}})
    assert "none was evaluated" in printed(asked)


def test_that_nothing_is_held_out_is_said() -> None:
    whole = synthetic_run()
    assert whole.data is not None
    data = whole.data.model_copy(update={"train": 1_450, "heldout": 0})
    result = whole.model_copy(update={"data": data, "heldout_loss": None, "heldout_curve": []})
    assert "held-out loss  none: nothing is held out" in printed(result)
    assert "nothing is held out" in render_html(result)
    unknown = whole.model_copy(update={"heldout_loss": None})
    assert unknown.heldout_text == "unknown"
