from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_node.node.journal import Journal, JournalReader

FIELDS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda key: key not in ("kind", "time", "self")),
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.integers(0, 9))),
    max_size=3,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(FIELDS, max_size=6), st.lists(st.integers(0, 400), max_size=8))
def test_reader_gets_every_line_once_wherever_the_writer_was(lines: list[dict[str, Any]], cuts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.jsonl"
        journal = Journal(whole)
        for index, fields in enumerate(lines):
            journal.write(f"kind {index}", **fields)
        journal.close()
        data = whole.read_bytes()

        growing = Path(folder) / "growing.jsonl"
        reader, read = JournalReader(growing), []
        for end in sorted(min(cut, len(data)) for cut in [*cuts, len(data)]):
            growing.write_bytes(data[:end])
            read += reader.read()
        assert [line["kind"] for line in read] == [f"kind {index}" for index in range(len(lines))]
        for line, fields in zip(read, lines, strict=True):
            assert {key: line[key] for key in fields} == fields


def test_reader_of_a_journal_that_is_not_there_yet(tmp_path: Path) -> None:
    assert JournalReader(tmp_path / "none.jsonl").read() == []


def test_line_torn_by_a_kill_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.write("one")
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"kind": "two", "ti')
    reader = JournalReader(path)
    assert [line["kind"] for line in reader.read()] == ["one"]
    again = Journal(path)
    again.write("three")
    again.close()
    assert [line["kind"] for line in reader.read()] == ["three"]
    third = Journal(path)
    third.close()
    assert path.read_bytes().endswith(b"}\n"), "a whole journal gets no empty line"


def test_lines_of_something_else_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'\n7\n[]\n{"kind": 3}\n\xff\n' + json.dumps({"kind": "good"}).encode() + b"\n")
    assert JournalReader(path).read() == [{"kind": "good"}]
