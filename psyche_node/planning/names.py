"""Names in a model's config that are likely mistyped; transformers keeps what it does not know without a word."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, Final

_NEAR: Final = 0.85
"""By difflib's ratio: a slip of a letter is as near, and of published configs' extra keys none is to what they lack."""

_ELSEWHERE: Final = {
    "num_hidden_layers": ("num_layers", "n_layers", "n_layer"),
    "num_attention_heads": ("num_heads", "n_heads", "n_head"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads"),
    "hidden_size": ("d_model", "n_embd", "hidden_dim"),
    "intermediate_size": ("d_ff", "ffn_dim", "n_inner"),
}
"""What other models and libraries call a size that most configs of transformers name so."""
_CALLED: Final = {other: name for name, others in _ELSEWHERE.items() for other in others}


def unknown_kind(kind: object) -> str | None:
    """A sentence on a model_type that transformers does not have, with the nearest; None for one that it has."""
    from transformers import CONFIG_MAPPING

    if kind is None:
        return "it names no model_type"
    if kind in CONFIG_MAPPING:
        return None
    near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING.keys()), 1)
    return f"transformers has no model_type {kind!r}" + (f": did you mean {near[0]}?" if near else "")


def mistyped(values: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each key of a config that its class does not know, and that is nearly one which it knows
    and the config lacks. Published configs have keys that no class knows, so that those alone say nothing."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return []
    config = CONFIG_MAPPING[kind]
    classes = [one for one in config.__mro__ if issubclass(one, PreTrainedConfig)]
    parameters = {name for one in classes for name in inspect.signature(one).parameters}
    known = parameters | {"model_type", *config.attribute_map, *config.attribute_map.values()}
    lacking = sorted(known - values.keys())
    found = []
    for key in sorted(values.keys() - known):
        meant = [name] if (name := _CALLED.get(key)) in lacking else []
        if near := difflib.get_close_matches(key, lacking, 1, _NEAR) or meant:
            found.append(f"{kind} models have no setting {key!r}, and it changes nothing: did you mean {near[0]}?")
    return found
