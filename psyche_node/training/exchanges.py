"""What ranks exchange within a step, counted, so that one that fails on the way does not leave the others waiting.

It goes through the motions of the step once more, with less or with other means, and leaves out the exchanges that it
has made already. So each of the others gets an answer to what it asks, a worthless one, and comes to its end, where all
hear of the failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# As PyTorch 2.13 names them, and as earlier ones did.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Exchanges:
    """Those of this process, which are in one order: steps do not overlap."""

    def __init__(self) -> None:
        self._made = self._left_out = 0

    def reset(self) -> None:
        """A step begins or has ended, and nothing of it is left out any more."""
        self._made = self._left_out = 0

    def again(self) -> None:
        """The step begins once more, and what it exchanged is left out."""
        self._left_out = self._made

    def make(self, exchange: Callable[[], Any]) -> Any:
        """Do ``exchange``, or leave it out: then what it would have written stays as it is.

        In a compiled layer it is done, and not counted: a graph would be made for every count. So a rank that fails
        alone behind one does not bring the others to their end; one that cannot compile the first does.
        """
        if torch.compiler.is_compiling():
            return exchange()
        if self._left_out:
            self._left_out -= 1
            return None
        work = exchange()
        self._made += 1
        return work


EXCHANGES = Exchanges()


def all_reduce(values: Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> None:
    """As that of ``torch.distributed``, in place, and counted."""
    EXCHANGES.make(lambda: dist.all_reduce(values, op=op, group=group))


def all_gather(parts: list[Tensor], own: Tensor, group: dist.ProcessGroup) -> None:
    """As that of ``torch.distributed``, and counted."""
    EXCHANGES.make(lambda: dist.all_gather(parts, own, group=group))


class _Comm:
    """An exchange of FSDP2 (its interface ``Comm``), counted."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class CountedAllGather(_Comm):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        return EXCHANGES.make(lambda: _all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op))


class CountedReduceScatter(_Comm):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        return EXCHANGES.make(
            lambda: _reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        )
