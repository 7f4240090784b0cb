"""A model's shape: its tensors, and the sizes from which activations follow. Needs a config only, and no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from psyche_node.folder_files import config_file, hub_hint
from psyche_node.planning.context import context_window
from psyche_node.planning.errors import PlanError
from psyche_node.planning.sizes import bad_size, config_values

SHIPPED: Final = Path(__file__).resolve().parent / "models"
_HEAD_NORMS: Final = frozenset({"qwen3"})
_EXACT_NORMS: Final = frozenset({"gemma2"})
_KNOWN: Final = frozenset({"llama", "seed_oss", "qwen3", "qwen2", "mistral", "granite", "gemma2"})
_CAP: Final = "final_logit_softcapping"
CHANGES_LOGITS: Final = (_CAP, "logit_scale", "logits_scaling")
"""Keys of configs whose models do more for logits than a product, where they are neither null nor 1."""

Loss = Literal["chunked", "full", "capped"]
"""How the trainer makes the loss: in chunks of logits, from all of them, or from all that were capped."""

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder: RMS norms, grouped-query attention, gated feed-forward.

    ``tensors`` are the trained parameters, tied ones once. ``head_norms``: queries and keys are normalized per head.
    ``assumed``: its kind is not one whose activations were checked; they are counted as Llama's. ``norms``: of a layer.
    ``exact_norms``: they multiply by their weights in fp32. ``capped_scores``: attention's logits go through a tanh.
    ``masks``: kinds of attention, such as full and sliding, each of which has a mask. ``context``: tokens of a document
    that it is made for, None if its config does not say.
    """

    name: str
    kind: str
    tensors: Shapes
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    head_norms: bool
    assumed: bool
    loss: Loss = "chunked"
    norms: int = 2
    exact_norms: bool = False
    capped_scores: bool = False
    masks: int = 1
    context: int | None = None

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        table = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return (self.parameters - table - self.hidden) // self.layers

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of forward and backward, for documents of ``length`` tokens.

        Six for each parameter that is multiplied, and causal attention's twelve for each pair of query and key value
        (Chowdhery et al. 2022, PaLM, appendix B), of which half are masked.
        """
        multiplied = self.layers * self.layer_parameters + self.vocabulary * self.hidden
        return 6.0 * multiplied + 6.0 * self.layers * self.heads * self.head_dim * length


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's config as its file has it: without what transformers adds for its kind of model."""

    name: str
    file: Path
    values: Mapping[str, Any]


def config_of(source: str) -> ModelConfig:
    """The config of a folder with a config.json, a JSON file, or a shipped model.

    Raises PlanError for none, and for one that is not a dense decoder's.
    """
    path = Path(source)
    shipped = {file.stem.lower(): file for file in SHIPPED.glob("*.json")}
    file = config_file(path)
    if not file.is_file():
        if source.lower() not in shipped:
            names = ", ".join(sorted(file.stem for file in shipped.values()))
            wrong = f"--model {source}: no folder with a config.json, no JSON file, and none of {names}"
            raise PlanError(wrong + hub_hint(source))
        file = shipped[source.lower()]
    try:
        config = config_values(file)
    except (OSError, ValueError) as error:
        raise PlanError(str(error)) from error
    _check_dense(str(file), config)
    return ModelConfig(path.resolve().name if path.is_dir() else file.stem, file, config)


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a model is a mixture of experts, by its config."""
    return any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))


def _check_dense(name: str, config: Mapping[str, Any]) -> None:
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    lacking = [key for key in needed if config.get(key) is None]
    if lacking or has_experts(config):
        why = "it is a mixture of experts" if has_experts(config) else f"its config has no {', '.join(lacking)}"
        raise PlanError(f"{name} cannot be planned: {why}. Plans are for dense decoders such as Llama, Qwen3, Seed-OSS")
    if (wrong := bad_size(config)) is not None:
        raise PlanError(f"{name}: {wrong}")
    for key in (*needed, "num_key_value_heads"):
        if isinstance(config.get(key), list):
            raise PlanError(f"{name} cannot be planned: its layers differ in {key}. Plans are for layers of one kind")


def shape_of(name: str, config: Mapping[str, Any], tensors: Shapes) -> ModelShape:
    """The shape of a model with these tensors.

    ``config``: of the model as it is built (``to_dict()`` of transformers' object), not of its file, which may leave
    out what its kind of model has by default. Raises PlanError for one that is not a dense decoder's.
    """
    _check_dense(name, config)
    heads, kind = config["num_attention_heads"], str(config.get("model_type"))
    return ModelShape(
        name=name,
        kind=kind,
        tensors=tensors,
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        head_norms=kind in _HEAD_NORMS,
        assumed=kind not in _KNOWN,
        loss=_loss(config, tensors),
        norms=_norms(config, tensors),
        exact_norms=kind in _EXACT_NORMS,
        capped_scores=bool(config.get("attn_logit_softcapping")),
        masks=len(set(config.get("layer_types") or ("full_attention",))),
        context=context_window(config),
    )


def _norms(config: Mapping[str, Any], tensors: Shapes) -> int:
    """Norms over the hidden size in the first layer."""
    found = (name for name, shape in tensors if shape == (config["hidden_size"],) and ".layers.0." in name)
    return sum("norm" in name for name in found) or 2


def _loss(config: Mapping[str, Any], tensors: Shapes) -> Loss:
    if config.get(_CAP):
        return "capped"
    changed = any(config.get(key) not in (None, 1.0) for key in CHANGES_LOGITS)
    return "full" if changed or any(name == "lm_head.bias" for name, _ in tensors) else "chunked"
