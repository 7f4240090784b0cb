"""The manifest of a prepared data folder: what the shards are, and what went into them.

Its SHA-256 identifies the data; it is in the run's terms on chain, and a node whose folder has another does not join.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Context, Decimal
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coordinator.wording import problems
from psyche_node.data.errors import DataError, DataMismatch
from psyche_node.folder_files import MANIFEST, MODEL_CONFIG

FORMAT = 4
MAX_BYTES = 64 * 1024 * 1024
MAX_LENGTH = 1 << 24
"""Tokens of the longest sequence."""
SHARD_NAME = re.compile(r"^[0-9a-f]{64}\.bin$")


@dataclass(frozen=True, slots=True)
class Form:
    """Of a shard: ``length`` tokens per sequence, ``width`` bytes per token; ``pad`` fills the ends of sequences."""

    length: int
    width: int
    pad: int


class Shard(BaseModel):
    """One file of packed sequences."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(pattern=SHARD_NAME)
    """Its name: the SHA-256 of its bytes."""
    sequences: int = Field(gt=0)


class Counts(BaseModel):
    """What became of every sample of a file; the first five sum to ``samples``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: int = Field(default=0, ge=0)
    """Samples packed for training."""
    heldout: int = Field(default=0, ge=0)
    """Samples packed for evaluation, never trained on."""
    too_long: int = Field(default=0, ge=0)
    """Samples dropped because they do not fit into one sequence. Use a longer sequence, or cut them."""
    untrained: int = Field(default=0, ge=0)
    """Samples dropped because none of their tokens would be trained."""
    bad: int = Field(default=0, ge=0)
    """Records passed over because they are no samples, or none that the chat template takes."""
    samples: int = Field(default=0, ge=0)
    cut: int = Field(default=0, ge=0)
    """Of the packed samples, those that lost their end to fit into one sequence."""
    closed: int = Field(default=0, ge=0)
    """Of the packed samples, those of which only the end is trained, because their reasoning overran the budget."""

    @classmethod
    def total(cls, parts: Iterable[Counts]) -> Counts:
        total: Counter[str] = Counter()
        for part in parts:
            total.update(part.model_dump())
        return cls(**total)


class Source(BaseModel):
    """One file that samples were read from. Its name is not here: the same files make the same data anywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the file as it is read: of a compressed one, its compressed bytes."""
    counts: Counts


class Manifest(BaseModel):
    """A prepared data folder. ``digest`` is its identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    sources: tuple[Source, ...] = Field(min_length=1)
    """The files that it was made from, in the order in which they were read."""
    tokenizer: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 over tokenizer.json and the chat template."""
    vocabulary: int = Field(gt=0, le=1 << 32)
    pad: int = Field(ge=0)
    """The token that fills the ends of sequences. It is never trained."""
    sequence_length: int = Field(ge=2, le=MAX_LENGTH)
    token_bytes: int
    """2 or 4: the width of a token in the shards, little-endian."""
    seed: int
    """Which samples are held out."""
    heldout_fraction: float = Field(ge=0, lt=1)
    too_long: Literal["drop", "cut"]
    """What became of samples that do not fit into one sequence."""
    length_control: int = Field(default=0, ge=0)
    """Tokens of reasoning after which it was ended; 0: it was left as it is."""
    train: tuple[Shard, ...]
    """Files of training sequences, which lie in order of attention cost over all of them."""
    heldout: tuple[Shard, ...]
    tokens: int = Field(ge=0)
    """Tokens of the training sequences without their padding."""
    trained_tokens: int = Field(ge=0)
    """Of these, the ones that have a loss: what the assistant says, and its end tokens."""
    heldout_trained_tokens: int = Field(ge=0)
    efficiency: float = Field(ge=0, le=1)
    """``tokens`` over all places of the training sequences."""
    unigram_entropy: float = Field(ge=0)
    """Entropy in nats of one trained token drawn alone: the loss of a model that knows only how frequent each is."""

    @property
    def form(self) -> Form:
        return Form(self.sequence_length, self.token_bytes, self.pad)

    @property
    def counts(self) -> Counts:
        """Of all sources together."""
        return Counts.total(source.counts for source in self.sources)

    @property
    def sequences(self) -> int:
        return sum(shard.sequences for shard in self.train)

    @property
    def heldout_sequences(self) -> int:
        return sum(shard.sequences for shard in self.heldout)

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()

    @property
    def digest(self) -> bytes:
        """SHA-256 of the manifest's bytes (32 bytes)."""
        return hashlib.sha256(self.to_bytes()).digest()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises DataError if there is none, and DataMismatch if it is not in the one form that is written."""
        path = folder / MANIFEST
        try:
            if path.stat().st_size > MAX_BYTES:
                raise DataMismatch(f"{path} is larger than {MAX_BYTES} bytes. Prepare the data again")
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(_not_read(folder, path, error)) from error
        return cls.parse(raw, str(path))

    @classmethod
    def parse(cls, raw: bytes, where: str) -> Manifest:
        """Raises DataMismatch if ``raw`` is not in the one form that is written; ``where`` is for the message."""
        try:
            values = json.loads(raw)
            if isinstance(values, dict) and isinstance(values.get("format"), int) and values["format"] != FORMAT:
                raise DataMismatch(
                    f"{where} has format {values['format']}, and this version reads format {FORMAT}. "
                    "Prepare the data again, or use the version that wrote it"
                )
            manifest = cls.model_validate_json(raw)
        except ValidationError as error:
            place, words = problems(error, cls)[0]
            raise DataMismatch(
                f"{where} is not a manifest: {place or 'the file'}: {words}. Prepare the data again"
            ) from error
        except (ValueError, RecursionError) as error:  # what JSON raises
            raise DataMismatch(f"{where} is not a manifest: {error}. Prepare the data again") from error
        if manifest.to_bytes() != raw or manifest.token_bytes not in (2, 4):
            raise DataMismatch(f"{where} was edited. Prepare the data again")
        return manifest


def unigram_entropy(counts: Mapping[int, int]) -> float:
    """Return the entropy in nats of a token drawn from ``counts`` (token to occurrences), rounded to 9 decimals.

    ``ln N - (1/N) * sum(c * ln c)``, in decimal arithmetic, whose logarithm is correctly rounded: the figure is part of
    the manifest, and must be the same on every host, whatever its mathematics library.
    """
    context = Context(prec=34)
    multiplicity: dict[int, int] = {}
    for count in counts.values():
        if count > 0:
            multiplicity[count] = multiplicity.get(count, 0) + 1
    total = sum(count * times for count, times in multiplicity.items())
    if total == 0:
        return 0.0
    weighted = Decimal(0)
    for count in sorted(multiplicity):
        term = context.multiply(Decimal(count * multiplicity[count]), Decimal(count).ln(context))
        weighted = context.add(weighted, term)
    entropy = context.subtract(Decimal(total).ln(context), context.divide(weighted, Decimal(total)))
    return max(0.0, float(round(entropy, 9)))


def _not_read(folder: Path, path: Path, error: OSError) -> str:
    """What is wrong with a folder whose manifest cannot be read."""
    if folder.is_file():
        return (
            f"{folder} is a file, and no folder of prepared data. Prepare it first: "
            f"psyche-node data prepare {folder} --tokenizer FOLDER --out FOLDER"
        )
    if not folder.exists():
        return f"there is no folder {folder}. Name one with prepared data; `psyche-node data prepare` makes it"
    if not path.exists():
        kind = "is a model's folder" if (folder / MODEL_CONFIG).is_file() else "has no prepared data in it"
        return f"{folder} {kind}: there is no {MANIFEST}. Name a folder that `psyche-node data prepare` has made"
    return f"{path} cannot be read: {error.strerror}. Let this user read it, or prepare the data again"
