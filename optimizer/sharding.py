"""One replica held by several processes: what each of them holds, and what they must tell each other.

Plain tensors, and DTensors as FSDP2, tensor parallelism, both in one mesh and HSDP make them. A process works alone on
every block that its shards touch, and since all of that work is deterministic, copies of a block stay equal bit for
bit without being sent. Two things are sent, both when an update is encoded: the gradients of blocks on the *border*,
which some process touches but does not hold all of, and the encoded rows, of which every process needs the whole body.
Copies of a tensor must get equal gradients, as they do where DTensors or FSDP2 reduce them; `assemble` sees if not.

Legend: B bytes of a block's code; a row is a block of 4,096 values. *Edges* are the blocks on anyone's border.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import fsum, prod
from operator import mul
from typing import TYPE_CHECKING, Protocol, TypeGuard

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from optimizer.border import NOTHING, counted, filling, require_cover, runs
from optimizer.errors import OptimizerError
from optimizer.geometry import Part
from optimizer.layout import BLOCK, Layout, LayoutError, Placement

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Span = tuple[int, int]
_MASK = (1 << 64) - 1


class Site(Protocol):
    """The processes that hold one replica together. All its methods are collective: called by all, in one order."""

    @property
    def parts(self) -> Sequence[Part]:
        """What this process holds, one a placement; counted where no process of a lower rank holds the same."""

    @property
    def border(self) -> Mapping[int, int]:
        """Blocks (by number in the layout) touched here but not all held here -> row of what `exchange` returns."""

    def exchange(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """Complete the gradients of the border.

        `gradients`: local and contiguous, of any float type, in the order of the placements; None counts as zeros.
        Returns (border blocks, 4096) fp32; None if no process has a border. A value -0 arrives as +0.
        """

    def assemble(self, rows: NDArray[np.uint8], body: NDArray[np.uint8]) -> None:
        """Write the encoded blocks of all processes to `body`, (blocks, B); `rows`, (local blocks, B), are this one's.

        Raises OptimizerError on all processes if copies of a block were encoded differently.
        """

    def all(self, good: bool) -> bool:
        """Whether it is good on every process, so that an error is raised by all of them or by none."""

    def total(self, partial: int) -> int:
        """Sum over the processes, modulo 2^64."""

    def sum(self, value: float) -> float:
        """Sum over the processes, the same on each; of what they count, a block worked on by two counts twice."""


class Alone:
    """A site of one process, which holds everything."""

    def __init__(self, layout: Layout) -> None:
        self.parts: Sequence[Part] = [Part.whole(placement) for placement in layout.placements]
        self.border: Mapping[int, int] = {}

    def exchange(self, gradients: Sequence[Tensor | None]) -> None:
        return None

    def assemble(self, rows: NDArray[np.uint8], body: NDArray[np.uint8]) -> None:
        body[:] = rows

    def all(self, good: bool) -> bool:
        return good

    def total(self, partial: int) -> int:
        return partial & _MASK

    def sum(self, value: float) -> float:
        return value


class Ranks:
    """A site of several processes.

    Args:
        layout: of the replica.
        held: of every rank of the group, its parts in the order of the placements.
        group: its processes; None is the default group.
        device: of the shards, and of the tensors that are sent.
        scratch: bytes of memory used at a time; the border's gradients come on top.

    Raises LayoutError if a tensor is not held completely by the group.
    """

    def __init__(
        self,
        layout: Layout,
        held: Sequence[Sequence[Part]],
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        scratch: int = 64 << 20,
    ) -> None:
        for placement, parts in zip(layout.placements, zip(*held, strict=True), strict=True):
            require_cover(placement, parts)
        self._group, self._device, self._scratch = group, torch.device(device), scratch
        self._blocks, rank = layout.blocks, dist.get_rank(group)
        self.parts: Sequence[Part] = counted(held, rank)
        whole = filling(layout, [Part.whole(placement) for placement in layout.placements])
        owner = np.zeros(layout.blocks, np.int32)
        edge = np.zeros(layout.blocks, bool)
        for number in reversed(range(len(held))):
            values = filling(layout, held[number])
            owner[values > 0] = number
            edge |= (values > 0) & (values < whole)
        mine = filling(layout, held[rank])
        self._edges = np.flatnonzero(edge)
        self._runs = list(runs(layout, self.parts, self._edges))
        border = np.flatnonzero((mine > 0) & (mine < whole))
        self.border: Mapping[int, int] = {int(block): row for row, block in enumerate(border)}
        self._border = np.searchsorted(self._edges, border)
        self._owned = [np.flatnonzero(owner == number) for number in range(len(held))]
        self._mine = np.flatnonzero(mine)
        self._sent = np.searchsorted(self._mine, self._owned[rank])

    def exchange(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        if not len(self._edges):
            return None
        border_NC = torch.empty(len(self._border), BLOCK, dtype=torch.float32, device=self._device)
        most = max(1, self._scratch // (4 * BLOCK))
        for first in range(0, len(self._edges), most):
            # Each value has one contributor and zeros from all others, so that the sum is exact in any order.
            edges_NC = torch.zeros(min(most, len(self._edges) - first), BLOCK, dtype=torch.float32, device=self._device)
            for run in self._runs:
                run.copy(gradients[run.tensor], edges_NC, first)
            dist.all_reduce(edges_NC, group=self._group)
            low, high = np.searchsorted(self._border, [first, first + most])
            border_NC[low:high] = edges_NC[torch.from_numpy(self._border[low:high] - first).to(self._device)]
        return border_NC

    def assemble(self, rows: NDArray[np.uint8], body: NDArray[np.uint8]) -> None:
        width, longest = rows.shape[1], max(len(owned) for owned in self._owned)
        most = max(1, self._scratch // (len(self._owned) * width))
        for first in range(0, longest, most):
            some = slice(first, min(first + most, longest))
            sent = np.zeros((some.stop - first, width), np.uint8)
            mine = rows[self._sent[some]]
            sent[: len(mine)] = mine
            for owned, theirs in zip(self._owned, self._gather(torch.from_numpy(sent)), strict=True):
                body[owned[some]] = theirs[: len(owned[some])].cpu().numpy()
        if not self.all(np.array_equal(body[self._mine], rows)):
            raise OptimizerError(
                "processes with copies of the same tensors made different updates of them, so their gradients or their "
                "weights differ: reduce gradients of plain tensors over the site, use deterministic kernels, reload"
            )

    def all(self, good: bool) -> bool:
        flag = torch.tensor(int(good), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._group)
        return bool(flag)

    def total(self, partial: int) -> int:
        # In halves: a sum of 64-bit numbers may overflow, which no backend promises to wrap.
        halves = torch.tensor([partial & 0xFFFFFFFF, partial >> 32 & 0xFFFFFFFF], device=self._device)
        dist.all_reduce(halves, group=self._group)
        low, high = (int(half) for half in halves.tolist())
        return (low + (high << 32)) & _MASK

    def sum(self, value: float) -> float:
        return fsum(float(theirs) for theirs in self._gather(torch.tensor(value, dtype=torch.float64)))

    def _gather(self, mine: Tensor) -> list[Tensor]:
        theirs = [torch.empty_like(mine, device=self._device) for _ in self._owned]
        dist.all_gather(theirs, mine.to(self._device), group=self._group)
        return theirs


def site_of(
    layout: Layout, parameters: Sequence[Tensor], group: dist.ProcessGroup | None = None, scratch: int = 64 << 20
) -> Site:
    """The site that holds these parameters, which come in the order of the placements.

    `Alone` if none of them is a DTensor. Else `Ranks` over `group` (None: the default group), which must be all the
    processes of the replica; plain tensors are copies that each of them holds. Collective over the group. Raises
    LayoutError on all of its ranks if one has a shard that is no rectangle of its matrix, or if shards are missing.
    """
    if not any(is_sharded(parameter) for parameter in parameters):
        return Alone(layout)
    held, fault = list[Part](), ""
    try:
        held = [part_of(placement, tensor) for placement, tensor in zip(layout.placements, parameters, strict=True)]
    except LayoutError as error:
        fault = str(error)
    told = [(b"", list[Part](), "") for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(told, (layout.digest, held, fault), group=group)
    for rank, (digest, _, theirs) in enumerate(told):
        if theirs:
            raise LayoutError(f"rank {rank}: {theirs}")
        if digest != told[0][0]:
            raise LayoutError(f"ranks 0 and {rank} have different layouts; build the same model with the same topk")
    return Ranks(layout, [parts for _, parts, _ in told], group, local(parameters[0]).device, scratch)


def is_sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether it is a DTensor. Does not import them (1.5 s) where there is none."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """What this process holds of a DTensor, sharing its memory; any other tensor itself.

    `like`: place it as this one first, which is collective over its mesh where placements differ (as those of a
    gradient may: a pending sum, a copy). Raises LayoutError if the local shapes differ still. FSDP2 moves its shards
    to other memory in places, so ask again in every round.
    """
    held = tensor
    if is_sharded(tensor):
        with torch.no_grad():
            if like is not None and is_sharded(like) and tensor.placements != like.placements:
                tensor = tensor.redistribute(like.device_mesh, like.placements)
            held = tensor.to_local().detach()
    if like is not None and held.shape != (wanted := local(like).shape):
        raise LayoutError(f"a gradient has the local shape {tuple(held.shape)}, its parameter {tuple(wanted)}")
    return held


def part_of(placement: Placement, tensor: Tensor) -> Part:
    """The rectangle of a placement's matrix that this process holds of `tensor`. Raises LayoutError if it is none."""
    if not is_sharded(tensor):
        return Part.whole(placement)
    extents = spans(placement.name, tensor)
    held, shard = tuple(stop - first for first, stop in extents), local(tensor)
    if tuple(shard.shape) != held and prod(held) + shard.numel() > 0:
        raise LayoutError(
            f"{placement.name!r} has a local shape of {tuple(shard.shape)}, but {held} by its placements "
            f"{tensor.placements}; choose mesh sizes that divide its shape {placement.shape}"
        )
    if not shard.is_contiguous():
        raise LayoutError(f"{placement.name!r} has a local tensor that is not contiguous; make it so before sharding")
    if not prod(held):
        return NOTHING
    rows = extents.pop(0) if placement.matrix else (0, 1)
    first, stop, inner = 0, 1, 1
    for (low, high), size in zip(reversed(extents), reversed(placement.shape), strict=False):
        if high - low > 1 and (first, stop) != (0, inner):
            raise LayoutError(
                f"{placement.name!r} of shape {placement.shape} is held in pieces by its placements "
                f"{tensor.placements}; shard it along its first or second dimension only"
            )
        first, stop, inner = low * inner + first, (high - 1) * inner + stop, inner * size
    return Part(rows, (first, stop))


def spans(name: str, tensor: Tensor) -> list[Span]:
    """What this process holds of a tensor called `name`, (first, stop) of every dimension; nothing: all are (0, 0).

    Of a DTensor, `torch.chunk` for each axis of its mesh in turn. Raises LayoutError for placements that no contiguous
    shard fits.
    """
    if not is_sharded(tensor):
        return [(0, size) for size in tensor.shape]
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return [(0, 0) for _ in tensor.shape]
    found = [(0, size) for size in tensor.shape]
    for dimension, (first, stop) in enumerate(found):
        for axis in _order(name, tensor, dimension):
            chunk = -(-(stop - first) // mesh.size(axis))
            first = min(first + chunk * coordinate[axis], stop)
            stop = min(first + chunk, stop)
        found[dimension] = (first, stop)
    return found


def _order(name: str, tensor: "DTensor", dimension: int) -> list[int]:
    """Axes of the mesh that cut a dimension, first to last: left to right, but for torch's private `_StridedShard`.

    That is how FSDP2 marks that tensor parallelism, on an axis further right, has cut the same dimension before: into
    `split_factor` pieces. Read here by its attributes alone.
    """
    order = list[int]()
    for axis in reversed(range(len(tensor.placements))):
        how = tensor.placements[axis]
        if how.is_replicate() or getattr(how, "dim", dimension) != dimension:
            continue
        pieces = list(accumulate((tensor.device_mesh.size(before) for before in order), mul, initial=1))
        factor = getattr(how, "split_factor", 1)
        if how.is_partial() or not hasattr(how, "dim") or factor not in pieces:
            raise LayoutError(
                f"{name!r} has placements {tensor.placements}, which no contiguous shard fits; "
                f"use Shard and Replicate, as fully_shard and parallelize_module do"
            )
        order.insert(pieces.index(factor), axis)
    return order
