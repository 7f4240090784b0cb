"""What the cases that run on every rank of a gloo group have in common.

The folder of a tiny model is in the environment (MODEL), one of each kind in subfolders.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import RandomData, terms
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_node.training import Session
from psyche_node.training.options import DEFAULTS, Options
from psyche_node.training.ranks import Ranks
from psyche_node.training.world import World

RUN = bytes(range(32))
POSITIONS = [3, 1, 4, 15, 9, 26, 5]


def layouts() -> list[int]:
    """How many ranks divide the matrices: none, all, or half of them."""
    size = dist.get_world_size()
    return sorted({1, size, max(1, size // 2)})


def folder(kind: str = "qwen3") -> Path:
    return Path(os.environ["MODEL"]) / kind


def kinds() -> list[str]:
    """All models for two ranks; for more, which take their time, the one that nothing divides."""
    names = sorted(path.name for path in Path(os.environ["MODEL"]).iterdir())
    return names if dist.get_world_size() == 2 else ["qwen3"]


def ranks() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size())


def session(
    tensor_parallel: int | None,
    kind: str = "qwen3",
    options: Options = DEFAULTS,
    saved: Path | None = None,
    **changes: Any,
) -> Session:
    """A session of all ranks, or of this process alone if ``tensor_parallel`` is None; of a ``saved`` model, if any."""
    world = World() if tensor_parallel is None else ranks()
    return Session(
        saved or folder(kind),
        RandomData(),
        terms(**changes),
        device="cpu",
        micro_batch=2,
        world=world,
        tensor_parallel=tensor_parallel or 1,
        options=options,
    )


def gradients(one: Session) -> dict[str, Tensor]:
    """The whole gradients of a batch, its loss, and the gradients' norm; on every rank."""
    from psyche_node.training.gradient import accumulate

    world = one._world
    loss = accumulate(one._loss, one._data.batch(POSITIONS, b""), one.device, world)
    world.complete(one.model)
    norm = world.clip(one.model, 0.0)
    named = {name: p.grad for name, p in one.model.named_parameters()}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in named.items() if g is not None}
    return {**whole, "loss": torch.tensor(loss), "norm": torch.tensor(norm)}
