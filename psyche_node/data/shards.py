"""Packed sequences on disk: content-addressed shards, written in order of attention cost and read through memory maps.

A shard of n sequences of length L is n*L tokens (little-endian, 2 or 4 bytes), then n*L flag bytes (``TRAINED``,
``FIRST``). Documents begin at ``FIRST``; so does the padding, a document of its own on which nothing is trained.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from psyche_node.data.errors import DataMismatch
from psyche_node.data.files import write_atomically
from psyche_node.data.manifest import Form, Shard
from psyche_node.data.packing import attention_costs, pack
from psyche_node.data.spill import SpillReader

TRAINED, FIRST = 1, 2
SHARD_BYTES = 64 * 1024 * 1024
_READ = 1 << 20  # bytes read at once
_COUNTED = 1 << 20  # tokens counted at once, which takes 8 bytes for each

I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Written:
    """The shards, tokens without padding, and how often each token is a target (vocabulary,)."""

    shards: tuple[Shard, ...]
    tokens: int
    frequency: I64


def write_shards(out: Path, spill: SpillReader, documents: I64, form: Form, vocabulary: int) -> Written:
    """Pack ``documents`` (numbers in ``spill``) and write them, the cheapest sequence first."""
    frequency = np.zeros(vocabulary, dtype=np.int64)
    shards = []
    per_shard = max(1, SHARD_BYTES // (form.length * (form.width + 1)))
    for rows in _batches(_sequences(spill.lengths, documents, form.length), per_shard):
        tokens = np.full((len(rows), form.length), form.pad, dtype=f"<u{form.width}")
        flags = np.zeros((len(rows), form.length), dtype=np.uint8)
        for row, members in enumerate(rows):
            at = 0
            for document in members.tolist():
                ids, trained = spill[document]
                end = at + len(ids)
                tokens[row, at:end] = ids
                flags[row, at:end] = trained * np.uint8(TRAINED)
                flags[row, at] = FIRST  # and not trained: what precedes it is another document
                at = end
            if at < form.length:
                flags[row, at] = FIRST
        for at in range(0, len(rows), step := max(1, _COUNTED // form.length)):
            part = slice(at, at + step)
            frequency += np.bincount(tokens[part][flags[part] == TRAINED], minlength=vocabulary)
        state = hashlib.sha256(tokens.data)
        state.update(flags.data)
        name = f"{state.hexdigest()}.bin"
        write_atomically(out / name, tokens.data, flags.data)
        shards.append(Shard(file=name, sequences=len(rows)))
    return Written(tuple(shards), int(spill.lengths[documents].sum(dtype=np.int64)), frequency)


def _sequences(lengths: npt.NDArray[np.int32], documents: I64, capacity: int) -> Iterator[I64]:
    """Yield the documents of each packed sequence, longest first; the sequences in order of cost (ties: as packed)."""
    mine = lengths[documents]
    sequences = pack(mine, capacity)
    costs = attention_costs(mine, sequences)
    rank = np.empty(len(costs), dtype=np.int64)
    rank[np.argsort(costs, kind="stable")] = np.arange(len(costs))
    np.take(rank, sequences, out=sequences)
    ends = np.cumsum(np.bincount(sequences, minlength=len(costs)))
    order = np.lexsort((-mine, sequences))
    del costs, rank, sequences, mine  # 10^8 documents are not kept in memory more often than they have to be
    start = 0
    for end in ends:
        yield documents[order[start:end]]
        start = end


def _batches(rows: Iterator[I64], size: int) -> Iterator[list[I64]]:
    batch: list[I64] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class ShardRows:
    """The sequences of one shard, through a memory map.

    ``checksums`` (n,) are those of ``check_bytes``, with which each sequence is compared when it is read; None: it is
    not.
    """

    def __init__(self, path: Path, sequences: int, form: Form, checksums: U32 | None = None) -> None:
        check_size(path, sequences, form)
        self._path, self._sequences, self._form, self._checksums = path, sequences, form, checksums
        data = np.memmap(path, dtype=np.uint8, mode="r")
        shape = (sequences, form.length)
        cut = sequences * form.length * form.width
        self._tokens = data[:cut].view(f"<u{form.width}").reshape(shape)
        self._flags = data[cut:].reshape(shape)

    def read(self, row: int) -> tuple[npt.NDArray[np.uint16 | np.uint32], npt.NDArray[np.uint8]]:
        """Return copies of the tokens and flags of a sequence, both (L,).

        Raises DataMismatch if the file is not as it was when it was verified.
        """
        check_size(self._path, self._sequences, self._form)  # reading what a file no longer has would end the process
        tokens, flags = self._tokens[row].copy(), self._flags[row].copy()
        if self._checksums is not None and zlib.crc32(flags.data, zlib.crc32(tokens.data)) != self._checksums[row]:
            raise DataMismatch(
                f"{self._path} has changed since this process verified it: its sequence {row} is another one. If "
                "nobody has written there, disk or memory is failing. Fetch or prepare the data again, and start anew"
            )
        return tokens, flags


def check_size(path: Path, sequences: int, form: Form) -> None:
    """Raises DataMismatch if the file is missing or has another size."""
    expected = sequences * form.length * (form.width + 1)
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise DataMismatch(f"{path} cannot be read: {error.strerror}. Fetch or prepare the data again") from error
    if actual != expected:
        raise DataMismatch(f"{path} has {actual} bytes, not {expected}. Fetch or prepare the data again")


def check_bytes(path: Path, sequences: int, form: Form) -> U32:
    """Return the CRC-32 of each sequence, (n,). Raises DataMismatch if the bytes are not what the file's name says.

    They are read as a stream; the file has the size that it should have.
    """
    state, checksums = hashlib.sha256(), np.zeros(sequences, dtype=np.uint32)
    try:
        with path.open("rb") as file:
            for size in (form.length * form.width, form.length):
                for first in range(0, sequences, many := max(1, _READ // size)):
                    rows = checksums[first : first + many]
                    read = memoryview(file.read(size * len(rows)))
                    state.update(read)
                    rows[:] = [zlib.crc32(read[at * size :][:size], before) for at, before in enumerate(rows.tolist())]
            state.update(file.read())
    except OSError as error:
        raise DataMismatch(f"{path} cannot be read: {error.strerror}. Fetch or prepare the data again") from error
    if f"{state.hexdigest()}.bin" != path.name:
        raise DataMismatch(f"{path} does not hold the bytes that its name says. Fetch or prepare the data again")
    return checksums
