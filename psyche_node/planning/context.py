"""How long a text a model is made for, by its config: what its positions were trained or extended to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

_NAMES: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "context_length")
"""What kinds of models call it; transformers knows the others by the first of these."""
_MULTIPLIED: Final = frozenset({"linear", "dynamic", "yarn"})
"""Kinds of rope scaling by whose factor a config's length is multiplied; of others, it names the extended length."""
_KINDS_EXTENDED_ALREADY: Final = ("gemma3",)
"""Kinds of models that name the extended length with any scaling."""


def context_window(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens of one document a model sees at most; None if its config does not say.

    ``config``: as its file has it, or ``to_dict()`` of transformers' object. Scaling of rotary positions counts:
    ``linear`` and ``dynamic`` multiply max_position_embeddings by their factor, ``yarn`` the length that the model was
    trained at (Peng et al. 2023, YaRN, section 3.4), which may be named beside it.
    """
    named: int | None = next((config[name] for name in _NAMES if isinstance(config.get(name), int)), None)
    if named is None:
        return None
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if isinstance(scaling, Mapping) and isinstance(scaling.get("full_attention"), Mapping):
        scaling = scaling["full_attention"]  # there is one for each kind of attention
    if not isinstance(scaling, Mapping) or str(config.get("model_type")).startswith(_KINDS_EXTENDED_ALREADY):
        return named
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind not in _MULTIPLIED or not isinstance(factor, int | float) or not math.isfinite(factor):
        return named
    trained = scaling.get("original_max_position_embeddings") if kind == "yarn" else named
    return max(named, int((trained if isinstance(trained, int) else named) * factor))


def beyond(context: int | None, sequence: int) -> str | None:
    """Return what happens where packed sequences are longer than a model's context window; None if they are not."""
    if context is None or sequence <= context:
        return None
    return (
        f"sequences of {sequence:,} tokens, and the model is made for {context:,} (by the length and rope scaling "
        f"that its config.json names). Positions count from the beginning of each document: one of more than "
        f"{context:,} tokens is trained, too, but at positions that the model has never seen: its loss is high there. "
        f"Use sequences of {context:,} tokens, or give its config rope scaling for the length"
    )
