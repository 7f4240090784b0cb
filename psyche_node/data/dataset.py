"""Packed sequences by position, from a prepared folder.

Shapes: B sequences of a batch, L the sequence length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from psyche_node.data.compare import difference
from psyche_node.data.errors import DataError, DataMismatch
from psyche_node.data.manifest import Form, Manifest, Shard
from psyche_node.data.order import balanced_order
from psyche_node.data.shards import FIRST, TRAINED, U32, ShardRows, check_bytes, check_size

_OPEN_MAPS = 256  # a kernel gives a process 65,530 of them


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed sequences.

    All (B, L). ``tokens`` int64; ``trained`` bool: the token is a target, predicted from the place before it.
    ``places`` int64: the place of each token in its own document, which is what separates documents in attention.
    """

    tokens: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]
    places: npt.NDArray[np.int64]

    @property
    def trained_tokens(self) -> int:
        return int(self.trained.sum())


class _Split:
    """The sequences of one side of the held-out split, by number. Memory maps are opened when they are needed."""

    def __init__(self, folder: Path, shards: tuple[Shard, ...], form: Form) -> None:
        self._folder, self._shards, self._form = folder, shards, form
        self._starts = np.cumsum([0, *(shard.sequences for shard in shards)], dtype=np.int64)
        self._checksums: dict[int, U32] = {}
        self._rows = lru_cache(maxsize=_OPEN_MAPS)(self._open)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def check(self, *, verify: bool) -> None:
        """Make sure that all files are there and, to ``verify``, that they hold what they should, now and later.

        Raises DataMismatch, naming the first that is or does not.
        """
        for number, shard in enumerate(self._shards):
            path = self._folder / shard.file
            check_size(path, shard.sequences, self._form)
            if verify:
                self._checksums[number] = check_bytes(path, shard.sequences, self._form)

    def fill(self, numbers: Many[int], tokens: npt.NDArray[np.int64], flags: npt.NDArray[np.uint8]) -> None:
        """Copy the sequences ``numbers`` into the rows of ``tokens`` and ``flags``, both (B, L)."""
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        for at, (shard, number) in enumerate(zip(shards.tolist(), numbers, strict=True)):
            rows, row = self._rows(shard), number - int(self._starts[shard])
            tokens[at], flags[at] = rows.read(row)

    def _open(self, number: int) -> ShardRows:
        shard = self._shards[number]
        return ShardRows(self._folder / shard.file, shard.sequences, self._form, self._checksums.get(number))


class PackedDataset:
    """A prepared folder, verified when opened, and again by sequence when read through memory maps.

    Memory does not grow with the data, but for 4 bytes per sequence, 8 bytes per shard of 64 MiB and the manifest.
    ``expect`` is the manifest that the run names; ``published`` is where the run says that its data is: from a URL the
    owner's manifest is fetched, so that what differs can be named. Without ``verify``, sizes alone are looked at.

    Raises:
        DataError: there is no manifest.
        DataMismatch: a file is missing or differs (the first one is named), or the manifest is not the expected one.
    """

    def __init__(self, folder: Path, expect: bytes | None = None, verify: bool = True, published: str = "") -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.digest = self.manifest.digest
        """The manifest's SHA-256, which identifies the data."""
        if expect is not None and expect != self.digest:
            raise DataMismatch(difference(folder, self.manifest, expect, published))
        form = self._form = self.manifest.form
        self._train = _Split(folder, self.manifest.train, form)
        self._heldout = _Split(folder, self.manifest.heldout, form)
        for split in (self._train, self._heldout):
            split.check(verify=verify)
        if not len(self._train):
            raise DataError(f"{folder} holds no sequence to train on. Prepare the data again")

    def __len__(self) -> int:
        """Packed training sequences; one pass over the data is as many positions."""
        return len(self._train)

    @property
    def sequence_length(self) -> int:
        return self.manifest.sequence_length

    @property
    def vocabulary(self) -> int:
        return self.manifest.vocabulary

    @property
    def unigram_entropy(self) -> float:
        return self.manifest.unigram_entropy

    def indices(self, positions: Many[int], seed: bytes) -> list[int]:
        """Return the training sequences that ``positions`` are: each pass has its own order, keyed by ``seed``."""
        size = len(self)
        result = [0] * len(positions)
        by_pass: dict[int, list[int]] = {}
        for at, position in enumerate(positions):
            if position < 0:
                raise ValueError(f"position {position} is negative; positions count up from 0")
            by_pass.setdefault(position // size, []).append(at)
        for number, places in by_pass.items():
            inside = [positions[at] % size for at in places]
            key = hashlib.sha256(seed + number.to_bytes(8, "little")).digest()
            for at, index in zip(places, balanced_order(inside, size, key).tolist(), strict=True):
                result[at] = index
        return result

    def sample(self, position: int, seed: bytes) -> Batch:
        """Return the sequence of one position, as a batch of one."""
        return self.batch([position], seed)

    def batch(self, positions: Many[int], seed: bytes) -> Batch:
        """Return the sequences of ``positions``, in that order. Raises ValueError for a negative one."""
        return self._read(self._train, self.indices(positions, seed))

    def sequence(self, number: int, *, heldout: bool = False) -> Batch:
        """Return a sequence by its number in the shards, as a batch of one. Raises DataError if there is none."""
        split = self._heldout if heldout else self._train
        if not 0 <= number < len(split):
            side = "held-out sequence" if heldout else "sequence"
            raise DataError(f"{self.folder} has no {side} {number}. Choose one of its {len(split)}, counted from 0")
        return self._read(split, [number])

    def heldout(self, limit: int | None = None) -> Batch:
        """Return the held-out sequences, or ``limit`` of them, spread evenly: they lie in order of cost."""
        return self._read(self._heldout, self._spread(limit))

    def heldout_rows(self, limit: int | None = None) -> Iterator[Batch]:
        """Yield the same sequences one at a time, each as a batch of one: memory holds one of them."""
        for number in self._spread(limit):
            yield self._read(self._heldout, [number])

    def _spread(self, limit: int | None) -> list[int]:
        count = len(self._heldout)
        taken = count if limit is None else min(limit, count)
        return [i * count // taken for i in range(taken)]

    def _read(self, split: _Split, numbers: Many[int]) -> Batch:
        shape = (len(numbers), self.sequence_length)
        tokens, flags = np.empty(shape, np.int64), np.empty(shape, np.uint8)
        split.fill(numbers, tokens, flags)
        if tokens.size and int(tokens.max()) >= self.manifest.vocabulary:
            raise DataMismatch(f"{self.folder} holds tokens beyond its vocabulary. Prepare the data again")
        index = np.broadcast_to(np.arange(shape[1]), shape)
        first = (flags & FIRST) != 0
        starts = np.maximum.accumulate(np.where(first, index, 0), axis=1)
        return Batch(tokens, ((flags & TRAINED) != 0) & ~first, index - starts)
