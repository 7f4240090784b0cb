"""What tensors of a checkpoint are called in a model, by transformers' own rules.

A family's checkpoints may use other names than its modules, or keep apart what a module holds as one tensor (the
experts of a mixture). transformers ships rules for that, which are asked here, on a model of the same config that has
no memory: so it does not matter how the model that is to be filled was divided.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from psyche_node.training.errors import ModelError

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Conversion:
    """Tensors of a checkpoint that together make one or more of the model's, the first of which is ``target``."""

    target: str
    rule: Any
    sources: list[tuple[str, str]] = field(default_factory=list)
    """(name in the checkpoint, the rule's pattern)"""

    def made(self, read: Callable[[str], Tensor], model: Any) -> dict[str, Tensor]:
        """Tensors of the model by name, whole. Raises ModelError."""
        rule = copy.deepcopy(self.rule)
        for name, pattern in self.sources:
            rule.add_tensor(self.target, name, pattern, partial(read, name))
        try:
            made = rule.convert(self.target, model=model, config=model.config)
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            raise ModelError(f"{self.target} cannot be made of {self.sources[0][0]} and others: {error}") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(slots=True)
class Names:
    """``direct`` maps names in the model to names in the checkpoint; ``unexpected`` ones have no place in the model."""

    direct: dict[str, str] = field(default_factory=dict)
    conversions: dict[str, Conversion] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)


def twin(model: nn.Module) -> Any | None:
    """A model of the same config on the meta device; None if ``model`` is none of transformers'.

    FSDP2 derives a class of its own from a model's, by which transformers would not know the family.
    """
    kind = next((c for c in type(model).__mro__ if c.__module__.startswith("transformers.models.")), None)
    if kind is None:
        return None
    with torch.device("meta"):
        return cast(Any, kind)(cast(Any, model).config)


def resolve(like: Any | None, state: Iterable[str], names: Iterable[str]) -> Names:
    """Find the place of each of a checkpoint's ``names`` in a model whose tensors are ``state``; ``like``: its twin."""
    known = dict.fromkeys(state, True)
    if like is None:
        listed = list(names)
        return Names({n: n for n in listed if n in known}, {}, [n for n in listed if n not in known])
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(like)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    rename = cast(Callable[..., tuple[str, str | None]], rename_source_key)
    prefix, ignored, found = like.base_model_prefix, _ignored(like), Names()
    for name in sorted(names, key=cast(Any, dot_natural_key)):
        target, pattern = rename(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if target in known and pattern is not None:
            conversion = found.conversions.setdefault(target, Conversion(target, by_pattern[pattern]))
            conversion.sources.append((name, pattern))
        elif target in known:
            found.direct[target] = name
        elif not ignored(target):
            found.unexpected.append(name)
    return found


Saved = Callable[[str, Tensor], dict[str, Tensor]]
"""What checkpoints hold of one tensor of a model: one or more tensors, by name."""


def saved_by(model: nn.Module, state: Mapping[str, Tensor]) -> Saved:
    """How the family of ``model`` saves its tensors; ``state`` has the same ones on the meta device.

    As the model has them, where transformers has no rules, or none that work on one tensor alone and lead back.
    """
    like = twin(model)
    if like is None:
        return _as_it_is
    from transformers.core_model_loading import revert_weight_conversion

    def saved(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return cast(dict[str, Tensor], cast(Any, revert_weight_conversion)(like, {name: tensor}))

    try:
        names = [made for name, tensor in state.items() for made in saved(name, tensor)]
        found = resolve(like, state, names)
    except Exception as error:  # rules are programs of their own
        log.info("tensors are saved as %s has them: %s", type(model).__name__, error)
        return _as_it_is
    leads_back = found.direct.keys() | found.conversions.keys() == state.keys() and not found.unexpected
    return saved if leads_back and len(names) == len(set(names)) else _as_it_is


def _as_it_is(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name: tensor}


def optional(like: Any | None, name: str) -> bool:
    """Whether transformers does without a tensor of the model in a checkpoint."""
    patterns = getattr(like, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


@torch.no_grad()
def computed_buffers(like: Any) -> dict[str, Tensor]:
    """The buffers that no checkpoint holds, such as the frequencies of rotary embeddings: by name, on the CPU.

    Raises ModelError if transformers leaves one of them without values.
    """
    computed: dict[str, Tensor] = {}
    for path, module in like.named_modules():
        # transformers initialises what is not marked; all but these buffers is.
        module._is_hf_initialized = False
        for parameter in module.parameters(recurse=False):
            cast(Any, parameter)._is_hf_initialized = True
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                buffer._is_hf_initialized = True
                continue
            blank = torch.empty_like(buffer, device="cpu")
            if blank.is_floating_point():
                blank.fill_(torch.nan)
            module._buffers[name] = blank
            computed[f"{path}.{name}".removeprefix(".")] = blank
    like.initialize_weights()
    # Rules may put a new tensor in the place of a blank one.
    made = {name: like.get_buffer(name) for name in computed}
    for name, buffer in made.items():
        if buffer.is_floating_point() and bool(torch.isnan(buffer).any()):
            raise ModelError(f"transformers does not say what is in {name} of {type(like).__name__} models")
    return made


def _ignored(like: Any) -> Callable[[str], bool]:
    """Whether a name of a checkpoint is one that transformers passes over, too."""
    patterns = [*(like._keys_to_ignore_on_load_unexpected or ())]
    # Once they were saved; now they are computed.
    patterns += [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$"]
    return lambda name: any(re.search(pattern, name) for pattern in patterns)
