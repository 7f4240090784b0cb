"""GPUs: memory, speed, and how much of the speed a training step gets.

Speeds are dense bf16 with fp32 accumulation, without sparsity. Memory is what a driver leaves, not what is printed on
the box.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from psyche_node.planning.errors import PlanError

MFU: Final = 0.35
"""Share of the peak that a step gets, counted as model FLOPs. The Llama 3 report has 0.38 to 0.43 on 16,000 H100
(arXiv 2407.21783, table 4); the decentralized run of Hermes 4.3 comes to 0.16 of an H100 (24 nodes, 144,000 tokens/s).
`benchmarks/train.py` measures it."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind. ``memory`` in bytes, ``flops`` per second in bf16."""

    name: str
    memory: int
    flops: float
    source: str


def _gpu(name: str, gib: float, teraflops: float, source: str) -> Gpu:
    return Gpu(name, int(gib * 2**30), teraflops * 1e12, source)


GPUS: Final = {
    gpu.name: gpu
    for gpu in (
        _gpu("B200", 178.3, 2250, "NVIDIA HGX B200 data sheet"),
        _gpu("H200", 139.8, 989.4, "NVIDIA H200 SXM data sheet"),
        _gpu("H100", 79.1, 989.4, "NVIDIA H100 SXM data sheet"),
        _gpu("A100", 79.1, 312, "NVIDIA A100 80GB SXM data sheet"),
        _gpu("A100-40", 39.4, 312, "NVIDIA A100 40GB SXM data sheet"),
        _gpu("L40S", 44.4, 362, "NVIDIA L40S data sheet"),
        _gpu("RTX5090", 31.4, 209.5, "NVIDIA RTX Blackwell architecture paper"),
        _gpu("RTX4090", 23.5, 165.2, "NVIDIA Ada architecture paper"),
        _gpu("RTX3090", 23.6, 71, "NVIDIA Ampere GA102 architecture paper"),
        _gpu("MI300X", 191.5, 1307.4, "AMD Instinct MI300X data sheet"),
    )
}


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """Read ``8xH200``, or ``H200`` for one. Raises PlanError."""
    found = re.fullmatch(r"(?:(\d+)x)?([\w.-]+)", text.strip())
    known = {name.lower(): gpu for name, gpu in GPUS.items()}
    gpu = known.get(found.group(2).lower()) if found else None
    count = int(found.group(1) or 1) if found else 0
    if gpu is None or not 1 <= count <= 4096:
        raise PlanError(f"--gpus {text!r} is not COUNTxKIND, such as 8xH200; kinds: {', '.join(GPUS)}")
    return count, gpu
