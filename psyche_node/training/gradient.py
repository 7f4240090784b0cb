"""The gradient of a member's share, micro-batch by micro-batch, and what is done when memory runs out on the way.

Legend: B sequences of a micro-batch, L places.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from psyche_node.training.device import Device
from psyche_node.training.errors import OutOfMemory
from psyche_node.training.forward import LossFunction
from psyche_node.training.reader import PackedBatch
from psyche_node.training.world import ONE_PROCESS, World

log = logging.getLogger(__name__)


def accumulate(loss: LossFunction, batch: PackedBatch, device: Device, world: World = ONE_PROCESS) -> float:
    """Set the gradient to that of the mean loss over all trained tokens of ``batch``; return that mean, in nats.

    The ranks of ``world`` divide the sequences; ``world.complete`` is left to do. Where memory runs out, it begins anew
    with half the micro-batch, which stays so. Raises OutOfMemory, without a gradient: with one sequence at a time, or
    on one of several ranks, of which the others would wait for it.
    """
    while True:
        try:
            return _accumulated(loss, batch, device, world)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            words = str(error).splitlines()[0] if str(error) else "no memory"
        # Outside of the handler: the error's traceback holds what is to be freed.
        loss.model.zero_grad(set_to_none=True)
        if device.torch.type == "cuda":
            torch.cuda.empty_cache()
        if device.micro_batch == 1 or world.size > 1:
            raise OutOfMemory(
                f"a step with a micro-batch of {device.micro_batch} needs more memory than {device.words} has left "
                f"({words}). Set activation_checkpointing to on, lower micro_batch, divide the model over more GPUs, "
                "or end what else uses the memory"
            )
        device.micro_batch //= 2
        log.warning("memory ran out (%s): the micro-batch is now %d, for good", words, device.micro_batch)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how PyTorch or Python say that there is no memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _accumulated(loss: LossFunction, batch: PackedBatch, device: Device, world: World) -> float:
    tokens = int(batch.trained.sum())
    total = 0.0
    for part in micro_batches(batch, device, world):
        with device.compute():
            summed = loss(*part)
        # FSDP2 takes the mean over the data-parallel ranks; this makes it their sum.
        (summed * (world.data_parallel / tokens)).backward()  # type: ignore[no-untyped-call]
        total += float(summed.detach())
    return world.sum(total) / tokens


def micro_batches(
    batch: PackedBatch, device: Device, world: World = ONE_PROCESS
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (tokens_BL, trained_BL, places_BL) on the device; sequences without a trained token are left out.

    Every rank of ``world`` gets as many, of which some may have no trained token.
    """
    for part, counts in world.divide(np.flatnonzero(batch.trained.any(axis=1)), device.micro_batch):
        trained = batch.trained[part] & counts
        tokens_BL, trained_BL, places_BL = (
            torch.from_numpy(values).to(device.torch) for values in (batch.tokens[part], trained, batch.places[part])
        )
        yield tokens_BL, trained_BL, places_BL
