"""What fits into memory: the micro-batch, and whether activations are kept or computed again.

The account is that of ``psyche-node plan`` (`planning.memory`), held against the memory that is free on this device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimizer.sharding import local
from psyche_node.planning.errors import PlanError
from psyche_node.planning.memory import SPARE, Attention, Compute, Memory, Work, memory
from psyche_node.planning.shape import ModelShape, shape_of
from psyche_node.training.device import CPU_TOKENS, GPU_TOKENS
from psyche_node.training.options import Options


@dataclass(frozen=True, slots=True)
class Site:
    """What the account needs to know: the ranks, the precision, and how attention is done."""

    data_parallel: int
    tensor_parallel: int
    only_bf16: bool
    attention: Attention
    lookahead: bool = True
    z_loss: bool = False


@dataclass(frozen=True, slots=True)
class Fit:
    """Sequences of a micro-batch, whether activations are computed again, and a line for each choice."""

    micro_batch: int
    checkpointing: bool
    reasons: list[str]


def choose_fit(
    model: Any,
    device: torch.device,
    length: int,
    micro_batch: int,
    options: Options,
    site: Site,
    free: int,
) -> Fit:
    """Choose for sequences of ``length`` tokens. ``micro_batch``: as asked, or 0.

    ``free``: bytes that can be had, those of the model included (`free_memory`), on the rank that has least.

    On a CPU, more tokens at a time than the caches hold are no faster, so that memory decides on checkpointing only.
    """
    most = max(1, (GPU_TOKENS if device.type == "cuda" else CPU_TOKENS) // length)
    sizes = [micro_batch] if micro_batch else [most] if device.type == "cpu" else _halves(most)
    ways = {"auto": [False, True], "on": [True], "off": [False]}[options.activation_checkpointing]
    can = bool(getattr(model, "supports_gradient_checkpointing", False))
    if not can:
        ways = [False]
    shape = _shape(model)
    if shape is None:
        size = micro_batch or (most if device.type == "cpu" else 1)
        why = "as asked" if micro_batch else "what one of this kind of model needs is not known"
        return Fit(size, ways[0], [f"micro-batch {size}: {why}", _words(ways[0], options, can)])
    # Computing activations again costs a third more time, a small micro-batch of such sequences next to nothing.
    tried = [
        (size, again, memory(shape, _work(device, length, size, again, site), outside=0))
        for again in ways
        for size in sizes
    ]
    size, again, need = next((one for one in tried if one[2].total <= free * (1 - SPARE)), tried[-1])
    if micro_batch:
        why = "as asked"
    elif device.type == "cpu":
        why = f"about {CPU_TOKENS} tokens per forward pass on a cpu device"
    else:
        why = "the largest that fits" if size < most else f"{GPU_TOKENS} tokens are enough to fill a GPU"
    return Fit(size, again, [f"micro-batch {size}: {why}; {_account(need, free)}", _words(again, options, can)])


def free_memory(model: nn.Module, device: torch.device, sharers: int = 1) -> int:
    """Bytes that can be had on the device, and what this process has of it already.

    ``sharers``: processes of this node that are on the host, and share what it has on a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        held = sum(local(p).numel() * p.element_size() for p in model.parameters())
        return int(fields["MemAvailable"].split()[0]) * 1024 // sharers + held
    except (OSError, KeyError, ValueError):
        return 1 << 62  # no Linux: nothing is known, so nothing is decided by it


def checkpoint_activations(model: Any) -> None:
    """Let decoder layers compute their activations again in the backward pass."""
    # The older name is deprecated, the newer one is not in the first versions of transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _account(need: Memory, free: int) -> str:
    account = f"about {need.total / 2**30:.3g} GiB of {free / 2**30:.3g} GiB"
    fits = need.total <= free * (1 - SPARE)
    return account if fits else f"{account}, which is too much by this account: memory may run out"


def _words(again: bool, options: Options, can: bool) -> str:
    asked = options.activation_checkpointing != "auto"
    if not can:
        return "activations are kept: this model cannot compute them again"
    if again:
        return "activations are computed again going backward: " + ("as asked" if asked else "kept, they do not fit")
    return "activations are kept: " + ("as asked" if asked else "nothing says that they do not fit")


def _halves(most: int) -> list[int]:
    sizes = [most]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def _work(device: torch.device, length: int, size: int, checkpointing: bool, site: Site) -> Work:
    several = site.data_parallel > 1
    on_gpu: Compute = "bf16" if site.only_bf16 or several else "autocast"
    return Work(
        sequence=length,
        micro_batch=size,
        data_parallel=site.data_parallel,
        tensor_parallel=site.tensor_parallel,
        compute=on_gpu if device.type == "cuda" or site.only_bf16 else "fp32",
        checkpointing=checkpointing,
        lookahead=site.lookahead,
        weight_bytes=2 if site.only_bf16 else 4,
        masters=not site.only_bf16,
        attention=site.attention,
        z_loss=site.z_loss,
    )


def _shape(model: Any) -> ModelShape | None:
    tensors = tuple((name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad)
    try:
        return shape_of(type(model).__name__, model.config.to_dict(), tensors)
    except PlanError:
        return None
