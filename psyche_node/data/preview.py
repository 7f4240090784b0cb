"""One packed sequence, or one sample, as runs of tokens that are trained or are not: to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from psyche_node.data.dataset import PackedDataset
from psyche_node.data.encode import Encoder
from psyche_node.data.errors import BadSample, DataError
from psyche_node.data.samples import AnySample, SampleFormat, read_any
from psyche_node.data.textcoding import TextCoder
from psyche_node.folder_files import MANIFEST


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens alike: trained or not, control tokens or not. ``text`` is None without a tokenizer."""

    ids: list[int]
    trained: bool
    control: bool
    text: str | None


@dataclass(frozen=True, slots=True)
class Document:
    """The runs of a document. Padding is one, too."""

    runs: list[Run]
    padding: bool = False

    @property
    def tokens(self) -> int:
        return sum(len(run.ids) for run in self.runs)

    @property
    def trained(self) -> int:
        return sum(len(run.ids) for run in self.runs if run.trained)


@dataclass(frozen=True, slots=True)
class Preview:
    """What was asked for: where it is from, and its documents in order."""

    title: str
    documents: list[Document]


def preview_sequence(folder: Path, number: int, tokenizer: Path | None, *, heldout: bool = False) -> Preview:
    """Return a sequence of a prepared folder, counted from 0 in the order of the shards, the cheapest first.

    Raises:
        DataError: there is no such folder or sequence, or the tokenizer is not the one it was prepared with.
    """
    data = PackedDataset(folder, verify=False)
    coder = None if tokenizer is None else TextCoder.read(tokenizer)
    if coder is not None and coder.vocabulary != data.vocabulary:
        raise DataError(
            f"{folder} was prepared with {data.vocabulary} tokens, and {tokenizer} has {coder.vocabulary}. "
            "Name the tokenizer that it was prepared with"
        )
    batch = data.sequence(number, heldout=heldout)
    tokens, trained, places = batch.tokens[0], batch.trained[0], batch.places[0]
    starts = [*np.flatnonzero(places == 0).tolist(), len(tokens)]
    decode = None if coder is None else coder.tokenizer
    documents = []
    for start, end in pairwise(starts):
        ids = tokens[start:end]
        padding = end == len(tokens) and bool((ids == data.manifest.pad).all()) and not trained[start:end].any()
        documents.append(Document(_runs(ids, trained[start:end], decode), padding))
    count = data.manifest.heldout_sequences if heldout else len(data)
    side = "held-out sequence" if heldout else "sequence"
    return Preview(f"{folder}: {side} {number} of {count:,}", documents)


def preview_sample(file: Path, number: int, encoder: Encoder, form: SampleFormat) -> Preview:
    """Return a sample of a file, counted from 0, as it would be prepared. Bad ones before it count, too.

    Raises:
        BadSample: it is no sample, or cannot be encoded.
        DataError: the file cannot be read, or has fewer samples.
    """
    samples = islice(_wanted(file, number, form), 1)
    for sample, (ids, trained) in encoder.documents(samples):
        return Preview(sample.where, [Document(_runs(ids, trained, encoder.template.tokenizer))])
    raise DataError(f"{file} has no sample {number}: they are counted from 0. Choose a smaller one")


def _wanted(file: Path, number: int, form: SampleFormat) -> Iterator[AnySample]:
    """The samples from the one with this number on. Raises BadSample if it, or one after it, is none."""
    seen = 0

    def passes(error: BadSample) -> None:
        nonlocal seen
        if seen >= number:
            raise error
        seen += 1

    for sample in read_any(file, form, passes):
        if seen >= number:
            yield sample
        seen += 1


def is_prepared(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def _runs(ids: npt.NDArray[np.generic], trained: npt.NDArray[np.bool_], tokenizer: Tokenizer | None) -> list[Run]:
    control = frozenset() if tokenizer is None else frozenset(tokenizer.get_added_tokens_decoder())
    tokens = [
        (is_trained, token in control, token) for is_trained, token in zip(trained.tolist(), ids.tolist(), strict=True)
    ]
    runs = []
    for (is_trained, is_control), alike in groupby(tokens, key=lambda token: token[:2]):
        mine = [token for _, _, token in alike]
        text = None if tokenizer is None else tokenizer.decode(mine, skip_special_tokens=False)
        runs.append(Run(mine, is_trained, is_control, text))
    return runs
