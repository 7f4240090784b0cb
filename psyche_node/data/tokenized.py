"""Samples that are token ids already: ``input_ids`` or ``inputs``, with ``labels``, perhaps packed by others.

Rows that others have packed are taken apart into their documents, which are packed again here: so that they are
balanced by cost like all others, no document sees its neighbours, and the held-out split is by document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from psyche_node.data.errors import BadSample

IGNORED = -100
"""The label of a token that is not trained."""
_NAMES = ("input_ids", "inputs")

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """One document: token ids (L,) and which of them are trained (L,), never the first."""

    ids: npt.NDArray[np.uint32]
    trained: npt.NDArray[np.bool_]
    key: bytes
    where: str


def is_tokenized(record: dict[str, Any]) -> bool:
    return any(isinstance(record.get(name), (list, np.ndarray)) for name in _NAMES)


def documents_of(record: dict[str, Any], where: str) -> Iterator[Tokens]:
    """Yield the documents of one row.

    ``labels`` are aligned with the ids (not shifted), and equal them where a token is trained; without them every token
    is. Documents begin where ``sequence_lengths`` says or, without it, where ``position_ids`` goes back. What lies
    behind the last document, and what ``attention_mask`` leaves out, is padding.

    Raises:
        BadSample: says what does not fit.
    """
    name = next(name for name in _NAMES if name in record)
    ids = _numbers(record[name], name, where)
    if not len(ids):
        raise BadSample(where, f"`{name}` is empty", "Remove the row")
    if int(ids.min()) < 0 or int(ids.max()) >= 1 << 31:
        wrong = int(np.flatnonzero((ids < 0) | (ids >= 1 << 31))[0])
        raise BadSample(where, f"`{name}[{wrong}]` is {ids[wrong]}, which is no token", "Tokenize it again")
    labels = _labels(record, ids, name, where)
    kept = np.ones(len(ids), dtype=np.bool_)
    if "attention_mask" in record:
        kept = _numbers(record["attention_mask"], "attention_mask", where, like=ids) != 0
    for start, end in _bounds(record, ids, where):
        inside = kept[start:end]
        mine = ids[start:end][inside].astype(np.uint32)
        trained = labels[start:end][inside] != IGNORED
        if not len(mine) or (end == len(ids) and start and not trained.any() and (mine == mine[0]).all()):
            continue  # padding, which packers end a row with
        trained[:1] = False
        group = record.get("group")
        key = group.encode() if isinstance(group, str) else mine.astype("<u4").tobytes()
        yield Tokens(mine, trained, key, where)


def _labels(record: dict[str, Any], ids: I64, name: str, where: str) -> I64:
    if "labels" not in record:
        return ids
    labels = _numbers(record["labels"], "labels", where, like=ids)
    wrong = np.flatnonzero((labels != IGNORED) & (labels != ids))
    if not len(wrong):
        return labels
    moved = (labels[:-1] == IGNORED) | (labels[:-1] == ids[1:])
    if len(ids) > 1 and moved.all():
        raise BadSample(
            where,
            "`labels` are shifted by one: each is the token after its place",
            f"Align them with `{name}`, as transformers wants them: it shifts them itself",
        )
    at = int(wrong[0])
    raise BadSample(
        where,
        f"`labels[{at}]` is {labels[at]}, and `{name}[{at}]` is {ids[at]}",
        f"Make a label its own token, or {IGNORED} where nothing is trained",
    )


def _bounds(record: dict[str, Any], ids: I64, where: str) -> Iterator[tuple[int, int]]:
    if "sequence_lengths" in record:
        lengths = _numbers(record["sequence_lengths"], "sequence_lengths", where)
        ends = np.cumsum(lengths)
        if not len(lengths) or int(lengths.min()) < 1 or int(ends[-1]) > len(ids):
            raise BadSample(
                where,
                f"`sequence_lengths` are {lengths.tolist()[:8]}, for {len(ids)} tokens",
                "Make them positive, and their sum at most the number of tokens",
            )
        starts = ends - lengths
        return zip(starts.tolist(), ends.tolist(), strict=True)
    if "position_ids" in record:
        places = _numbers(record["position_ids"], "position_ids", where, like=ids)
        cuts = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(ids)]
        return pairwise(cuts)
    return iter([(0, len(ids))])


def _numbers(value: Any, field: str, where: str, like: I64 | None = None) -> I64:
    try:
        array = np.asarray(value)
        fits = array.ndim == 1 and (array.dtype.kind in "iub" or not array.size)
    except ValueError:  # rows of different lengths
        fits = False
    if not fits:
        raise BadSample(where, f"`{field}` is not a list of integers", "Write one integer per token")
    if like is not None and len(array) != len(like):
        raise BadSample(
            where, f"`{field}` has {len(array)} entries for {len(like)} tokens", "Write one entry per token"
        )
    return array.astype(np.int64)
