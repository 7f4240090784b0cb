"""Digests of a model's weights. Both read the fp32 bytes, little-endian, of every parameter in the order of its name.

A tied parameter counts once, under the name that comes first in the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import torch
from blake3 import blake3

PIECE = 4 * 1024 * 1024
"""Bytes of a piece of the model root; peers serve checkpoints in pieces of this size."""


def model_root(model: torch.nn.Module) -> bytes:
    """Return the 32-byte root that names a model's weights.

    BLAKE3 of the description (names and shapes, as JSON) followed by the BLAKE3 of each 4 MiB piece of the weights, so
    that a piece can be checked alone against the list.
    """
    names, pieces = [], []
    buffer = bytearray()
    for name, data in _weights(model):
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
    return root.digest()


def weights_sha256(model: torch.nn.Module) -> str:
    """Return the SHA-256 of a model's weights, in hexadecimal."""
    state = hashlib.sha256()
    for _, data in _weights(model):
        state.update(data.reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]:
    for name, parameter in sorted(model.named_parameters()):
        yield name, parameter.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
