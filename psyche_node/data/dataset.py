"""Packed sequences by position, from a prepared folder.

Shapes: B sequences of a batch, L the sequence length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from psyche_node.data.errors import DataError, DataMismatch
from psyche_node.data.manifest import Manifest, Shard
from psyche_node.data.permutation import permute
from psyche_node.data.prepare import FIRST, TRAINED


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


class _Rows:
    """The sequences of one shard."""

    def __init__(self, data: npt.NDArray[np.uint8], shape: tuple[int, int], width: int) -> None:
        cut = shape[0] * shape[1] * width
        self.tokens = data[:cut].view(f"<u{width}").reshape(shape)
        self.flags = data[cut:].reshape(shape)


class PackedDataset:
    """A prepared folder, verified when opened and read through memory maps.

    Raises:
        DataError: there is no manifest.
        DataMismatch: a file is missing or differs (the first one is named), or the manifest is not the expected one.
    """

    def __init__(self, folder: Path, expect: bytes | None = None, verify: bool = True) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        if expect is not None and expect != self.manifest.digest:
            raise DataMismatch(
                f"{folder} holds the data {self.manifest.digest.hex()[:16]}, but the run trains on "
                f"{expect.hex()[:16]}. Fetch or prepare the data that the run's owner names"
            )
        self._train = [self._open(shard, verify) for shard in self.manifest.train]
        self._heldout = [self._open(shard, verify) for shard in self.manifest.heldout]
        self._starts = np.cumsum([0, *(shard.sequences for shard in self.manifest.train)])
        self._size = int(self._starts[-1])
        if self._size == 0:
            raise DataError(f"{folder} holds no sequence to train on. Prepare the data again")

    def __len__(self) -> int:
        """Packed training sequences; one pass over the data is as many positions."""
        return self._size

    @property
    def sequence_length(self) -> int:
        return self.manifest.sequence_length

    @property
    def vocabulary(self) -> int:
        return self.manifest.vocabulary

    @property
    def digest(self) -> bytes:
        """The manifest's SHA-256, which identifies the data."""
        return self.manifest.digest

    @property
    def unigram_entropy(self) -> float:
        return self.manifest.unigram_entropy

    def indices(self, positions: Many[int], seed: bytes) -> list[int]:
        """Return the training sequences that ``positions`` are: each pass is its own permutation, keyed by ``seed``."""
        result = [0] * len(positions)
        by_pass: dict[int, list[int]] = {}
        for at, position in enumerate(positions):
            if position < 0:
                raise ValueError(f"position {position} is negative; positions count up from 0")
            by_pass.setdefault(position // self._size, []).append(at)
        for number, places in by_pass.items():
            inside = [positions[at] % self._size for at in places]
            key = hashlib.sha256(seed + number.to_bytes(8, "little")).digest()
            for at, index in zip(places, permute(inside, self._size, key).tolist(), strict=True):
                result[at] = index
        return result

    def sample(self, position: int, seed: bytes) -> Batch:
        """Return the sequence of one position, as a batch of one."""
        return self.batch([position], seed)

    def batch(self, positions: Many[int], seed: bytes) -> Batch:
        """Return the sequences of ``positions``, in that order. Raises ValueError for a negative one."""
        indices = self.indices(positions, seed)
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        rows = [(self._train[s], i - int(self._starts[s])) for s, i in zip(shards.tolist(), indices, strict=True)]
        return self._stack(rows)

    def heldout(self, limit: int | None = None) -> Batch:
        """Return the held-out sequences, or ``limit`` of them, spread evenly: packing has sorted them by length."""
        count = self.manifest.heldout_sequences
        taken = count if limit is None else min(limit, count)
        wanted = [i * count // taken for i in range(taken)]
        rows = [(shard, row) for shard in self._heldout for row in range(len(shard.tokens))]
        return self._stack([rows[i] for i in wanted])

    def _open(self, shard: Shard, verify: bool) -> _Rows:
        path, length, width = self.folder / shard.file, self.manifest.sequence_length, self.manifest.token_bytes
        expected = shard.sequences * length * (width + 1)
        try:
            actual = path.stat().st_size
            if actual != expected:
                raise DataMismatch(f"{path} has {actual} bytes, not {expected}. Fetch or prepare the data again")
            data = np.memmap(path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise DataMismatch(f"{path} cannot be read: {error.strerror}. Fetch or prepare the data again") from error
        if verify and f"{hashlib.sha256(data.data).hexdigest()}.bin" != shard.file:
            raise DataMismatch(f"{path} does not hold the bytes that its name says. Fetch or prepare the data again")
        return _Rows(data, (shard.sequences, length), width)

    def _stack(self, rows: Many[tuple[_Rows, int]]) -> Batch:
        shape = (len(rows), self.sequence_length)
        tokens, flags = np.empty(shape, np.int64), np.empty(shape, np.uint8)
        for at, (shard, row) in enumerate(rows):
            tokens[at], flags[at] = shard.tokens[row], shard.flags[row]
        if tokens.size and int(tokens.max()) >= self.manifest.vocabulary:
            raise DataMismatch(f"{self.folder} holds tokens beyond its vocabulary. Prepare the data again")
        index = np.broadcast_to(np.arange(shape[1]), shape)
        first = (flags & FIRST) != 0
        starts = np.maximum.accumulate(np.where(first, index, 0), axis=1)
        return Batch(tokens, ((flags & TRAINED) != 0) & ~first, index - starts)
