"""How many signatures a run pays for, and what they cost: the counts are those of the daemon's own behaviour.

The demonstration (four members, 100 rounds, one epoch) pays for 1,000 in its rounds, and for 19 in joining, getting
ready, voting and the transitions between; tests/e2e holds the count against a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from coordinator.layout import MAX_WITNESSES, MEMBERS_SIZE, ROUNDS_SIZE, RUN_SIZE
from coordinator.transactions import COMPUTE_UNITS

LAMPORTS_PER_SIGNATURE: Final = 5000
# One closes the commitments, one the attestations. Several nodes may send the same tick; those that come too late are
# refused before they cost anything.
_TICKS_PER_ROUND: Final = 2
# Wallet and node key sign a join; the wallet alone, ready.
_SIGNATURES_TO_JOIN: Final = 3
# From waiting to warm-up, and to the first round.
_TICKS_TO_START: Final = 2
_RENT_PER_BYTE: Final = 6960  # lamports for an account that need not pay rent: two years' at 3,480 a byte and year
_ACCOUNT_OVERHEAD: Final = 128


def signatures_per_round(members: int, witnesses: int = 0) -> int:
    """A commitment of every member, an attestation of every witness (0: everybody up to 32), and the ticks."""
    return members + min(members, witnesses or MAX_WITNESSES) + _TICKS_PER_ROUND if members else 0


def signatures_per_checkpoint(members: int) -> int:
    """A vote of every member, and a tick."""
    return members + 1 if members else 0


@dataclass(frozen=True, slots=True)
class RunFees:
    """Lamports that all members together pay in fees, and the owner's deposit, which comes back with `run close`."""

    per_round: int
    per_epoch: int
    whole_run: int
    transactions_per_round: int
    deposit: int


def fee_of(signatures: int, priority_fee: int) -> int:
    """Lamports that a transaction costs; `priority_fee` is micro-lamports per compute unit."""
    return LAMPORTS_PER_SIGNATURE * signatures + -(-priority_fee * COMPUTE_UNITS // 1_000_000)


def run_fees(members: int, rounds: int, rounds_per_epoch: int, witnesses: int = 0, priority_fee: int = 0) -> RunFees:
    """Fees of a run whose members all stay to the end."""
    one, per_round = fee_of(1, priority_fee), signatures_per_round(members, witnesses)
    checkpoint, epochs = signatures_per_checkpoint(members), -(-rounds // rounds_per_epoch)
    start = members * _SIGNATURES_TO_JOIN + _TICKS_TO_START
    sizes = (RUN_SIZE, MEMBERS_SIZE, ROUNDS_SIZE)
    return RunFees(
        per_round=per_round * one,
        per_epoch=(per_round * min(rounds, rounds_per_epoch) + checkpoint) * one,
        whole_run=(per_round * rounds + checkpoint * epochs + start) * one,
        transactions_per_round=per_round,
        deposit=sum((size + _ACCOUNT_OVERHEAD) * _RENT_PER_BYTE for size in sizes),
    )


def member_fees(members: int, rounds: int, rounds_per_epoch: int, witnesses: int = 0, priority_fee: int = 0) -> int:
    """Lamports that one of so many members pays in fees, from joining to the last round: an even part of `run_fees`.

    A little more where it is elected as a witness or comes first with a tick more often than others.
    """
    return -(-run_fees(members, rounds, rounds_per_epoch, witnesses, priority_fee).whole_run // members)
