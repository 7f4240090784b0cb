"""Tokens that others made: their labels, and their packs, which are taken apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche_node.data import BadSample, PackedDataset, prepare
from psyche_node.data.tokenized import IGNORED, documents_of


def documents(record: dict[str, Any]) -> list[tuple[list[int], list[bool]]]:
    return [(one.ids.tolist(), one.trained.tolist()) for one in documents_of(record, "x:1")]


def test_labels_say_what_is_trained() -> None:
    record = {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, 6, IGNORED, 8]}
    assert documents(record) == [([5, 6, 7, 8], [False, True, False, True])]
    assert documents({"inputs": [5, 6]}) == [([5, 6], [False, True])], "nothing precedes the first"
    padded = {"input_ids": [5, 6, 0, 0], "labels": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}
    assert documents(padded) == [([5, 6], [False, True])]


@given(st.lists(st.lists(st.integers(1, 99), min_size=2, max_size=6), min_size=1, max_size=5), st.integers(0, 4))
def test_packed_rows_come_apart_into_their_documents(parts: list[list[int]], padding: int) -> None:
    ids = [token for part in parts for token in part] + [0] * padding
    row: dict[str, Any] = {"inputs": np.array(ids), "labels": [t or IGNORED for t in ids]}
    expected = [(part, [False] + [True] * (len(part) - 1)) for part in parts]
    assert documents(row | {"sequence_lengths": [len(part) for part in parts]}) == expected
    places = [place for part in parts for place in range(len(part))] + list(range(padding))
    assert documents(row | {"position_ids": places}) == expected


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input_ids": []}, "`input_ids` is empty"),
        ({"input_ids": [1, -1, 2]}, "`input_ids[1]` is -1"),
        ({"input_ids": [1, 2.5, 3]}, "`input_ids` is not a list of integers"),
        ({"input_ids": [[1], [2, 3]]}, "`input_ids` is not a list of integers"),
        ({"labels": [1, 2]}, "`labels` has 2 entries for 3 tokens"),
        ({"labels": [1, 9, 3]}, "`labels[1]` is 9, and `input_ids[1]` is 2"),
        ({"labels": [2, 3, 9]}, "`labels` are shifted by one"),
        ({"sequence_lengths": [2, 2]}, "`sequence_lengths` are [2, 2], for 3 tokens"),
        ({"sequence_lengths": [0, 3]}, "`sequence_lengths` are [0, 3]"),
        ({"position_ids": [0, 1]}, "`position_ids` has 2 entries"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(BadSample) as caught:
        documents({"input_ids": [1, 2, 3], **change})
    assert says in caught.value.what


def test_a_table_of_packed_rows_is_prepared(tokenizer: Path, tmp_path: Path) -> None:
    rows = []
    for n in range(40):
        parts = [[20 + n + i for i in range(3 + (n + k) % 9)] for k in range(4)]
        ids = [token for part in parts for token in part]
        labels = [IGNORED if i % 3 == 1 else token for i, token in enumerate(ids)]
        rows.append({"inputs": ids, "labels": labels, "sequence_lengths": [len(part) for part in parts]})
    table = pa.table(
        {
            "inputs": pa.array([row["inputs"] for row in rows], pa.list_(pa.int32())),
            "labels": pa.array([row["labels"] for row in rows], pa.list_(pa.int64())),
            "sequence_lengths": pa.array([row["sequence_lengths"] for row in rows], pa.large_list(pa.int32())),
        }
    )
    pq.write_table(table, tmp_path / "packed.parquet")
    (tmp_path / "packed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    by_table = prepare(tmp_path / "packed.parquet", tokenizer, tmp_path / "table", 32, heldout=0.1)
    by_lines = prepare(tmp_path / "packed.jsonl", tokenizer, tmp_path / "lines", 32, heldout=0.1)
    assert (by_table.train, by_table.heldout) == (by_lines.train, by_lines.heldout)
    assert by_table.counts.samples == 160
    dataset = PackedDataset(tmp_path / "table")
    targets = sum(sum(mask) for row in rows for _, mask in documents(row))
    assert dataset.manifest.trained_tokens + dataset.manifest.heldout_trained_tokens == targets


def test_tokens_of_another_tokenizer_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"input_ids": [1, 2]}\n{"input_ids": [3, 90000]}\n')
    with pytest.raises(BadSample, match=r"t\.jsonl:2: the token 90000 is beyond the vocabulary"):
        prepare(tmp_path / "t.jsonl", tokenizer, tmp_path / "out", 16)
