"""Held-out loss with its standard error: what a session's evaluation computes, sequence by sequence."""

from __future__ import annotations

from typing import Any

from psyche_node.data import PackedDataset
from psyche_node.evaluation.errors import EvaluationError
from psyche_node.evaluation.results import Heldout, perplexity, ratio
from psyche_node.evaluation.steps import Steps
from psyche_node.training.device import Device
from psyche_node.training.forward import LossFunction
from psyche_node.training.session import heldout_loss


def measure_heldout(model: Any, device: Device, data: PackedDataset, sequences: int | None = None) -> Steps[Heldout]:
    """A step per sequence, read when its turn comes; ``sequences`` bounds them, spread evenly.

    Raises:
        EvaluationError: the data holds nothing out.
    """
    losses, tokens = list[float](), list[int]()
    loss = LossFunction(model)
    for row in data.heldout_rows(sequences):
        mean, count = heldout_loss(loss, row, device)
        if count:
            losses.append(mean * count)
            tokens.append(count)
        yield
    if not tokens:
        raise EvaluationError("the data holds out no trained token; prepare it with a `--heldout` fraction above 0")
    measure = ratio(losses, tokens)
    found = perplexity(measure)
    return Heldout(
        loss=measure,
        perplexity=None if found is None else found.value,
        perplexity_stderr=None if found is None else found.stderr,
        tokens=sum(tokens),
        sequences=len(tokens),
        data_manifest=data.digest.hex(),
    )
