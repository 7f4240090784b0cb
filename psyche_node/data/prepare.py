"""From a data file and a tokenizer folder to content-addressed, memory-mapped shards of packed sequences.

A shard of n sequences of length L is n*L tokens (little-endian, 2 or 4 bytes), then n*L flag bytes (``TRAINED``,
``FIRST``). Documents begin at ``FIRST``; so does the padding, a document of its own on which nothing is trained.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from psyche_node.data.errors import DataError
from psyche_node.data.files import sha256_file, write_atomically
from psyche_node.data.formats import Sample, read_samples
from psyche_node.data.manifest import NAME, Counts, Manifest, Shard, unigram_entropy
from psyche_node.data.packing import pack
from psyche_node.data.template import ChatTemplate

TRAINED, FIRST = 1, 2
SHARD_BYTES = 64 * 1024 * 1024
_CHUNK = 2048  # samples tokenized together: bounds memory, keeps the threads of the tokenizer busy

Document = tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]


@dataclass(slots=True)
class _Split:
    """The documents of one side of the held-out split."""

    documents: list[Document] = field(default_factory=list)
    samples: int = 0


def prepare(
    jsonl: Path,
    tokenizer: Path,
    out: Path,
    sequence_length: int,
    heldout: float = 0.05,
    seed: int = 0,
    too_long: Literal["drop", "cut"] = "drop",
) -> Manifest:
    """Write the folder ``out`` and return its manifest, which is written last.

    The same inputs give the same bytes on every host. ``heldout`` is the fraction of samples kept for evaluation,
    chosen by a hash of each sample keyed with ``seed``, so that adding samples moves no other one across. ``too_long``
    says what happens to a sample of more than ``sequence_length`` tokens; the manifest counts it either way.

    Raises:
        BadSample: a line of ``jsonl`` is not a sample, or the chat template refuses it.
        DataError: a file cannot be read, a setting makes no sense, or nothing is left to train on.
    """
    if sequence_length < 2:
        raise DataError(f"a sequence length of {sequence_length} leaves nothing to predict. Use at least 2")
    if not 0 <= heldout < 1:
        raise DataError(f"a held-out fraction of {heldout} is not in [0, 1). The default is 0.05")
    template = ChatTemplate(tokenizer)
    train, held = _Split(), _Split()
    counts = {"too_long": 0, "untrained": 0, "samples": 0, "cut": 0}
    nearest: tuple[int, _Split, int] | None = None
    for sample, (ids, trained) in _encoded(template, read_samples(jsonl)):
        counts["samples"] += 1
        if len(ids) > sequence_length:
            if too_long == "drop":
                counts["too_long"] += 1
                continue
            ids, trained = ids[:sequence_length], trained[:sequence_length]
            counts["cut"] += int(bool(trained.any()))
        if not trained.any():
            counts["untrained"] += 1
            continue
        ticket = _ticket(sample.key, seed)
        side = held if ticket < int(heldout * 2**64) else train
        if side is train and (nearest is None or ticket < nearest[0]):
            nearest = (ticket, side, len(side.documents))
        side.documents.append((ids, trained))
        side.samples += 1
    if heldout and not held.documents and nearest is not None and len(train.documents) > 1:
        held.documents.append(train.documents.pop(nearest[2]))  # a small set still has something to be judged by
    if not train.documents:
        raise DataError(
            f"{jsonl}: none of its {counts['samples']} samples can be trained on ({counts['too_long']} are longer than "
            f"{sequence_length} tokens, {counts['untrained']} have no trained token). Use a longer sequence, or cut"
        )
    vocabulary = template.vocabulary
    width = 2 if vocabulary <= 1 << 16 else 4
    pad = next((i for n in ("pad_token", "eos_token") if (i := template.token_id(n)) is not None), 0)
    shards = [_write(out, side.documents, sequence_length, width, pad) for side in (train, held)]
    tokens = sum(len(ids) for ids, _ in train.documents)
    sequences = sum(shard.sequences for shard in shards[0])
    frequency = _frequency(train.documents, vocabulary)
    manifest = Manifest(
        source=sha256_file(jsonl),
        tokenizer=tokenizer_digest(template),
        vocabulary=vocabulary,
        pad=pad,
        sequence_length=sequence_length,
        token_bytes=width,
        train=tuple(shards[0]),
        heldout=tuple(shards[1]),
        counts=Counts(train=len(train.documents), heldout=len(held.documents), **counts),
        tokens=tokens,
        trained_tokens=int(frequency.sum()),
        heldout_trained_tokens=sum(int(trained.sum()) for _, trained in held.documents),
        efficiency=round(tokens / (sequences * sequence_length), 6),
        unigram_entropy=unigram_entropy({int(t): int(frequency[t]) for t in np.flatnonzero(frequency)}),
    )
    write_atomically(out / NAME, manifest.to_bytes())
    return manifest


def tokenizer_digest(template: ChatTemplate) -> str:
    """SHA-256 (hex) over tokenizer.json and the chat template of a folder."""
    state = hashlib.sha256((template.folder / "tokenizer.json").read_bytes())
    state.update(b"\0" + template.source.encode())
    return state.hexdigest()


def _encoded(template: ChatTemplate, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Document]]:
    stream = iter(samples)
    while chunk := list(itertools.islice(stream, _CHUNK)):
        yield from zip(chunk, template.encode(chunk), strict=True)


def _ticket(key: bytes, seed: int) -> int:
    digest = hashlib.blake2b(key, digest_size=8, key=b"psyche held out %d" % seed).digest()
    return int.from_bytes(digest, "little")


def _frequency(documents: Sequence[Document], vocabulary: int) -> npt.NDArray[np.int64]:
    trained = [ids[mask] for ids, mask in documents]
    return np.bincount(np.concatenate(trained), minlength=vocabulary).astype(np.int64)


def _write(out: Path, documents: Sequence[Document], length: int, width: int, pad: int) -> list[Shard]:
    """Pack ``documents`` and write the shards. Returns them in order."""
    bins = pack([len(ids) for ids, _ in documents], length)
    per_shard = max(1, SHARD_BYTES // (length * (width + 1)))
    shards = []
    for start in range(0, len(bins), per_shard):
        part = bins[start : start + per_shard]
        tokens = np.full((len(part), length), pad, dtype=f"<u{width}")
        flags = np.zeros((len(part), length), dtype=np.uint8)
        for row, members in enumerate(part):
            at = 0
            for document in members:
                ids, trained = documents[document]
                end = at + len(ids)
                tokens[row, at:end] = ids
                flags[row, at:end] = trained * np.uint8(TRAINED)
                flags[row, at] = FIRST  # and not trained: what precedes it is another document
                at = end
            if at < length:
                flags[row, at] = FIRST
        data = tokens.tobytes() + flags.tobytes()
        name = f"{hashlib.sha256(data).hexdigest()}.bin"
        write_atomically(out / name, data)
        shards.append(Shard(file=name, sequences=len(part)))
    return shards
