"""What a run's terms say of a model and a data folder: the values that every node works out and compares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from optimizer.layout import Layout
from psyche_node.data.manifest import Manifest
from psyche_node.training.hashing import model_root
from psyche_node.training.model import build_model
from psyche_node.training.preparing import check_places, check_vocabulary
from psyche_node.training.weights import load_into


def terms_of_data(manifest: Manifest) -> dict[str, Any]:
    """``data_manifest``, ``samples`` and ``sequence_length`` of the terms."""
    return {
        "data_manifest": manifest.digest.hex(),
        "samples": manifest.sequences,
        "sequence_length": manifest.sequence_length,
    }


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model's folder as far as it is known in seconds: all but the weights."""

    folder: Path
    model: Any
    layout: Layout

    @classmethod
    def build(cls, folder: Path, topk: int, only_bf16: bool, data: Manifest | None = None) -> Self:
        """``only_bf16``: weights are kept in bf16, without fp32 masters.

        Raises ModelError: there is no such model, or its vocabulary or its positions are too few for the ``data``.
        """
        model, _ = build_model(folder, torch.bfloat16 if only_bf16 else torch.float32)
        if data is not None:
            check_vocabulary(folder, model, data.vocabulary)
            check_places(folder, model, data.sequence_length)
        shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
        return cls(folder, model, Layout.build(shapes, topk, only_bf16))

    @property
    def terms(self) -> dict[str, Any]:
        """``layout_digest`` and ``update_bytes`` of the terms."""
        return {"layout_digest": self.layout.digest.hex(), "update_bytes": self.layout.update_bytes}

    def root(self) -> dict[str, Any]:
        """``model_root`` of the terms. Reads the weights: minutes for a large model. Raises ModelError."""
        load_into(self.model, self.folder, torch.device("cpu"))
        return {"model_root": model_root(self.model).hex()}


def terms_of_model(folder: Path, topk: int, only_bf16: bool) -> dict[str, Any]:
    """``model_root``, ``layout_digest`` and ``update_bytes`` of the terms. Raises ModelError."""
    built = BuiltModel.build(folder, topk, only_bf16)
    return {**built.root(), **built.terms}
