"""Which members' votes to leave out of a step: those that do not agree with most others, wherever they meet.

Top coefficients of honest members meet by the thousand, and where they meet their signs agree more often than not, for
they come from one loss. Votes that are flipped meet and disagree; random ones agree half of the time; colluding ones
agree with each other only; votes on coefficients that nobody else chooses meet no one. For each pair of members, over a
sample of blocks, n coefficients are voted for by both and a is agreements less disagreements. A pair agrees if a is two
standard deviations above chance, a > 0 and a^2 >= 4 n. Whoever agrees with more than half of the others counts.

All of it is integers from the updates alone, so every replica leaves out the same members. It can tell where pairs
meet often, which needs topk^2 / 4,096 times the blocks to be in the hundreds; where it cannot, fewer than half of the
members would count, and it leaves out none.

Legend: P members, S sampled blocks at a time, C = 4096 coefficients.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer.fingerprint import splitmix64
from optimizer.layout import BLOCK, BlockCode
from optimizer.votes import ballots, on_device, unpack

FEWEST = 4
"""Members from which on there is a majority to agree with, one of them being hostile."""
SAMPLE = 2048
"""Blocks that are looked at, where there are more."""
_AT_ONCE = 1 << 22  # votes held at a time, as fp32


def agreeing(bodies: Sequence[NDArray[np.uint8]], code: BlockCode, device: torch.device) -> list[int]:
    """Which of the valid bodies (all blocks, B) count, by number, ascending."""
    everyone = list(range(len(bodies)))
    if len(bodies) < FEWEST:
        return everyone
    agreements, meetings = _pairs(bodies, code, device)
    agree = (agreements > 0) & (agreements**2 >= 4 * meetings)
    agree.fill_diagonal_(False)
    counted = [member for member in everyone if 2 * int(agree[member].sum()) > len(bodies) - 1]
    return counted if 2 * len(counted) >= len(bodies) else everyone


def _pairs(bodies: Sequence[NDArray[np.uint8]], code: BlockCode, device: torch.device) -> tuple[Tensor, Tensor]:
    """Agreements less disagreements, and coefficients that both voted for: (P, P) int64, over the sampled blocks."""
    members, numbers = len(bodies), sampled(bodies)
    agreements = torch.zeros(members, members, dtype=torch.int64, device="cpu")
    meetings = torch.zeros_like(agreements)
    at_once = max(1, _AT_ONCE // (members * BLOCK))
    for start in range(0, len(numbers), at_once):
        some = numbers[start : start + at_once]
        votes = torch.stack([_votes(body[some], code, device) for body in bodies])
        # Products of -1, 0 and 1, and sums far below 2^24: exact at any precision of the matrix unit.
        with torch.autocast(device.type, enabled=False):
            agreements += (votes @ votes.T).long().cpu()
            meetings += (votes.abs() @ votes.abs().T).long().cpu()
    return agreements, meetings


def sampled(bodies: Sequence[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """Numbers of the blocks to look at, ascending: drawn from all the bodies, in whatever order they come.

    Nobody knows them while there is an update to come, so nobody can be honest in just these.
    """
    blocks = len(bodies[0])
    if blocks <= SAMPLE:
        return np.arange(blocks)
    seed = hashlib.sha256(b"".join(sorted(hashlib.sha256(body.data).digest() for body in bodies))).digest()
    drawn = splitmix64(int.from_bytes(seed[:8], "little"), np.arange(blocks))
    return np.sort(np.argpartition(drawn, SAMPLE)[:SAMPLE])


def _votes(rows: NDArray[np.uint8], code: BlockCode, device: torch.device) -> Tensor:
    indices_SK, negative_SK = unpack(on_device(rows, device), code)
    votes_SC = torch.zeros(len(rows), BLOCK, dtype=torch.float32, device=device)
    return votes_SC.scatter_(1, indices_SK, ballots(negative_SK)).view(-1)
