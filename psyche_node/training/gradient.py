"""The gradient of a member's share, micro-batch by micro-batch, and what is done when memory runs out on the way.

Legend: B sequences of a micro-batch, L places.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from psyche_node.training.device import Device
from psyche_node.training.errors import OutOfMemory
from psyche_node.training.forward import LossFunction
from psyche_node.training.reader import PackedBatch
from psyche_node.training.world import ONE_PROCESS, Rows, World, is_out_of_memory

log = logging.getLogger(__name__)


def accumulate(loss: LossFunction, batch: PackedBatch, device: Device, world: World = ONE_PROCESS) -> float:
    """Set the gradient to that of the mean loss over all trained tokens of ``batch``; return that mean, in nats.

    The ranks of ``world`` divide the sequences; ``world.complete`` is left to do. Where memory runs out, if only on one
    rank, all begin anew with half the micro-batch, which stays so. Raises OutOfMemory, without a gradient, if it does
    with one sequence at a time.
    """
    # What tensor-parallel ranks exchange has the shape of the micro-batch: a small one cannot stand for it.
    motions = None if world.size > world.data_parallel else lambda: _motions(loss, batch, device, world)
    while True:
        try:
            total = world.jointly(lambda: _accumulated(loss, batch, device, world), motions)
            return world.sum(total) / int(batch.trained.sum())
        except Exception as error:
            words = str(error).splitlines()[0] if str(error) else "no memory"
            failure = None if is_out_of_memory(error) else error
        # Outside of the handler: the error's traceback holds what is to be freed.
        loss.model.zero_grad(set_to_none=True)
        if failure is not None:
            raise failure
        if device.torch.type == "cuda":
            torch.cuda.empty_cache()
        if device.micro_batch == 1:
            raise OutOfMemory(
                f"a step with a micro-batch of {device.micro_batch} needs more memory than {device.words} has left "
                f"({words}). Set activation_checkpointing to on, lower micro_batch, divide the model over more GPUs, "
                "or end what else uses the memory"
            )
        device.micro_batch //= 2
        log.warning("memory ran out (%s): the micro-batch is now %d, for good", words, device.micro_batch)


_FEW = 8
"""Places of one sequence that stand for a micro-batch where no memory is left."""


def _motions(loss: LossFunction, batch: PackedBatch, device: Device, world: World) -> None:
    """As many forward and backward passes as ``_accumulated`` makes, over next to nothing."""
    loss.model.zero_grad(set_to_none=True)
    _sum_in_fp32(loss.model)
    for part, _ in world.divide(_trained_rows(batch), device.micro_batch):
        few = [values[part[:1], :_FEW] for values in (batch.tokens, batch.trained, batch.places)]
        with device.compute():
            summed = loss(*(torch.from_numpy(values).to(device.torch) for values in few))
        summed.backward()  # type: ignore[no-untyped-call]


def _accumulated(loss: LossFunction, batch: PackedBatch, device: Device, world: World) -> float:
    """Make the gradient, and return the sum of the losses over this rank's tokens."""
    tokens = int(batch.trained.sum())
    total = 0.0
    _sum_in_fp32(loss.model)
    for part in micro_batches(batch, device, world):
        with device.compute():
            summed = loss(*part)
        # FSDP2 takes the mean over the data-parallel ranks; this makes it their sum.
        (summed * (world.data_parallel / tokens)).backward()  # type: ignore[no-untyped-call]
        total += float(summed.detach())
    return total


def _sum_in_fp32(model: nn.Module) -> None:
    """Have gradients of bf16 weights added up in fp32: in bf16, what many micro-batches add to a large sum is lost."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32
            # FSDP2 adds to what is there, in its type, and would begin with one of the weight's.
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)


def micro_batches(
    batch: PackedBatch, device: Device, world: World = ONE_PROCESS
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (tokens_BL, trained_BL, places_BL) on the device; sequences without a trained token are left out.

    Every rank of ``world`` gets as many, of which some may have no trained token.
    """
    for part, counts in world.divide(_trained_rows(batch), device.micro_batch):
        trained = batch.trained[part] & counts
        tokens_BL, trained_BL, places_BL = (
            torch.from_numpy(values).to(device.torch) for values in (batch.tokens[part], trained, batch.places[part])
        )
        yield tokens_BL, trained_BL, places_BL


def _trained_rows(batch: PackedBatch) -> Rows:
    return np.flatnonzero(batch.trained.any(axis=1))
