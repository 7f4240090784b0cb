"""The manifest of a prepared data folder: what the shards are, and what went into them.

Its SHA-256 identifies the data; it is in the run's terms on chain, and a node whose folder has another does not join.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from decimal import Context, Decimal
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from psyche_node.data.errors import DataError, DataMismatch

NAME = "manifest.json"
FORMAT = 1
MAX_BYTES = 64 * 1024 * 1024


class Shard(BaseModel):
    """One file of packed sequences."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(pattern=r"^[0-9a-f]{64}\.bin$")
    """Its name: the SHA-256 of its bytes."""
    sequences: int = Field(gt=0)


class Counts(BaseModel):
    """What became of every sample of the data file; the first four sum to ``samples``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: int = Field(ge=0)
    """Samples packed for training."""
    heldout: int = Field(ge=0)
    """Samples packed for evaluation, never trained on."""
    too_long: int = Field(ge=0)
    """Samples dropped because they do not fit into one sequence. Use a longer sequence, or cut them."""
    untrained: int = Field(ge=0)
    """Samples dropped because none of their tokens would be trained."""
    samples: int = Field(ge=0)
    cut: int = Field(ge=0)
    """Of the packed samples, those that lost their end to fit into one sequence."""


class Manifest(BaseModel):
    """A prepared data folder. ``digest`` is its identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    source: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the data file."""
    tokenizer: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 over tokenizer.json and the chat template."""
    vocabulary: int = Field(gt=0, le=1 << 32)
    pad: int = Field(ge=0)
    """The token that fills the ends of sequences. It is never trained."""
    sequence_length: int = Field(ge=2, le=1 << 24)
    token_bytes: int
    """2 or 4: the width of a token in the shards, little-endian."""
    train: tuple[Shard, ...]
    heldout: tuple[Shard, ...]
    counts: Counts
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
        path = folder / NAME
        try:
            if path.stat().st_size > MAX_BYTES:
                raise DataMismatch(f"{path} is larger than {MAX_BYTES} bytes. Prepare the data again")
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror}. Prepare the data into this folder first"
            ) from error
        try:
            manifest = cls.model_validate_json(raw)
        except ValidationError as error:
            raise DataMismatch(f"{path} is not a manifest: {error}. Prepare the data again") from error
        if manifest.to_bytes() != raw or manifest.format != FORMAT or manifest.token_bytes not in (2, 4):
            raise DataMismatch(f"{path} was edited, or written by another version. Prepare the data again")
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
