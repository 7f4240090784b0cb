"""The demo's data set, from this interpreter's own documentation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from psyche_node.data import (
    DataError,
    PackedDataset,
    build_data,
    build_stdlib_chat,
    prepare,
    read_samples,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stdlib") / "chat.jsonl"
    counts = build_stdlib_chat(path)
    assert counts.samples == len(path.read_bytes().splitlines()) > 5000
    assert counts.objects["function"] > 500
    return path


def test_it_is_the_same_every_time(stdlib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    (tmp_path / "random.py").write_text("raise SystemExit('the working folder must not be imported from')")
    monkeypatch.chdir(tmp_path)
    build_stdlib_chat(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == stdlib.read_bytes()


def test_it_answers_from_the_documentation(stdlib: Path) -> None:
    answers = {}
    for sample in read_samples(stdlib):
        user, assistant = sample.messages
        assert 0 < len(assistant["content"]) <= 640
        assert " at 0x" not in assistant["content"]
        answers.setdefault(sample.key.decode(), []).append((user["content"], assistant["content"]))
    dedent = dict(answers["textwrap.dedent"])
    assert any(
        "Remove any common leading whitespace" in a and a.startswith("textwrap.dedent(text)") for a in dedent.values()
    )
    assert "textwrap.dedent(text)" in dedent.values(), "and its signature alone"
    assert "os.path.join" in answers
    assert "str.join" in answers
    assert not any(
        name.split(".")[0] in ("antigravity", "this", "idlelib", "turtle", "test", "posixpath") for name in answers
    )
    questions = [q for pairs in answers.values() for q, _ in pairs]
    assert len(set(questions)) == len(questions), "no question has two answers"


def test_building_data_is_cached_by_content(stdlib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small.jsonl"
    small.write_bytes(b"".join(stdlib.read_bytes().splitlines(keepends=True)[:400]))
    first = build_data(tmp_path / "cache", source=str(small), vocabulary=512, sequence_length=192)
    inode = (first.packed / "manifest.json").stat().st_ino
    with monkeypatch.context() as patch:
        for name in ("train_tokenizer", "prepare"):
            patch.setattr(f"psyche_node.data.sources.{name}", None)
        again = build_data(tmp_path / "cache", source=str(small), vocabulary=512, sequence_length=192)
    assert again == first
    assert (again.packed / "manifest.json").stat().st_ino == inode, "nothing was written again"
    other = build_data(tmp_path / "cache", source=str(small), vocabulary=512, sequence_length=256)
    assert other.tokenizer == first.tokenizer
    assert other.packed != first.packed
    with small.open("a") as file:
        file.write(json.dumps({"prompt": "one", "completion": "more"}) + "\n")
    changed = build_data(tmp_path / "cache", source=str(small), vocabulary=512, sequence_length=192)
    assert changed.packed != first.packed
    assert changed.manifest.counts.samples == first.manifest.counts.samples + 1
    assert len(PackedDataset(changed.packed)) == changed.manifest.sequences
    assert not [name for name in os.listdir(tmp_path / "cache") if name.startswith(".")]


def test_a_prepared_folder_is_used_as_it_is(chat: Path, tokenizer: Path, tmp_path: Path) -> None:
    manifest = prepare(chat, tokenizer, tmp_path / "prepared", 96)
    source = str(tmp_path / "prepared")
    data = build_data(tmp_path / "cache", source=source, tokenizer=tokenizer, sequence_length=96)
    assert (data.packed, data.manifest) == (tmp_path / "prepared", manifest)
    with pytest.raises(DataError, match="sequences of 96 tokens, and the settings ask for 128"):
        build_data(tmp_path / "cache", source=source, tokenizer=tokenizer, sequence_length=128)
    with pytest.raises(DataError, match="Name the model folder"):
        build_data(tmp_path / "cache", source=source, sequence_length=96)
    train_tokenizer(chat, 300, tmp_path / "other")
    with pytest.raises(DataError, match="with another tokenizer"):
        build_data(tmp_path / "cache", source=source, tokenizer=tmp_path / "other", sequence_length=96)


def test_an_interpreter_without_docstrings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psyche_node.data.stdlib_chat as module

    walk = tmp_path / "walk.py"
    walk.write_text("import sys; sys.stderr.write('{}\\n')")
    monkeypatch.setattr(module, "WALK", walk)
    with pytest.raises(DataError, match="docstrings seem to be stripped"):
        build_stdlib_chat(tmp_path / "chat.jsonl")
    walk.write_text("import sys; sys.exit('something broke')")
    with pytest.raises(DataError, match="something broke"):
        build_stdlib_chat(tmp_path / "chat.jsonl")
    assert not (tmp_path / "chat.jsonl").exists()
