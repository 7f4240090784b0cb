"""Variants of the optimizer, simulated densely: every member's momentum and votes as one tensor.

Made to compare algorithms, not to be fast; `optimizer.DisTrO` is the product. What it shares with it is the rule: no
private state may leak into the weights. Transforms here are fp32, so that values other than votes can be sent, too.

Legend: P members, N blocks, C = 4096 coefficients of a block, K = topk of them sent. H is the orthonormal
Walsh-Hadamard transform of 64x64 blocks. M (P, N, C) momentum in the transform domain; w (N, C) weights.
"""

from collections import deque
from dataclasses import dataclass, fields
from functools import cache
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from benchmarks.laboratory_votes import agreeing, attack, combine, quorum, wrongly_left_out
from optimizer.layout import BLOCK, SIDE, BlockCode


@dataclass(frozen=True, slots=True)
class Recipe:
    """One variant. Every field is an option of the grid: `--grid topk=8,32 values=votes,fp32`."""

    lr: float = 2.5e-3
    """Peak learning rate."""
    topk: int = 512
    """Coefficients of 4,096 that a member sends; 4096 sends all."""
    select: str = "largest"
    """largest: by magnitude. scheduled: 1 / (4096 / topk) of all in turn, the same for all; needs no indices."""
    values: str = "votes"
    """votes: signs. scaled: signs times the block's mean kept magnitude. fp32: the values."""
    feedback: str = "mean"
    """What is subtracted from M: mean (sign times mean kept magnitude), value (what was there), none."""
    fraction: float = 1.0
    """Of the feedback."""
    decay: float = 0.9
    """Of M per round."""
    combine: str = "clip"
    """clip, sum, mean: see laboratory_votes.combine."""
    smooth: float = 0.875
    """b of the replicated smoothing m = b m + (1 - b) U; 0 is none."""
    step: str = "sign"
    """sign of m, rms (m over its root mean square in the block), linear (m itself, no learning rate: M holds it)."""
    overlap: bool = False
    """Apply the update of a round one round later."""
    lookahead: str = "shared"
    """Gradients are taken at w less the step of: own (H M H), shared (b m), both (b m and the own update travelling),
    residual (H M H itself, for linear steps); none."""
    ahead: float = 1.0
    """Times that step."""
    normalise: bool = False
    """M takes in Adam's step of the member's own gradients instead of the gradient."""
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    vector_rate: float = 1.0
    """Multiplies the learning rate of vectors (norms)."""
    embedding_rate: float = 1.0
    """Multiplies the learning rate of the embedding."""
    robust: str = "none"
    """quorum: coefficients with `voters` net votes weigh `weight`. agreement: optimizer.agreement."""
    voters: int = 2
    weight: int = 2
    attack: str = "none"
    """See laboratory_votes.attack."""
    attackers: int = 0

    def bytes_per_block(self) -> int:
        """On the wire, without the header: 4 bytes per value in fp32, one byte of scale per block if scaled."""
        code = BlockCode(min(self.topk, BLOCK))
        indices = 0 if self.select == "scheduled" or self.topk >= BLOCK else code.bytes * 8 - self.topk
        bits = {"votes": 1, "scaled": 1, "fp32": 32}[self.values]
        return (indices + bits * self.topk + 7) // 8 + (self.values == "scaled")


def parsed(name: str, text: str) -> int | float | bool | str:
    """The value of an option of the grid. Raises ValueError with what is allowed."""
    known: dict[str, type] = {field.name: type(getattr(Recipe(), field.name)) for field in fields(Recipe)}
    if name not in known:
        raise ValueError(f"{name!r} is no option; there are {', '.join(known)}")
    if known[name] is bool:
        if text not in ("0", "1"):
            raise ValueError(f"{name} is {text!r}; it is 0 or 1")
        return text == "1"
    value: int | float | str = known[name](text)
    return value


class Network:
    """All members of one run and the weights they share."""

    def __init__(self, recipe: Recipe, weights_NC: Tensor, groups_N: Tensor, members: int, seed: int) -> None:
        """`weights_NC` are the first weights; `groups_N` says of each block: 0 matrix, 1 embedding, 2 vectors."""
        self.weights_NC = weights_NC.clone()
        self.left_out = 0
        """Honest members left out, summed over rounds."""
        self._recipe, self._members = recipe, members
        self._rates_N1 = torch.tensor([1.0, recipe.embedding_rate, recipe.vector_rate])[groups_N][:, None]
        shape = (members, *weights_NC.shape)
        self._momentum = torch.zeros(shape)
        self._leaving = torch.zeros(shape)
        self._smoothed_NC = torch.zeros_like(weights_NC)
        self._first, self._second, self._rounds = torch.zeros(shape), torch.zeros(shape), 0
        self._travelling: deque[tuple[Tensor, Tensor, float]] = deque()
        self._generator = torch.Generator().manual_seed(seed)
        order = torch.from_numpy(np.random.default_rng(7).permutation(BLOCK))
        self._turns = [order[start : start + recipe.topk] for start in range(0, BLOCK, recipe.topk)]

    def ahead(self, member: int, lr: float) -> Tensor:
        """The weights (N, C) at which `member` takes its gradient in this round."""
        recipe = self._recipe
        if recipe.lookahead == "none":
            return self.weights_NC
        if recipe.lookahead == "residual":
            return self.weights_NC - recipe.ahead * _both(self._momentum[member])
        if recipe.lookahead == "own":
            step_NC = _both(self._momentum[member]).sign() * self._rates_N1
        else:
            update_NC = torch.zeros_like(self.weights_NC)
            if recipe.lookahead == "both" and self._travelling:
                update_NC = _both(self._travelling[-1][1][member])
            step_NC = self._shaped(recipe.smooth * self._smoothed_NC + (1 - recipe.smooth) * update_NC)
        return self.weights_NC - lr * recipe.ahead * step_NC

    def round(self, gradients_PNC: Tensor, lr: float, last: bool) -> None:
        """Encode all members' gradients, and apply what is due; all that travels if this is the last round."""
        recipe = self._recipe
        if recipe.normalise:
            gradients_PNC = self._normalised(gradients_PNC)
        self._momentum.sub_(self._leaving)
        self._momentum.mul_(recipe.decay).add_(_both(gradients_PNC), alpha=lr)
        votes_PNC = self._votes()
        self._feed_back(votes_PNC)
        votes_PNC = attack(votes_PNC, recipe.attack, recipe.attackers, self._generator)
        self._travelling.append((self._combined(votes_PNC), votes_PNC, lr))
        while self._travelling and (last or len(self._travelling) > recipe.overlap):
            combined_NC, _, due = self._travelling.popleft()
            self._apply(combined_NC, due)

    def _normalised(self, gradients_PNC: Tensor) -> Tensor:
        recipe = self._recipe
        self._rounds += 1
        self._first.mul_(recipe.beta1).add_(gradients_PNC, alpha=1 - recipe.beta1)
        self._second.mul_(recipe.beta2).addcmul_(gradients_PNC, gradients_PNC, value=1 - recipe.beta2)
        first = self._first / (1 - recipe.beta1**self._rounds)
        second = self._second / (1 - recipe.beta2**self._rounds)
        return first / second.sqrt_().add_(1e-8)

    def _votes(self) -> Tensor:
        recipe, momentum = self._recipe, self._momentum
        if recipe.topk >= BLOCK:
            sent = momentum
        elif recipe.select == "scheduled":
            turn = self._turns[self._rounds % len(self._turns)] if recipe.normalise else self._next_turn()
            sent = torch.zeros_like(momentum)
            sent[:, :, turn] = momentum[:, :, turn]
        else:
            top = torch.topk(momentum.abs(), recipe.topk, dim=2, sorted=False).indices
            sent = torch.zeros_like(momentum).scatter_(2, top, momentum.gather(2, top))
        if recipe.values == "fp32":
            return sent
        return sent.sign() * (_mean_kept(sent) if recipe.values == "scaled" else 1.0)

    def _next_turn(self) -> Tensor:
        self._rounds += 1
        return self._turns[self._rounds % len(self._turns)]

    def _feed_back(self, votes_PNC: Tensor) -> None:
        recipe = self._recipe
        kept = torch.where(votes_PNC != 0, self._momentum, 0.0)
        if recipe.feedback == "none":
            own = torch.zeros_like(kept)
        elif recipe.values == "fp32" or recipe.feedback == "value":
            own = kept.mul_(recipe.fraction)
        else:
            own = votes_PNC.sign() * _mean_kept(kept) * recipe.fraction
        if recipe.overlap:  # it travels: still part of what lookahead sees in the next round
            self._leaving = own
        else:
            self._momentum.sub_(own)

    def _combined(self, votes_PNC: Tensor) -> Tensor:
        recipe = self._recipe
        if recipe.robust == "agreement":
            counted = agreeing(votes_PNC)
            self.left_out += wrongly_left_out(counted, recipe.attackers, self._members)
            votes_PNC = votes_PNC[counted]
        elif recipe.robust == "quorum":
            return quorum(votes_PNC.sum(0), recipe.voters, recipe.weight)
        return combine(votes_PNC, recipe.combine, len(votes_PNC))

    def _apply(self, combined_NC: Tensor, lr: float) -> None:
        recipe = self._recipe
        self._smoothed_NC.mul_(recipe.smooth).add_(_both(combined_NC), alpha=1 - recipe.smooth)
        if recipe.weight_decay:
            self.weights_NC.mul_(1 - lr * recipe.weight_decay)
        self.weights_NC.sub_(self._shaped(self._smoothed_NC), alpha=1.0 if recipe.step == "linear" else lr)

    def _shaped(self, smoothed_NC: Tensor) -> Tensor:
        if self._recipe.step == "sign":
            return self._rates_N1 * smoothed_NC.sign()
        if self._recipe.step == "rms":
            return smoothed_NC / (smoothed_NC.square().mean(1, keepdim=True).sqrt() + 1e-12) * self._rates_N1
        return smoothed_NC * self._rates_N1


@cache
def _hadamard() -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < SIDE:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / sqrt(SIDE)


def _both(values: Tensor) -> Tensor:
    """H X^T H of every block; with the transposition it is its own inverse."""
    across = (values.reshape(-1, SIDE) @ _hadamard()).view(-1, SIDE, SIDE)
    return (across.mT.reshape(-1, SIDE) @ _hadamard()).view(values.shape)


def _mean_kept(sent: Tensor) -> Tensor:
    count = (sent != 0).sum(2, keepdim=True).clamp(min=1)
    return sent.abs().sum(2, keepdim=True) / count
