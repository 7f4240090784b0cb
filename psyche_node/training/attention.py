"""Which of transformers' implementations of attention is used, and why.

Packed documents must not see each other. With `sdpa`, `eager` and `flex` transformers makes a mask for that; `flash`
takes the lengths of the documents, which it finds in one sequence only, so that a micro-batch is laid end to end for it
(`forward`). What is taken has to pass the separation test on the very device.
"""

from __future__ import annotations

from typing import Any

import torch

from psyche_node.training.errors import TrainingError

NAMES = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention", "flash": "flash_attention_2"}
_WHY = {
    "flash": "attention flash: the flash-attn package is installed, and documents of a pack are skipped, not masked",
    "flex": "attention flex: blocks of a pack that lie between documents are skipped; flash-attn is not installed",
    "sdpa": "attention sdpa: it runs on every device",
    "eager": "attention eager: this model has no other",
}


def candidates(model: Any, wanted: str, device: torch.device) -> list[tuple[str, str]]:
    """(name, reason) of the implementations to try, the best one first; one if the operator named it.

    Raises TrainingError if the one that was named is not to be had.
    """
    if wanted != "auto":
        if trouble := _trouble(model, wanted, device):
            raise TrainingError(f"attention {wanted!r} cannot be used: {trouble}. Set attention to auto")
        return [(wanted, f"attention {wanted}: as asked")]
    order = ("flash", "flex", "sdpa", "eager") if device.type == "cuda" else ("sdpa", "eager")
    return [(name, _WHY[name]) for name in order if not _trouble(model, name, device)]


def lays_end_to_end(model: Any) -> bool:
    """Whether a micro-batch has to be one long sequence."""
    return "flash" in str(model.config._attn_implementation)


def _trouble(model: Any, name: str, device: torch.device) -> str | None:
    from transformers.utils.import_utils import is_flash_attn_2_available, is_torch_flex_attn_available

    kind = type(model).__name__
    if name == "flash":
        if device.type != "cuda":
            return "it needs a GPU"
        if not is_flash_attn_2_available():
            return "the flash-attn package is not installed"
        return None if model._supports_flash_attn else f"transformers has none for {kind}"
    if name == "flex":
        if device.type != "cuda":
            return "going backward it needs a GPU"
        if not is_torch_flex_attn_available():
            return "this version of torch has none"
        return None if model._supports_flex_attn else f"transformers has none for {kind}"
    if name == "sdpa" and not model._supports_sdpa:
        return f"transformers has none for {kind}"
    return None
