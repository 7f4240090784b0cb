"""The sizes in a model's config, looked at before anything is built of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from huggingface_hub.errors import StrictDataclassError

NOT_A_MODEL: Final = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    StrictDataclassError,
)
"""What transformers raises for a config that it cannot build a model from."""
_MOST: Final = 1 << 24
_MOST_OF: Final = {"num_hidden_layers": 4096}
_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_BY_LAYER: Final = frozenset({"intermediate_size", "num_attention_heads", "num_key_value_heads"})


def config_values(file: Path) -> dict[str, Any]:
    """The JSON object in a model's config file. Raises OSError or ValueError, which name it."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"{file} cannot be read as a model's config: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as a model's config: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a model's config: it holds no JSON object")
    return values


def bad_size(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the sizes that a config names, as a sentence with key, value and what it must be; None if
    nothing is. What it leaves out, or sets to null, is not looked at. Some kinds of model have a list, of a size for
    each layer."""
    for key in _SIZES:
        value, most = config.get(key), _MOST_OF.get(key, _MOST)
        sizes = value if isinstance(value, list) and value and key in _BY_LAYER else [value]
        if value is not None and not all(_is_size(size, most) for size in sizes):
            return f"{key} is {json.dumps(value, default=repr)}; it must be a whole number from 1 to {most:,}"
    heads, pairs = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(pairs, int) and heads % pairs:
        return f"num_attention_heads is {heads}; it must be a multiple of num_key_value_heads, which is {pairs}"
    return None


def _is_size(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
