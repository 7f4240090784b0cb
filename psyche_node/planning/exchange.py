"""What members send each other in a round, and how long it takes."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Final

PIECE: Final = 1 << 20
"""Bytes of the messages in which an update is passed on while it arrives."""
LINE: Final = 0.95
"""Share of a line's rate that updates get. `python -m benchmarks.network` has 0.99, of lines up to 1 Gbit/s."""
CHAIN_SLOTS: Final = 8
"""What a round waits for the chain: commitment, tick, attestation and tick, of two slots each."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Of one member in one round. Bytes each way; ``seconds`` until it has all updates of the others."""

    update_bytes: int
    received: int
    sent: int
    seconds: float


def exchange(update_bytes: int, members: int, up: float, down: float, rtt: float) -> Exchange:
    """Lines of ``up`` and ``down`` bytes per second (0: no limit).

    Everybody gets the update of everybody else, and uploads at most two copies of each: all trees together give each
    member every place once, so that it uploads as much as it gets (docs/decisions/0019-fan-out-by-tree.md). A tree of n
    members is log2(n) steps deep, each a piece and a round trip and a half.
    """
    others = members - 1
    received = sent = others * update_bytes
    busiest = max((size / (rate * LINE) for size, rate in ((sent, up), (received, down)) if rate), default=0.0)
    steps = ceil(log2(members + 1)) - 1 if others else 0
    slowest = min((rate for rate in (up, down) if rate), default=float("inf"))
    return Exchange(update_bytes, received, sent, busiest + steps * (1.5 * rtt + PIECE / slowest) if others else 0.0)


def rate_for(update_bytes: int, members: int, rtt: float, seconds: float) -> float | None:
    """Bytes per second, each way, for an exchange within ``seconds``; None if no line is fast enough."""
    one = exchange(update_bytes, members, 1.0, 1.0, 0.0).seconds
    far = exchange(update_bytes, members, 0.0, 0.0, rtt).seconds
    return one / (seconds - far) if seconds > far else None
