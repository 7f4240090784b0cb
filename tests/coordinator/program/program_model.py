"""The rules of a round in plain Python, written from the protocol, to check the program against."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from coordinator.state import Limits, Round

MASK = 2**64 - 1


def splitmix(seed: bytes) -> Iterable[int]:
    """SplitMix64 from the first 8 bytes of the run's seed."""
    state = int.from_bytes(seed[:8], "little")
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        x = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
        yield x ^ x >> 31


def assignment(
    seed: bytes, shares: Mapping[int, int], positions: int, limits: Limits
) -> tuple[dict[int, tuple[int, int]], tuple[int, ...]]:
    """Slices (offset, count) and witnesses of a round whose active members have these shares."""
    draws = iter(splitmix(seed))
    slots = sorted(shares)
    first = next(draws) % len(slots)
    order = slots[first:] + slots[:first]
    total, cumulative, offset, slices = sum(shares.values()), 0, 0, {}
    # everybody gets one position, where there are enough; the others follow the shares
    least = positions >= len(slots)
    for number, slot in enumerate(order, 1):
        cumulative += shares[slot]
        end = least * number + (positions - least * len(slots)) * cumulative // total
        slices[slot] = (offset, end - offset)
        offset = end
    pool, witnesses = list(slots), []
    for index in range(min(limits.witnesses or 32, len(slots))):
        chosen = index + next(draws) % (len(slots) - index)
        pool[index], pool[chosen] = pool[chosen], pool[index]
        witnesses.append(pool[index])
    return slices, tuple(witnesses)


def next_seed(seed: bytes, digests: Mapping[int, bytes], slot_hash: bytes) -> bytes:
    table = b"".join(digests.get(slot, bytes(32)) for slot in range(256))
    return hashlib.sha256(seed + table + slot_hash).digest()


def eligible(entry: Round) -> frozenset[int]:
    """Committed members on the weights of a strict majority, or all when there is none."""
    votes = Counter(commitment.fingerprint for commitment in entry.commitments.values())
    majority = [fingerprint for fingerprint, count in votes.items() if 2 * count > len(entry.commitments)]
    return frozenset(
        slot for slot, commitment in entry.commitments.items() if not majority or commitment.fingerprint == majority[0]
    )


def majority_of(fingerprints: Sequence[int]) -> int | None:
    """What more than half of them are."""
    counted = Counter(fingerprints).most_common(1)
    return counted[0][0] if counted and 2 * counted[0][1] > len(fingerprints) else None


def quorum(count: int) -> int:
    return -(-2 * count // 3)


def included(entry: Round) -> frozenset[int]:
    need = quorum(len(entry.witnesses))
    counts = Counter(slot for named in entry.attestations.values() for slot in named)
    return frozenset(slot for slot in eligible(entry) if counts[slot] >= need)
