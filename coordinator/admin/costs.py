"""What a run costs those who take part, reckoned from its settings: an estimate, fees move with the chain."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.run_costs import LAMPORTS_PER_SIGNATURE, signatures_per_checkpoint, signatures_per_round
from coordinator.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Costs:
    """Lamports. `deposit` comes back when the run is closed; fees are the members'; rewards the owner's promise."""

    deposit: int
    fees_per_round: int
    fees_left: int
    rewards_owed: int
    rewards_left: int
    rewards_funded: int


def estimate(now: Snapshot, tokens_per_round: float) -> Costs:
    """Costs of the rest of the run with the members of now.

    Args:
        tokens_per_round: tokens in included updates, as measured.
    """
    limits, active = now.run.limits, now.header.active
    per_round = LAMPORTS_PER_SIGNATURE * signatures_per_round(active, limits.witnesses)
    rounds = max(limits.total_rounds - now.run.round, 0)
    checkpoints = -(-rounds // limits.rounds_per_epoch)
    rent = now.lamports[1] + now.lamports[2]
    run_rent = rent_of_run(now)
    return Costs(
        deposit=rent + run_rent,
        fees_per_round=per_round,
        fees_left=per_round * rounds + LAMPORTS_PER_SIGNATURE * checkpoints * signatures_per_checkpoint(active),
        rewards_owed=now.reward_owed,
        rewards_left=int(rounds * tokens_per_round * now.run.reward_rate / 1_000_000),
        rewards_funded=now.lamports[0] - run_rent,
    )


def rent_of_run(now: Snapshot) -> int:
    """The run account's own deposit, by what the members account pays per byte: the rest is there for rewards."""
    overhead = 128
    per_byte = now.lamports[1] / (len(now.raw[1]) + overhead)
    return min(round(per_byte * (len(now.raw[0]) + overhead)), now.lamports[0])
