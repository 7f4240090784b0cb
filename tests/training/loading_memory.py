"""Run by a test in a process of its own: the peak memory of loading a folder, beside the model itself.

Arguments: a small folder, the folder to measure, and how many ranks to be one of. Prints [bytes beside the model, bytes
of the weights held here]. What is measured is the peak of all resident pages, those of mapped files included.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from psyche_node.training.model import build_model
from psyche_node.training.weights import load_into


def resident(what: str) -> int:
    """VmRSS, or VmHWM for its peak, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[what].split()[0]) * 1024


def as_one_of(ranks: int) -> Any:
    """The others need not be there: loading asks nothing of them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # type: ignore[import-untyped]

    dist.init_process_group("fake", rank=1, world_size=ranks, store=FakeStore())
    return init_device_mesh("cpu", (ranks,))


def main(small: str, large: str, ranks: int) -> None:
    mesh = as_one_of(ranks) if ranks > 1 else None
    held = before = 0
    for folder in (small, large):  # the small one first: code and caches are not what is measured
        model, _ = build_model(Path(folder))
        if mesh is not None:
            for module in [*model.model.layers, model]:
                fully_shard(module, mesh=mesh)
        before = resident("VmRSS")
        load_into(model, Path(folder), torch.device("cpu"))
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        held = sum(4 * part.numel() for part in parts)
    print(json.dumps([resident("VmHWM") - before - held, held]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
