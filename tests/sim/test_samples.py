"""A simulation says what became of the user's samples, and takes the flags that its messages name."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from report_data import synthetic_run
from rich.console import Console

from psyche_node.data import BadSample, ChatTemplate, DataError
from psyche_node.data.manifest import Manifest
from psyche_node.sim.prepare import prepare
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
    assert line.startswith(f"{chats}:31: ")
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
