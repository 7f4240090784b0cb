"""A model's shape from its config, on the meta device: exact for any architecture, without a byte of weights."""

from __future__ import annotations

from typing import Any, cast

import torch

from optimizer.layout import Layout, LayoutError
from psyche_node.planning.errors import PlanError
from psyche_node.planning.names import unknown_kind
from psyche_node.planning.shape import ModelConfig, ModelShape, shape_of
from psyche_node.planning.sizes import NOT_A_MODEL


def shape_from(config: ModelConfig) -> ModelShape:
    """The shape of the model that transformers makes of a config. Raises PlanError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if (unknown := unknown_kind(config.values.get("model_type"))) is not None:
        raise PlanError(f"{config.file}: {unknown}")
    try:
        values = {key: value for key, value in config.values.items() if key != "model_type"}
        made = AutoConfig.for_model(str(config.values.get("model_type")), **values)
        with torch.device("meta"):
            model = cast(Any, AutoModelForCausalLM).from_config(made)
    except NOT_A_MODEL as error:
        why = " ".join(str(error).split())
        raise PlanError(f"{config.file}: no causal language model can be built from this config: {why}") from error
    tensors = tuple((each, tuple(p.shape)) for each, p in model.named_parameters() if p.requires_grad)
    return shape_of(config.name, made.to_dict(), tensors)


def layout_of(config: ModelConfig, shape: ModelShape, topk: int) -> Layout:
    """The layout of the model's updates. Raises PlanError for sizes that no model has."""
    try:
        return Layout.build(shape.tensors, topk)
    except LayoutError as error:
        raise PlanError(f"{config.file}: {error}") from error
