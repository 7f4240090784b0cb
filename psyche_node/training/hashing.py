"""Digests of a model's weights. Both read the fp32 bytes, little-endian, of every parameter in the order of its name.

A tied parameter counts once, under the name that comes first in the model. A sharded model is read tensor by tensor, on
rank 0; every rank learns the digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import torch
from blake3 import blake3

from psyche_node.training.world import ONE_PROCESS, World

PIECE = 4 * 1024 * 1024
"""Bytes of a piece of the model root; peers serve checkpoints in pieces of this size."""


def model_root(model: torch.nn.Module, world: World = ONE_PROCESS) -> bytes:
    """Return the 32-byte root that names a model's weights.

    BLAKE3 of the description (names and shapes, as JSON) followed by the BLAKE3 of each 4 MiB piece of the weights, so
    that a piece can be checked alone against the list.
    """
    names, pieces = [], []
    buffer = bytearray()
    for name, data in _weights(model, world):
        names.append([name, list(data.shape)])
        buffer += data.reshape(-1).view(np.uint8).data
        while len(buffer) >= PIECE:
            pieces.append(blake3(buffer[:PIECE]).digest())
            del buffer[:PIECE]
    if buffer:
        pieces.append(blake3(buffer).digest())
    root = blake3(derive_key_context="psyche-node 2026-11 model root")
    root.update(json.dumps(names, separators=(",", ":")).encode())
    for piece in pieces:
        root.update(piece)
    return world.told(root.digest())


def weights_sha256(model: torch.nn.Module, world: World = ONE_PROCESS) -> str:
    """Return the SHA-256 of a model's weights, in hexadecimal."""
    state = hashlib.sha256()
    for _, data in _weights(model, world):
        state.update(data.reshape(-1).view(np.uint8).data)
    return world.told(state.hexdigest())


def _weights(
    model: torch.nn.Module, world: World
) -> Iterator[tuple[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]:
    """Yield names and values; nothing but on rank 0."""
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        whole = world.whole(parameter)
        if whole is not None:
            yield name, whole.to(torch.float32).contiguous().numpy().astype("<f4", copy=False)
