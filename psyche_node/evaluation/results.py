"""Figures with their standard errors, and the one way to write them down, so that their hash means them.

Canonical JSON: keys sorted, no blanks, ASCII, numbers as Python's ``repr`` has them (the shortest that reads back).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from coordinator.wording import problems
from psyche_node.evaluation.errors import EvaluationError

_LARGEST_LOSS = 700.0
"""exp() of little more is no finite number."""


class Part(BaseModel):
    """Base of the results: immutable, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Measure(Part):
    """A figure over samples."""

    value: float
    """The mean."""
    stderr: float | None
    """Standard error of the mean; null for a single sample."""


class TaskResult(Part):
    """One task with one setting of the reasoning switch."""

    task: str
    """Its name."""
    kind: str
    """multiple_choice, generate_until or loglikelihood."""
    thinking: bool | None
    """Whether the template's reasoning switch was on, or, where it has no switch, whether its prompts begin inside
    reasoning; null where the task has none."""
    unswitched: bool = False
    """Only there if true: the model's template has no switch for reasoning, so that not all that the task asks for was
    measured, but what `thinking` says."""
    samples: int = Field(ge=1)
    """Examples."""
    repeats: int = Field(ge=1)
    """Answers per example."""
    few_shot: int = Field(ge=0)
    """Examples shown before each prompt."""
    truncated: int = Field(ge=0)
    """Prompts of which the beginning did not fit into the model's context."""
    measures: dict[str, Measure]
    """By name: accuracy, accuracy_normalised, exact_match, overlong, unclosed, tokens, loss."""
    task_sha256: str
    """Digest of the task's settings."""
    data_sha256: str
    """Digest of the examples' file."""

    @model_serializer(mode="wrap")
    def _said_where_true(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Results without ``unswitched`` keep the digest that they had before there was such a field."""
        values: dict[str, Any] = serialize(self)
        if not self.unswitched:
            del values["unswitched"]
        return values


class Heldout(Part):
    """The loss on the held-out split of prepared data."""

    loss: Measure
    """Mean over the trained tokens, in nats; the standard error is that over sequences."""
    perplexity: float | None
    """exp(loss); null if that is not finite."""
    perplexity_stderr: float | None = None
    """Its standard error, perplexity times that of the loss (the delta method); null where either is."""
    tokens: int
    """Trained tokens."""
    sequences: int
    """Packed sequences."""
    data_manifest: str
    """SHA-256 of the data's manifest."""


class Results(Part):
    """What an evaluation found. Nothing in it depends on when or how fast it ran."""

    format: Literal[1] = 1
    """Version of this format."""
    model_root: str | None = None
    """Root of the weights of a model folder; null if they were loaded in another precision than fp32."""
    fingerprint: str | None = None
    """64-bit fingerprint (16 hexadecimal digits) of a node's weights: the one that the members of the next round put on
    chain with their updates; null for a model folder."""
    round: int | None = None
    """Rounds of the run that the weights contain; null for a model folder."""
    heldout: Heldout | None = None
    """Held-out loss, if data was given."""
    tasks: list[TaskResult] = []
    """The tasks, in the order they were named."""

    def canonical(self) -> bytes:
        """The bytes that are hashed."""
        values = self.model_dump(mode="json")
        if self.heldout is not None and self.heldout.perplexity_stderr is None:
            # Results from before there was this figure keep the digest that they were recorded with.
            del values["heldout"]["perplexity_stderr"]
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return text.encode()

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical()).digest()


def read_results(path: Path) -> Results:
    """Read a file of results, in any layout of its JSON. Raises EvaluationError."""
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror or error}. Name a file of results") from error
    except ValidationError as error:
        where, words = problems(error, Results)[0]
        raise EvaluationError(
            f"{path} does not hold results of psyche-node eval: {where or 'the file'}: {words}. Name a file that "
            "`psyche-node eval --out` or a node has written"
        ) from error


def mean(values: Sequence[float]) -> Measure:
    """Return the mean of samples and its standard error, s / sqrt(n)."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Measure(value=fmean(values), stderr=error)


def ratio(totals: Sequence[float], weights: Sequence[float]) -> Measure:
    """Return sum(totals) / sum(weights) and its standard error over the pairs (Cochran 1977, section 2.11)."""
    count, weight = len(totals), math.fsum(weights)
    value = math.fsum(totals) / weight
    if count < 2:
        return Measure(value=value, stderr=None)
    squares = math.fsum((total - value * one) ** 2 for total, one in zip(totals, weights, strict=True))
    return Measure(value=value, stderr=math.sqrt(squares * count / (count - 1)) / weight)


def perplexity(loss: Measure) -> Measure | None:
    """Return exp(loss) with its standard error by the delta method, exp(loss) times the loss's; None if not finite."""
    if loss.value >= _LARGEST_LOSS:
        return None
    value = math.exp(loss.value)
    return Measure(value=value, stderr=None if loss.stderr is None else value * loss.stderr)
