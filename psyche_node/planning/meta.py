"""A model's tensors from its config, on the meta device: exact for any architecture, without a byte of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from psyche_node.planning.errors import PlanError
from psyche_node.planning.shape import Shapes


def tensors_of(name: str, config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the trained parameters. Raises PlanError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        values = {key: value for key, value in config.items() if key != "model_type"}
        made = AutoConfig.for_model(str(config.get("model_type")), **values)
        with torch.device("meta"):
            model = cast(Any, AutoModelForCausalLM).from_config(made)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise PlanError(f"{name}: no causal language model can be built from its config: {error}") from error
    return tuple((each, tuple(p.shape)) for each, p in model.named_parameters() if p.requires_grad)
