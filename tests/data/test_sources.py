"""Files of every kind hold the same samples, folders are read as their writers meant them, bad records are named."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from psyche_node.data import BadSample, DataError, Sample, SampleFormat, Text, read_any
from psyche_node.data.locate import find_files
from psyche_node.data.samples import parse_any

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"x": {"type": "number"}}}}}
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n} — é"}]}
    for n in range(600)
]
ROWS[3]["messages"][1] |= {"train": True}
ROWS[5]["tools"] = [TOOL]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    keys = dict.fromkeys(key for row in rows for key in row)  # a table has every key in every row
    table = pa.Table.from_pylist([keys | row for row in rows])
    match "".join(path.suffixes[-2:]):
        case ".jsonl":
            path.write_bytes(lines)
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case ".jsonl.bz2":
            path.write_bytes(bz2.compress(lines))
        case ".jsonl.zst":
            path.write_bytes(pa.Codec("zstd").compress(lines, asbytes=True))
        case ".parquet":
            pq.write_table(table, path, row_group_size=250)
        case ".arrow":  # a stream, as the `datasets` library writes it
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table, max_chunksize=100)
        case ".feather":
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
                out.write_table(table, max_chunksize=100)
    return path


KINDS = ("jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.zst", "parquet", "arrow", "feather")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_holds_the_same_samples(kind: str, tmp_path: Path) -> None:
    found = list(read_any(write(tmp_path / f"chat.{kind}")))
    expected = [next(iter(parse_any(row, "x"))) for row in ROWS]
    assert len(found) == len(ROWS)
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Sample)
        assert isinstance(other, Sample)
        assert (one.messages, one.train, one.tools, one.key) == (other.messages, other.train, other.tools, other.key)
    assert found[599].where.endswith(f"chat.{kind}:600")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_record_is_named_by_file_and_number(kind: str, tmp_path: Path) -> None:
    rows = [*ROWS[:299], {"messages": [{"role": "user", "content": "no answer"}]}]
    path = write(tmp_path / f"chat.{kind}", rows)
    with pytest.raises(BadSample, match=rf"chat\.{kind}:300: there is no assistant message"):
        list(read_any(path))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_damaged_file_is_named(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"chat.{kind}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"chat\.{kind}"):
        list(read_any(path))
    path.write_bytes(b"neither one nor the other")
    with pytest.raises(DataError, match=rf"chat\.{kind}"):
        list(read_any(path))


def test_a_json_array_gets_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(json.dumps(ROWS[:2], indent=1))
    with pytest.raises(BadSample, match=r"chat\.json:1: .*jq -c"):
        list(read_any(tmp_path / "chat.json"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "q" "completion": "a"}\n', r"from column 16 on \(Expecting ',' delimiter\)\. Write"),
        (b'{"prompt": "q", \n', r"from column 1[67] on \((Illegal trailing comma|Expecting property)"),
        (b'{"prompt": \r\n', r"from column 11 on \(Expecting value\)"),
        ('{"é": é}'.encode(), r"from column 7 on \(Expecting value\)"),
        (b'{"prompt": "\xff"}\n', r"from byte 13 on \(it is not UTF-8: invalid start byte\)"),
    ],
)
def test_what_is_not_json_has_one_place(line: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_bytes(b'{"text": "t"}\n' * 6 + line)
    with pytest.raises(BadSample, match=rf"chat\.jsonl:7: this is not JSON {said}") as caught:
        list(read_any(tmp_path / "chat.jsonl"))
    assert "line 1" not in str(caught.value)
    assert "line 2" not in str(caught.value)


def test_text_is_a_sample_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("all of it\n\nis one document\n")
    (text,) = read_any(tmp_path / "a.txt")
    assert isinstance(text, Text)
    assert text.text == "all of it\n\nis one document\n"
    (line,) = parse_any({"text": "t", "group": "g"}, "x:1")
    assert isinstance(line, Text)
    assert line.key == b"g"
    for bad in ("", 3, None, "\ud800"):
        with pytest.raises(BadSample, match="x:1: `text`"):
            list(parse_any({"text": bad}, "x:1"))


def test_the_format_decides_where_a_record_has_several() -> None:
    record = {**ROWS[0], "text": "rendered", "prompt": "p", "completion": "c", "input_ids": [1, 2]}
    kinds = {form: next(iter(parse_any(dict(record), "x:1", form))) for form in SampleFormat if form != "sharegpt"}
    assert isinstance(kinds[SampleFormat.AUTO], Sample)
    assert kinds[SampleFormat.AUTO].messages[0]["content"] == "q0"
    assert kinds[SampleFormat.COMPLETION].messages[0]["content"] == "p"  # type: ignore[union-attr]
    assert kinds[SampleFormat.TEXT].text == "rendered"  # type: ignore[union-attr]
    assert kinds[SampleFormat.TOKENS].ids.tolist() == [1, 2]  # type: ignore[union-attr]
    with pytest.raises(BadSample, match="there is no `conversations`; the keys are"):
        list(parse_any(dict(record), "x:1", SampleFormat.SHAREGPT))


def names(source: Path, heard: list[str] | None = None) -> list[str]:
    found = find_files(str(source), source / "cache", note=(heard if heard is not None else []).append)
    return [path.relative_to(source).as_posix() for path in found]


def test_a_repository_of_files_gives_its_training_split(tmp_path: Path) -> None:
    for name in ("data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/test-0.parquet"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    write(tmp_path / ".hidden" / "x.parquet")
    heard: list[str] = []
    assert names(tmp_path, heard) == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert heard == [f"{tmp_path}: passes over data/test-0.parquet: other splits"]


def test_a_folder_saved_by_datasets_is_read_as_its_state_says(tmp_path: Path) -> None:
    train = tmp_path / "train"
    for name in ("data-00000-of-00002.arrow", "data-00001-of-00002.arrow", "cache-1234.arrow"):
        write(train / name)
    files = [{"filename": "data-00000-of-00002.arrow"}, {"filename": "data-00001-of-00002.arrow"}]
    (train / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    assert names(train) == [one["filename"] for one in files], "not what a cache left behind"
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    heard: list[str] = []
    assert names(tmp_path, heard) == [f"train/{one['filename']}" for one in files]
    assert heard == [f"{tmp_path}: takes the split train, and not test"]
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["a", "b"]}))
    with pytest.raises(DataError, match="has the splits a, b"):
        names(tmp_path)


def test_where_there_is_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file"):
        names(tmp_path)
    write(tmp_path / "test.jsonl")
    with pytest.raises(DataError, match=r"only other splits \(test\.jsonl\)"):
        names(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        names(tmp_path / "missing")
    (tmp_path / "chat.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"chat\.xlsx: no known kind of file"):
        names(tmp_path / "chat.xlsx")
    with pytest.raises(DataError, match="Write hf://datasets/OWNER/NAME"):
        find_files("hf://datasets/only-one", tmp_path)
