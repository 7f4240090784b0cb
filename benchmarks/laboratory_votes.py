"""Votes of all members at once: how they are combined, how hostile members bend them, and what leaves those out.

Legend: P members, N blocks, C = 4096 coefficients of a block. Votes (P, N, C) are fp32: -1, 0, 1, or values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ATTACKS = ("none", "flip", "random", "copy-flip", "collude", "lonely")


def combine(votes_PNC: Tensor, how: str, members: int) -> Tensor:
    """Votes (N, C) that count: the sum limited to one vote, the sum over `members`, or the mean over those that sent.

    The sum is over members' mean so that its size does not depend on their number; a sign step ignores the factor.
    """
    total_NC = votes_PNC.sum(0)
    if how == "clip":
        return total_NC.clamp(-1, 1)
    if how == "sum":
        return total_NC / members
    return total_NC / (votes_PNC != 0).sum(0).clamp(min=1)


def quorum(votes_NC: Tensor, voters: int, weight: int) -> Tensor:
    """Integers: coefficients on which at least `voters` members agree (net) count `weight`, the others 1."""
    return votes_NC.sign() * torch.where(votes_NC.abs() >= voters, float(weight), 1.0)


def agreeing(votes_PNC: Tensor) -> list[int]:
    """Members whose signs agree, where they meet, with those of more than half of the others (optimizer.agreement).

    A pair agrees if agreements less disagreements are two standard deviations above chance. Fewer than half of all
    members: everybody counts.
    """
    signs = votes_PNC.sign().flatten(1)
    agreements, meetings = (signs @ signs.T).long(), (signs.abs() @ signs.abs().T).long()
    agree = (agreements > 0) & (agreements**2 >= 4 * meetings)
    agree.fill_diagonal_(False)
    everyone = list(range(len(signs)))
    counted = [member for member in everyone if 2 * int(agree[member].sum()) > len(signs) - 1]
    return counted if 2 * len(counted) >= len(signs) else everyone


def attack(votes_PNC: Tensor, how: str, attackers: int, generator: torch.Generator) -> Tensor:
    """Replace the votes of the first `attackers` members; a format of signed votes leaves them no larger ones.

    flip: own honest votes, signs turned. random: honest places, random signs. copy-flip: all turn the votes of the
    first honest member. collude: all vote +1 on the same coefficients of every block. lonely: +1 where no honest
    member votes, and no other attacker.
    """
    if how == "none" or not attackers:
        return votes_PNC
    honest = votes_PNC[attackers:]
    hostile = votes_PNC[:attackers]
    topk = int((hostile[0, 0] != 0).sum())
    if how == "flip":
        hostile = -hostile
    elif how == "random":
        coins = torch.randint(0, 2, hostile.shape, generator=generator) * 2.0 - 1.0
        hostile = hostile.abs() * coins
    elif how == "copy-flip":
        hostile = -honest[:1].expand_as(hostile)
    elif how == "collude":
        hostile = torch.zeros_like(hostile)
        hostile[:, :, :topk] = 1.0
    else:
        hostile = _lonely(honest, attackers, topk, generator)
    return torch.cat([hostile, honest])


def _lonely(honest_PNC: Tensor, attackers: int, topk: int, generator: torch.Generator) -> Tensor:
    taken_NC = (honest_PNC != 0).sum(0) + 0.5 * torch.rand(honest_PNC.shape[1:], generator=generator)
    order_NC = taken_NC.argsort(dim=1)
    hostile = torch.zeros(attackers, *honest_PNC.shape[1:])
    for attacker in range(attackers):
        hostile[attacker].scatter_(1, order_NC[:, attacker * topk : (attacker + 1) * topk], 1.0)
    return hostile


def wrongly_left_out(counted: Sequence[int], attackers: int, members: int) -> int:
    """How many honest members are missing from those that count."""
    return (members - attackers) - sum(member >= attackers for member in counted)
