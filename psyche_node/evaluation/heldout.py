"""Held-out loss with its standard error: what a session's evaluation computes, sequence by sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from psyche_node.evaluation.errors import EvaluationError
from psyche_node.evaluation.results import Heldout, ratio
from psyche_node.evaluation.steps import Steps
from psyche_node.training.device import Device
from psyche_node.training.forward import LossFunction
from psyche_node.training.reader import DataReader
from psyche_node.training.session import heldout_loss


@dataclass(frozen=True, slots=True)
class _Row:
    tokens: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]
    places: npt.NDArray[np.int64]


def measure_heldout(model: Any, device: Device, data: DataReader, sequences: int | None = None) -> Steps[Heldout]:
    """A step per sequence; ``sequences`` bounds them, spread evenly.

    Raises:
        EvaluationError: the data holds nothing out.
    """
    batch = data.heldout(sequences)
    losses, tokens = list[float](), list[int]()
    loss = LossFunction(model)
    for row in range(len(batch.tokens)):
        one = slice(row, row + 1)
        mean, count = heldout_loss(loss, _Row(batch.tokens[one], batch.trained[one], batch.places[one]), device)
        if count:
            losses.append(mean * count)
            tokens.append(count)
        yield
    if not tokens:
        raise EvaluationError("the data holds out no trained token; prepare it with a `--heldout` fraction above 0")
    measure = ratio(losses, tokens)
    return Heldout(
        loss=measure,
        perplexity=math.exp(measure.value) if measure.value < 700 else None,
        tokens=sum(tokens),
        sequences=len(tokens),
        data_manifest=data.digest.hex(),
    )
