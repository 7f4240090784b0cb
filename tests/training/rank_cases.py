"""What the ranks of a training group do in the tests: each function runs on every rank of a gloo group.

The folder of a tiny model is in the environment (MODEL), one of each kind in subfolders.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import RandomData, terms
from torch import Tensor
from torch.distributed.tensor import DTensor

from optimizer.errors import NonFiniteGradient
from optimizer.sharding import part_of
from psyche_node.training import Session, TrainingError
from psyche_node.training.errors import RankFailed
from psyche_node.training.ranks import Ranks
from psyche_node.training.world import World

RUN = bytes(range(32))
POSITIONS = [3, 1, 4, 15, 9, 26, 5]


def layouts() -> list[int]:
    """How many ranks divide the matrices: none, all, or half of them."""
    size = dist.get_world_size()
    return sorted({1, size, max(1, size // 2)})


def folder(kind: str = "seed_oss") -> Path:
    return Path(os.environ["MODEL"]) / kind


def kinds() -> list[str]:
    return sorted(path.name for path in Path(os.environ["MODEL"]).iterdir())


def ranks() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size())


def session(tensor_parallel: int | None, kind: str = "seed_oss", **changes: Any) -> Session:
    """A session of all ranks, or of this process alone if ``tensor_parallel`` is None."""
    world = World() if tensor_parallel is None else ranks()
    return Session(
        folder(kind),
        RandomData(),
        terms(**changes),
        device="cpu",
        micro_batch=2,
        world=world,
        tensor_parallel=tensor_parallel or 1,
    )


def gradients(one: Session) -> dict[str, Tensor]:
    """The whole gradients of a batch, on every rank, and that their norm is the same."""
    from psyche_node.training.session import accumulate

    world = one._world
    loss = accumulate(one._loss, one._data.batch(POSITIONS, b""), one.device, world)
    world.complete(one.model)
    norm = world.clip(one.model, 0.0)
    named = {name: p.grad for name, p in one.model.named_parameters()}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in named.items() if g is not None}
    return {**whole, "loss": torch.tensor(loss), "norm": torch.tensor(norm)}


def gradients_are_those_of_one_process() -> None:
    for kind in kinds():
        expected = gradients(session(None, kind))
        for tensor_parallel in layouts():
            found = gradients(session(tensor_parallel, kind))
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                scale = float(gradient.abs().max())
                torch.testing.assert_close(
                    found[name], gradient, rtol=1e-4, atol=2e-5 * scale, msg=lambda m, n=name: f"{kind} {n}: {m}"
                )
