"""Adding up members' votes: integers, so that neither order nor grouping matters.

Legend: N blocks of a slab, C = 4096 coefficients of a block, K of them voted for by each member.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer.codec import decode_blocks
from optimizer.layout import BLOCK, BlockCode, Slab


def sum_votes(bodies: Iterable[NDArray[np.uint8]], slab: Slab, code: BlockCode, device: torch.device) -> Tensor:
    """Sum of the signs sent for each coefficient of a slab, (N, 4096) integers in fp32.

    `bodies` are the bodies (all blocks, B) of validated updates. Raises MalformedUpdate.
    """
    votes_NC = torch.zeros(slab.count, BLOCK, device=device)
    for body in bodies:
        indices, signs = decode_blocks(body[slab.rows], code, slab.first)
        indices_NK = torch.from_numpy(indices.astype(np.int64)).to(device)
        ballots_NK = torch.from_numpy(np.where(signs, np.float32(-1), np.float32(1))).to(device)
        votes_NC.scatter_add_(1, indices_NK, ballots_NK)
    return votes_NC


def clip_votes(votes_NC: Tensor) -> Tensor:
    """Limit each coefficient to one vote either way, in place: two members in collusion weigh no more than one."""
    return votes_NC.clamp_(-1, 1)


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
