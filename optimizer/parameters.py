"""Which parameters an optimizer trains: groups as torch takes them, without frozen and repeated ones."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from optimizer.rates import rate
from optimizer.settings import Settings

Named = dict[str, Tensor]
_FOR_ALL = {field.name for field in fields(Settings)}


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
        if "params" not in group:
            raise ValueError(f'a parameter group has no "params", only {", ".join(map(repr, group))}')
        if common := sorted(_FOR_ALL & group.keys()):
            raise ValueError(f"{common[0]} is the same for all parameter groups; pass it to DisTrO itself")
        kept = []
        for pair in group["params"]:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
                raise ValueError("parameters need names: pass model.named_parameters(), not model.parameters()")
            name, parameter = pair
            if not isinstance(parameter, Tensor):
                raise ValueError(f"{name} is of type {type(parameter).__name__}; a parameter must be a tensor")
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


def named_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of a torch optimizer in the form that `trained_groups` returns and torch makes them of."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        | {"params": list(zip(group["param_names"], group["params"], strict=True))}
        for group in groups
    ]


def check(named: Named, only_bf16: bool = False) -> None:
    """Raise ValueError, naming the parameter, unless all can be trained."""
    if not named:
        raise ValueError("no parameter requires a gradient; pass model.named_parameters() of a model to train")
    if not float(torch.full((), 1e-39, dtype=torch.float32, device="cpu") * 0.5):
        raise ValueError(
            "subnormal numbers are flushed to zero, on other members they may not be; turn it off with "
            "torch.set_flush_denormal(False)"
        )
    device = next(iter(named.values())).device
    for name, parameter in named.items():
        if is_lazy(parameter) or parameter.is_meta:
            raise ValueError(f"{name} has no values yet; materialize and load the model before making the optimizer")
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {parameter.dtype}; parameters must be float32, bfloat16 or float16")
        if only_bf16 and parameter.dtype != torch.bfloat16:
            raise ValueError(f"{name} is {parameter.dtype}; stochastic rounding is for bfloat16 parameters only")
        if not parameter.is_contiguous():
            raise ValueError(f"{name} is not contiguous in memory; store it with .contiguous()")
        if parameter.device != device:
            raise ValueError(f"{name} is on {parameter.device}, others on {device}; put all of them on one device")
