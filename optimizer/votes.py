"""Adding up members' votes: integers, so that neither order nor grouping matters; and choosing what to vote for.

Legend: N blocks of a slab, C = 4096 coefficients of a block, K of them voted for by each member, B bytes of a block's
code.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer.layout import BLOCK, BlockCode


def sum_votes(bodies: Iterable[NDArray[np.uint8]], code: BlockCode, device: torch.device) -> Tensor:
    """Sum of the signs sent for each coefficient, (N, 4096) integers in fp32.

    `bodies` are the rows (N, B) of one slab, of validated updates.
    """
    votes_NC: Tensor | None = None
    for body in bodies:
        indices_NK, negative_NK = unpack(on_device(body, device), code)
        if votes_NC is None:
            votes_NC = torch.zeros(len(body), BLOCK, dtype=torch.float32, device=device)
        votes_NC.scatter_add_(1, indices_NK, ballots(negative_NK))
    if votes_NC is None:
        raise ValueError("there are no votes to add up")
    return votes_NC


def on_device(rows: NDArray[np.uint8], device: torch.device) -> Tensor:
    """A copy of rows that may be a view of read-only bytes."""
    return torch.from_numpy(rows.copy()).to(device)


def ballots(negative: Tensor) -> Tensor:
    """+1 or -1 in fp32, of sign bits."""
    return 1.0 - 2.0 * negative.float()


def unpack(body_NB: Tensor, code: BlockCode) -> tuple[Tensor, Tensor]:
    """Indices (N, K) int64, ascending, and sign bits (N, K) bool of validated rows (N, B) uint8, on their device."""
    blocks, topk, low = len(body_NB), code.topk, code.low
    places = torch.arange(8, device=body_NB.device, dtype=torch.uint8)
    bits = ((body_NB[:, :, None] >> places) & 1).view(blocks, -1)
    end = topk * low + code.bitmap
    high_NK = bits[:, topk * low : end].nonzero()[:, 1].view(blocks, topk)
    high_NK = high_NK - torch.arange(topk, device=body_NB.device)
    weights = 1 << torch.arange(low, device=body_NB.device)
    low_NK = (bits[:, : topk * low].view(blocks, topk, low).long() * weights).sum(dim=2)
    return (high_NK << low) + low_NK, bits[:, end : end + topk].bool()


def select(magnitudes_NC: Tensor, topk: int) -> Tensor:
    """Indices (N, K) int64, ascending, of the largest values in each row; of equal ones those of the lowest index.

    Which of equal values `torch.topk` returns is unspecified; rows where it matters are sorted out by an integer key.
    """
    top = torch.topk(magnitudes_NC, topk, dim=1, sorted=False)
    indices_NK = top.indices
    least_N1 = top.values.amin(dim=1, keepdim=True)
    tied = ((magnitudes_NC >= least_N1).sum(dim=1) > topk).nonzero()[:, 0]
    if len(tied):
        # Bits of non-negative fp32 values order as integers; the reversed index makes every key unique.
        order = torch.arange(BLOCK - 1, -1, -1, device=magnitudes_NC.device)
        keys = (magnitudes_NC[tied].view(torch.int32).long() << 12) | order
        indices_NK[tied] = torch.topk(keys, topk, dim=1, sorted=False).indices
    return indices_NK.sort(dim=1).values


def mean_of_kept(magnitudes_NK: Tensor) -> Tensor:
    """Mean (N,) of each row in fp32, added in one order: the upper half onto the lower, again and again."""
    blocks, topk = magnitudes_NK.shape
    width = 1 << (topk - 1).bit_length()
    sums = torch.nn.functional.pad(magnitudes_NK, (0, width - topk))
    while width > 1:
        width //= 2
        sums = sums[:, :width] + sums[:, width : 2 * width]
    # By a tensor: on CUDA devices PyTorch multiplies by the reciprocal of a number, which rounds twice.
    return sums.view(blocks) / sums.new_full((1,), topk)
