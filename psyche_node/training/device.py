"""The choices made once, each with a reason that is printed: device, precision, threads, micro-batch."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

import torch

from psyche_node.training.errors import DeviceError
from psyche_node.units import counted

# A forward pass of about this many tokens keeps a core's caches warm; larger ones were no faster.
CPU_TOKENS = 2048
GPU_TOKENS = 32768


@dataclass(slots=True)
class Device:
    """Where and how the model runs."""

    torch: torch.device
    micro_batch: int
    words: str
    reasons: list[str] = field(default_factory=list)

    def compute(self) -> contextlib.AbstractContextManager[object]:
        """The context for forward passes: bf16 on a GPU; on a CPU what the weights are in."""
        if self.torch.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()


def choose_device(name: str, sequence_length: int, micro_batch: int | None, threads: int) -> Device:
    """Return the device called ``name`` ("auto" picks), and set this process's CPU threads if ``threads`` is not 0.

    ``micro_batch``: 0 chooses by the device alone; None leaves it at 1, to be chosen with the model (`fit`).

    Raises:
        DeviceError: there is no such device here.
    """
    reasons = []
    if threads:
        torch.set_num_threads(threads)
        reasons.append(f"{counted(threads, 'CPU thread')}: as asked")
    else:
        reasons.append(f"{counted(torch.get_num_threads(), 'CPU thread')}: PyTorch's choice on {os.cpu_count()} cores")
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
        reasons.append("device cuda: a GPU is there" if cuda else "device cpu: PyTorch sees no CUDA device")
    else:
        reasons.append(f"device {name}: as asked")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device {name!r} is unknown. Use auto, cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {name!r} is not supported. Use auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (not cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(
            f"device {name!r} was asked for, but PyTorch sees {torch.cuda.device_count()} CUDA devices. "
            "Use --device auto, or install a torch build with CUDA"
        )
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device)
        reasons.append("bf16 compute: matrix units are fastest in bf16, and it has the range of fp32")
    else:
        words = f"CPU, {counted(torch.get_num_threads(), 'thread')}"
        reasons.append("compute in the weights' own precision: few CPUs have matrix units for bf16")
    if micro_batch is None:
        micro_batch = 1
    elif micro_batch:
        reasons.append(f"micro-batch {micro_batch}: as asked")
    else:
        tokens = GPU_TOKENS if device.type == "cuda" else CPU_TOKENS
        micro_batch = max(1, tokens // sequence_length)
        reasons.append(f"micro-batch {micro_batch}: about {tokens} tokens per forward pass on a {device.type} device")
    return Device(device, micro_batch, words, reasons)
