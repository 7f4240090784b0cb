"""The processes that train one replica together: who they are, what each does of the work, and what they tell another.

`World` is one process, which holds and does everything. `Ranks` is several: data-parallel ones divide the batch and
shard the weights by FSDP2, tensor-parallel ones divide the matrices. All methods are collective: every rank calls
them, in one order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from psyche_node.mapping import mapped
from psyche_node.training.errors import OutOfMemory, TrainingError

if TYPE_CHECKING:
    from psyche_node.training.forward import Root

T = TypeVar("T")
Rows = NDArray[np.int64]


class World:
    """One process."""

    rank = 0
    size = 1
    data_parallel = 1
    """Ranks that divide the batch."""
    on_host = 1
    """Ranks on the host of this one."""

    def device(self, name: str) -> str:
        """The device of this rank, where the operator named ``name``. Raises TrainingError."""
        return name

    def shard(self, model: Any, root: Root, device: torch.device, tensor_parallel: int) -> list[str]:
        """Divide the weights of ``model``, in place, for ``device``; return a line for each choice.

        The model has no memory yet.

        Raises TrainingError if they cannot be divided so.
        """
        if tensor_parallel != 1:
            raise TrainingError(
                f"tensor_parallel is {tensor_parallel}, and this node has one training process: set ranks (or gpus) to "
                f"a multiple of {tensor_parallel}, or tensor_parallel to 1"
            )
        return []

    def divide(self, rows: Rows, size: int) -> Iterator[tuple[Rows, bool]]:
        """Yield micro-batches of at most ``size`` of the ``rows`` that are this rank's, as many on every rank.

        Where a rank has none left it gets one row with False: it is to go through the motions, and count nothing.
        """
        for start in range(0, len(rows), size):
            yield rows[start : start + size], True

    def attempt(self) -> contextlib.AbstractContextManager[None]:
        """The context of forward and backward passes: if they break off, the next ones can be made all the same."""
        return contextlib.nullcontext()

    def jointly(self, step: Callable[[], T], motions: Callable[[], object] | None = None) -> T:
        """Do ``step``, forward and backward passes; if it fails on one rank, raise on all.

        A rank that failed does ``motions`` in its place, so that the others come to their end: they exchange as many
        tensors of the same shapes with them. Without motions, the group has to end if it failed on some ranks only.

        Raises:
            What ``step`` raises here. Where it failed elsewhere: OutOfMemory, if that was all it was, else RankFailed.
            OutOfStep: the ranks cannot go on together.
        """
        return step()

    def complete(self, model: nn.Module) -> None:
        """Make the gradients, which so far are of this rank's own doing, those of the whole replica."""

    def clip(self, model: nn.Module, norm: float) -> float:
        """Clip the gradient to ``norm`` (0: leave it); return its norm before."""
        limit = norm if norm > 0 else float("inf")
        return float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))

    def sum(self, value: float) -> float:
        """Sum of what the data-parallel ranks have."""
        return value

    def whole(self, tensor: Tensor) -> Tensor | None:
        """All of a parameter, on the CPU: on rank 0; None on the others."""
        return tensor.detach().cpu()

    def least(self, value: int) -> int:
        """The smallest of what the ranks have."""
        return value

    def told(self, value: T) -> T:
        """What rank 0 has, on every rank. It is pickled."""
        return value

    def together(self, step: Callable[[], T]) -> T:
        """Do ``step``, which talks to no other rank; if it fails on one, raise on all. Raises what ``step`` raises."""
        return step()

    def files(self, paths: Sequence[Path]) -> list[memoryview]:
        """The bytes of files of rank 0's host, mapped, not read. Raises OSError, on all ranks."""
        return [mapped(path) for path in paths]


ONE_PROCESS = World()


_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",  # of the driver, such as for a context or a kernel's code
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""How libraries say it that know no error of its own for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how PyTorch, Python, a library under them or another rank say that there is no memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
