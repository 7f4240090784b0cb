"""Figures about the last round that are worth watching, taken from a sample of blocks when somebody asks.

Legend: S sampled blocks, C = 4096 coefficients or values of a block.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer.blocks import gather, in_blocks
from optimizer.engine import Bodies, Energy
from optimizer.geometry import Geometry, Region, Slab
from optimizer.layout import BLOCK, SIDE
from optimizer.rounding import DRAWS, round_by_chance
from optimizer.votes import on_device, sum_votes, unpack

_SAMPLE = 64


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of the last round. Shares are between 0 and 1, None if there was nothing to take them of.

    Attributes:
        momentum_norm: Euclidean norm of the own momentum when the last update was chosen. Lower `decay` if it grows
            for long. Where a model is sharded, a block that several processes work on counts once for each.
        energy_sent: share of the momentum's energy in the coefficients that were sent. Tends to fall towards that of
            noise; raise `topk` if it is tiny and training is slow.
        agreement: over coefficients that two members or more voted for, the mean of |sum of votes| / number of votes.
            What chance gives for two or three voters is 0.5, for many (n) 0.8 / sqrt(n); values below it point to
            hostile or broken members.
        flips: share of the weights that moved in both of the last two steps and turned round in between. Near 0.5: the
            rate is too high, steps only undo each other.
        ties: share of weights that the step did not move, votes for and against being equal over the last rounds.
        lost: share of weights whose step is below the resolution of what holds them, at their magnitude: of fp32, or
            where they are rounded by chance, that no chance could have moved. 0 in healthy training.
        sampled: blocks of this process that `agreement`, `flips`, `ties` and `lost` were taken of.
        seconds: by phase, since the last report. On CUDA devices what it took to issue the work.
    """

    momentum_norm: float
    energy_sent: float | None
    agreement: float | None
    flips: float | None
    ties: float | None
    lost: float | None
    sampled: int
    seconds: dict[str, float]


@dataclass(slots=True)
class Watch:
    """Keeps what a report needs of the last round: energies, votes and directions of the sampled blocks, seconds."""

    geometry: Geometry
    device: torch.device
    by_chance: bool = False
    energy: Energy = field(default_factory=lambda: Energy(0.0, 0.0))
    _seconds: dict[str, float] = field(default_factory=dict)
    _votes: list[NDArray[np.uint8]] = field(default_factory=list)  # of every member, (S, B)
    _before: Tensor | None = None  # direction of the step before, (S, C)
    _rates: list[float] = field(default_factory=list)
    _sample: Slab = field(init=False)
    _chosen: Tensor = field(init=False)  # local numbers of the sampled blocks
    _numbers: NDArray[np.int64] = field(init=False)  # the same, in the layout

    def __post_init__(self) -> None:
        blocks = len(self.geometry.blocks)
        chosen = np.unique(np.linspace(0, blocks - 1, min(blocks, _SAMPLE)).astype(np.int64))
        self._chosen = torch.from_numpy(chosen).to(self.device)
        self._numbers = self.geometry.blocks[chosen]
        self._sample = Slab(0, len(chosen), tuple(_regions(self.geometry, chosen)), {})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the seconds of a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def stepping(self, trend_NC: Tensor, rates: Sequence[float]) -> None:
        """Remember the direction of the last step, before the next one; and its rates, by tensor."""
        self._before = trend_NC[self._chosen].sign() if self._votes else None
        self._rates = list(rates)

    def voted(self, bodies: Bodies) -> None:
        """Remember the sampled rows of the bodies (all blocks, B) that made the step."""
        self._votes = [body[self._numbers] for body in bodies]

    def report(self, weights: Sequence[Tensor], trend_NC: Tensor) -> Report:
        """Figures of the last round, given the fp32 weights by tensor. Starts the seconds anew."""
        seconds, self._seconds = self._seconds, {}
        total = self.energy.total
        sent = self.energy.kept / total if total else None
        agreement = flips = ties = lost = None
        if self._votes and len(self._numbers):
            filled_SC, rates_SC = self._grid(self._rates)
            last = trend_NC[self._chosen].sign()
            before = torch.zeros_like(last) if self._before is None else self._before
            held_SC = gather(self._sample, weights, self.device)
            agreement = self._agreement(self._votes)
            ties = _mean((last == 0)[filled_SC])
            lost = _mean(((last != 0) & self._stays(held_SC, held_SC - last * rates_SC))[filled_SC])
            flips = _mean((last == -before)[filled_SC & (last != 0) & (before != 0)])
        return Report(sqrt(total), sent, agreement, flips, ties, lost, len(self._numbers), seconds)

    def _stays(self, held_SC: Tensor, moved_SC: Tensor) -> Tensor:
        """Where rounding takes back what moved. Every chance lies between the least and the greatest draw."""
        if not self.by_chance:
            return moved_SC == held_SC
        draws = (torch.full_like(moved_SC, draw, dtype=torch.int32) for draw in (0, DRAWS - 1))
        least_SC, greatest_SC = (round_by_chance(moved_SC, draws_SC).float() for draws_SC in draws)
        return (least_SC == held_SC) & (greatest_SC == held_SC)

    def _grid(self, rates: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Where the sampled blocks hold a weight (bool), and the rate of each weight."""
        filled_SC = torch.zeros(len(self._numbers), BLOCK, dtype=torch.bool, device=self.device)
        rates_SC = torch.zeros(len(self._numbers), BLOCK, dtype=torch.float32, device=self.device)
        for region in self._sample.regions:
            in_blocks(filled_SC, region).fill_(True)
            in_blocks(rates_SC, region).fill_(rates[region.tensor])
        return filled_SC, rates_SC

    def _agreement(self, rows: Bodies) -> float | None:
        code = self.geometry.layout.code
        voters_SC = torch.zeros(len(self._numbers), BLOCK, dtype=torch.float32, device=self.device)
        for body in rows:
            indices_SK, _ = unpack(on_device(body, self.device), code)
            voters_SC.scatter_add_(1, indices_SK, torch.ones_like(indices_SK, dtype=torch.float32))
        several = voters_SC >= 2
        return _mean((sum_votes(rows, code, self.device).abs() / voters_SC)[several])


def _mean(values: Tensor) -> float | None:
    return float(values.float().mean()) if values.numel() else None


def _regions(geometry: Geometry, chosen: NDArray[np.int64]) -> Iterator[Region]:
    """What the tensors hold of the chosen local blocks (ascending), as if these were one slab."""
    for slab in geometry.slabs:
        mine = chosen[(chosen >= slab.first) & (chosen < slab.first + slab.count)] - slab.first
        if not len(mine):
            continue
        pieces = slab.pieces()
        for piece in pieces[np.isin(pieces["block"], mine)]:
            place = int(np.searchsorted(chosen, int(piece["block"]) + slab.first))
            shape = (1, int(piece["rows"]), 1, int(piece["cols"]))
            at = place * BLOCK + int(piece["offset"])
            strides = (0, int(piece["stride"]), 0, 1)
            yield Region(int(piece["tensor"]), shape, at, (0, SIDE, 0, 1), int(piece["start"]), strides)
