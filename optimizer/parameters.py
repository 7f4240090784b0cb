"""Which parameters an optimizer trains: groups as torch takes them, without frozen and repeated ones."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Named = dict[str, Tensor]


def trained_groups(
    parameters: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]], defaults: dict[str, float]
) -> list[dict[str, Any]]:
    """Groups with "params" a list of (name, parameter). Raises ValueError for what is not one, or named twice."""
    given = list(parameters)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    seen: set[int] = set()
    names: set[str] = set()
    made: list[dict[str, Any]] = []
    for group in groups:
        if not isinstance(group, dict):
            raise ValueError("parameters are (name, parameter) pairs, or dicts with such pairs; do not mix them")
        kept = []
        for pair in group["params"]:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
                raise ValueError("parameters need names: pass model.named_parameters(), not model.parameters()")
            name, parameter = pair
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            if name in names:
                raise ValueError(f"two different parameters are called {name}; every parameter needs its own name")
            seen.add(id(parameter))
            names.add(name)
            kept.append((name, parameter))
        settings = {**defaults, **{key: value for key, value in group.items() if key != "params"}}
        for key in ("lr", "weight_decay"):
            if not (settings[key] >= 0 and math.isfinite(settings[key])):
                raise ValueError(f"{key} is {settings[key]}; it must be finite and not negative")
        if kept:
            made.append({**settings, "params": kept})
    return made


def check(named: Named) -> None:
    """Raise ValueError, naming the parameter, unless all can be trained."""
    if not named:
        raise ValueError("no parameter requires a gradient; pass model.named_parameters() of a model to train")
    device = next(iter(named.values())).device
    for name, parameter in named.items():
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {parameter.dtype}; parameters must be float32, bfloat16 or float16")
        if not parameter.is_contiguous():
            raise ValueError(f"{name} is not contiguous in memory; store it with .contiguous()")
        if parameter.device != device:
            raise ValueError(f"{name} is on {parameter.device}, others on {device}; put all of them on one device")
