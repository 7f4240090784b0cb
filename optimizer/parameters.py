"""Which parameters an optimizer trains: groups as torch takes them, without frozen and repeated ones."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from optimizer.rates import rate

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
        settings["lr"] = rate(settings["lr"])
        settings["weight_decay"] = rate(settings["weight_decay"], "weight decay")
        if kept:
            made.append({**settings, "params": kept})
    return made


def check(named: Named, only_bf16: bool = False) -> None:
    """Raise ValueError, naming the parameter, unless all can be trained."""
    if not named:
        raise ValueError("no parameter requires a gradient; pass model.named_parameters() of a model to train")
    if not float(torch.full((), 1e-39, dtype=torch.float32) * 0.5):
        raise ValueError(
            "subnormal numbers are flushed to zero, on other members they may not be; turn it off with "
            "torch.set_flush_denormal(False)"
        )
    device = next(iter(named.values())).device
    for name, parameter in named.items():
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {parameter.dtype}; parameters must be float32, bfloat16 or float16")
        if only_bf16 and parameter.dtype != torch.bfloat16:
            raise ValueError(f"{name} is {parameter.dtype}; stochastic rounding is for bfloat16 parameters only")
        if not parameter.is_contiguous():
            raise ValueError(f"{name} is not contiguous in memory; store it with .contiguous()")
        if parameter.device != device:
            raise ValueError(f"{name} is on {parameter.device}, others on {device}; put all of them on one device")
