"""Gradients and updates drawn at random, and tensors as bytes."""

from collections.abc import Callable

import numpy as np
import torch

from optimizer import DisTrO, Update, encode

Named = list[tuple[str, torch.nn.Parameter]]
Make = Callable[..., Named]
RUN = bytes(range(32))


def bits(tensors: Named) -> list[bytes]:
    return [
        t.detach().view(torch.int16 if t.element_size() == 2 else torch.int32).numpy().tobytes() for _, t in tensors
    ]


def give_gradients(named: Named, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, p in named:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def updates(optimizer: DisTrO, members: int, round: int = 0, seed: int = 0) -> list[bytes]:
    """Random updates that fit the optimizer."""
    layout, made = optimizer.layout, []
    for member in range(members):
        generator = np.random.default_rng([seed, round, member])
        keys = generator.random((layout.blocks, 4096))
        indices = np.sort(np.argsort(keys, axis=1)[:, : layout.topk], axis=1).astype(np.uint16)
        update = Update(RUN, round, member, indices, generator.random(indices.shape) < 0.5)
        made.append(encode(update, layout))
    return made
