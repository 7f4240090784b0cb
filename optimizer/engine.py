"""What an optimizer does to all blocks of this process, and the plain way of doing it: torch, any device.

Every engine makes the same bits; this one is the definition that the others are tested against.
Legend: N blocks of a slab, C = 4096 coefficients of a block, K of them sent, B bytes of a block's code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer.blocks import gather, in_blocks, in_tensor
from optimizer.codec import Header, decode_blocks, encode_blocks
from optimizer.fingerprint import sum_of_slab
from optimizer.geometry import Geometry, Region, Slab
from optimizer.layout import BLOCK, SIDE, BlockCode
from optimizer.rounding import Chance, round_by_chance
from optimizer.transform import butterflies, invert_votes
from optimizer.trend import follow
from optimizer.votes import ballots, mean_of_kept, on_device, select, sum_votes, unpack

Bodies = Sequence[NDArray[np.uint8]]
Tensors = Sequence[Tensor | None]


@dataclass(slots=True)
class Sent:
    """An own update whose fate is not known.

    `body` (local blocks, B) and `scale` (local blocks,) fp32: the mean magnitude of what was sent of each block.
    `factor` is what decay has left of it since it was taken out of the momentum.
    """

    header: Header
    body: NDArray[np.uint8]
    scale: Tensor
    factor: float = 1.0

    @classmethod
    def empty(cls, header: Header, blocks: int, code: BlockCode, device: torch.device) -> "Sent":
        """Room for what `Engine.encode` writes."""
        scale = torch.zeros(blocks, dtype=torch.float32, device=device)
        return cls(header, np.zeros((blocks, code.bytes), np.uint8), scale)


@dataclass(frozen=True, slots=True)
class Rule:
    """How a gradient becomes votes: M = decay * M + rate * coefficients; `salt` decides votes on zeros."""

    decay: float
    rate: float
    salt: int


@dataclass(frozen=True, slots=True)
class Step:
    """How votes become a step: sums of votes are limited to +-limit (0: not), the trend follows over 2^window rounds.

    `rates` and `shares` (what weight decay leaves) are by tensor. `chance`: weights and targets are bf16, and rounded
    by it (`rounding`); only `PlainEngine` does that.
    """

    rates: Sequence[float]
    shares: Sequence[float]
    limit: int
    window: int
    chance: Chance | None = None


@dataclass(frozen=True, slots=True)
class Energy:
    """Sums of squares over a momentum: of all of it, and of the coefficients that were sent."""

    total: float
    kept: float


class Engine(Protocol):
    """Lists of tensors are in the order of the layout's placements, local and contiguous."""

    name: str

    def encode(
        self,
        gradients: Tensors,
        exchanged: Tensor | None,
        momentum_NC: Tensor,
        sent: Sent,
        rule: Rule,
    ) -> Energy:
        """Add the gradients to the momentum, choose what to send (body and scale of `sent`), and take it out."""

    def add(self, momentum_NC: Tensor, sent: Sent, factor: float) -> None:
        """Add `factor` times an own update to the momentum."""

    def ahead(
        self,
        trend_NC: Tensor,
        travelling: Sequence[Sent],
        weights: Sequence[Tensor],
        targets: Sequence[Tensor],
        step: Step,
    ) -> None:
        """targets = weights - rate * sign(trend as the own votes alone would change it), in the type of the targets."""

    def check(self, bodies: Bodies) -> None:
        """Raise MalformedUpdate unless this process's blocks of all bodies (all blocks, B) are valid."""

    def apply(self, trend_NC: Tensor, weights: Sequence[Tensor], bodies: Bodies, step: Step) -> None:
        """Change the trend by H V H, V the votes of valid bodies; weights = weights * share - rate * sign(trend)."""

    def fingerprint(self, weights: Tensors) -> int:
        """Sum over the values of fp32 `weights`, modulo 2^64; those of None are left out."""


class PlainEngine:
    """The definition, in torch operations on the device of the tensors."""

    name = "torch"

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        self._geometry, self._code, self._device = geometry, geometry.layout.code, device

    def encode(
        self, gradients: Tensors, exchanged: Tensor | None, momentum_NC: Tensor, sent: Sent, rule: Rule
    ) -> Energy:
        total = kept = 0.0
        for slab in self._geometry.slabs:
            held_NC = momentum_NC[slab.rows]
            coefficients_NC = butterflies(gather(slab, gradients, self._device, exchanged)).mul_(rule.rate / SIDE)
            held_NC.mul_(rule.decay).add_(coefficients_NC)
            indices_NK = select(held_NC.abs(), self._code.topk)
            values_NK = held_NC.gather(1, indices_NK)
            # A block without any gradient must vote, too; let such votes cancel out over members and rounds.
            zero_NK = (values_NK == 0) & (((indices_NK + rule.salt) & 1) == 1)
            negative_NK = (values_NK < 0) | zero_NK
            sent.scale[slab.rows] = mean_of_kept(values_NK.abs())
            sent.body[slab.rows] = encode_blocks(
                indices_NK.cpu().numpy().astype(np.uint16), negative_NK.cpu().numpy(), self._code
            )
            total += float(held_NC.square().sum(dtype=torch.float64))
            kept += float(values_NK.square().sum(dtype=torch.float64))
            self._add(slab, momentum_NC, sent, -1.0)
        return Energy(total, kept)

    def add(self, momentum_NC: Tensor, sent: Sent, factor: float) -> None:
        for slab in self._geometry.slabs:
            self._add(slab, momentum_NC, sent, factor)

    def ahead(
        self,
        trend_NC: Tensor,
        travelling: Sequence[Sent],
        weights: Sequence[Tensor],
        targets: Sequence[Tensor],
        step: Step,
    ) -> None:
        for slab in self._geometry.slabs:
            changes_NC = self._changes([sent.body[slab.rows] for sent in travelling], slab, 0)
            signs_NC = follow(trend_NC[slab.rows], changes_NC, step.window).sign().float()
            draws_NC = self._draws(slab, step)
            for region in slab.regions:
                moved = in_tensor(weights[region.tensor], region) - _move(signs_NC, region, step)
                in_tensor(targets[region.tensor], region).copy_(_rounded(moved, draws_NC, region))

    def check(self, bodies: Bodies) -> None:
        for slab in self._geometry.slabs:
            for rows in self._geometry.rows(bodies, slab):
                decode_blocks(rows, self._code, self._geometry.blocks[slab.rows])

    def apply(self, trend_NC: Tensor, weights: Sequence[Tensor], bodies: Bodies, step: Step) -> None:
        for slab in self._geometry.slabs:
            changes_NC = self._changes(self._geometry.rows(bodies, slab), slab, step.limit)
            trend = follow(trend_NC[slab.rows], changes_NC, step.window)
            trend_NC[slab.rows] = trend
            signs_NC = trend.sign().float()
            draws_NC = self._draws(slab, step)
            for region in slab.regions:
                held = in_tensor(weights[region.tensor], region)
                moved = held.float()  # itself, where it is fp32
                if step.shares[region.tensor] != 1.0:
                    moved.mul_(step.shares[region.tensor])
                moved.sub_(_move(signs_NC, region, step))
                if draws_NC is not None:
                    held.copy_(_rounded(moved, draws_NC, region))

    def fingerprint(self, weights: Tensors) -> int:
        slabs = self._geometry.slabs
        return sum(sum_of_slab(slab, weights, self._geometry, self._device) for slab in slabs) & ((1 << 64) - 1)

    def _changes(self, rows: Bodies, slab: Slab, limit: int) -> Tensor:
        """H V H of the votes in rows (N, B), (N, 4096) int32; zeros if there are none."""
        if not rows:
            return torch.zeros(slab.count, BLOCK, dtype=torch.int32, device=self._device)
        votes_NC = sum_votes(rows, self._code, self._device)
        if limit:
            votes_NC.clamp_(-limit, limit)
        return invert_votes(votes_NC, min(limit or len(rows), len(rows))).int()

    def _draws(self, slab: Slab, step: Step) -> Tensor | None:
        if step.chance is None:
            return None
        return step.chance.draws(self._geometry.blocks[slab.rows], self._device)

    def _add(self, slab: Slab, momentum_NC: Tensor, sent: Sent, factor: float) -> None:
        indices_NK, negative_NK = unpack(on_device(sent.body[slab.rows], self._device), self._code)
        values_NK = ballots(negative_NK) * (sent.scale[slab.rows, None] * factor)
        momentum_NC[slab.rows].scatter_add_(1, indices_NK, values_NK)


def _move(signs_NC: Tensor, region: Region, step: Step) -> Tensor:
    # Adding 0 turns -0 into +0: a weight of -0 without a move stays -0 everywhere.
    return (in_blocks(signs_NC, region) * step.rates[region.tensor]).add_(0.0)


def _rounded(moved: Tensor, draws_NC: Tensor | None, region: Region) -> Tensor:
    return moved if draws_NC is None else round_by_chance(moved, in_blocks(draws_NC, region))
