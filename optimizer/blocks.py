"""Moving values between tensors and the blocks of a slab."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optimizer.geometry import Region, Slab
from optimizer.layout import BLOCK


def gather(
    slab: Slab, tensors: Sequence[Tensor | None], device: torch.device, exchanged: Tensor | None = None
) -> Tensor:
    """Blocks (N, 4096) fp32 of a slab, from contiguous tensors in the order of the placements; None is all zero.

    Border blocks come from the rows of `exchanged`, if it is given.
    """
    blocks_NC = torch.zeros(slab.count, BLOCK, dtype=torch.float32, device=device)
    for region in slab.regions:
        tensor = tensors[region.tensor]
        if tensor is not None:
            in_blocks(blocks_NC, region).copy_(in_tensor(tensor, region))
    if exchanged is not None and slab.border:
        blocks_NC[list(slab.border)] = exchanged[list(slab.border.values())]
    return blocks_NC


def in_tensor(tensor: Tensor, region: Region) -> Tensor:
    """The region as a view of its tensor, which must be contiguous."""
    return tensor.as_strided(region.shape, region.tensor_strides, tensor.storage_offset() + region.start)


def in_blocks(blocks: Tensor, region: Region) -> Tensor:
    """The region as a view of the slab's blocks, which must be contiguous; of the same shape as `in_tensor`."""
    return blocks.as_strided(region.shape, region.block_strides, blocks.storage_offset() + region.at)
