"""How full and how balanced packed sequences are: `python -m benchmarks.data [--samples N] [--json FILE]`.

Lengths are drawn from the log-normal distribution of Hermes 4's samples: mean 14,394 and median 9,382 characters, at
four characters a token. What is longer than a sequence is dropped, as `psyche-node data prepare` does by default.

Packing: efficiency (tokens over places) and seconds, beside the baseline, first-fit-decreasing in groups, as Hermes 4
packed. Balance: how far the member that is furthest off is from the round's mean attention cost per sequence, in the
median and the worst round, with equal shares and with shares between 1 and 4, beside a shuffle that does not look at
cost. Exit status 1 below the goals: efficiency 99.9%, 10 s for 200,000 samples, 5% with equal shares.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psyche_node.data.order import balanced_order
from psyche_node.data.packing import attention_costs, pack
from psyche_node.data.permutation import permute

MEAN, MEDIAN = 14_394, 9_382
CHARACTERS_PER_TOKEN = 4
LENGTH = 16_384
BATCH = 384
MEMBERS = (4, 8, 24)
GROUPS = (1_000, 10_000)
GOAL_EFFICIENCY, GOAL_SECONDS, GOAL_BALANCE = 0.999, 10.0, 0.05
SEED = b"benchmark"

I64 = npt.NDArray[np.int64]


def lengths_of(samples: int, seed: int = 0) -> I64:
    """Tokens of each sample (samples,)."""
    sigma = math.sqrt(2 * math.log(MEAN / MEDIAN))
    characters = np.random.default_rng(seed).lognormal(math.log(MEDIAN), sigma, samples)
    return np.maximum(1, np.ceil(characters / CHARACTERS_PER_TOKEN)).astype(np.int64)


def first_fit_decreasing(lengths: I64, group: int) -> int:
    """The number of sequences when each ``group`` of documents is packed alone: longest first, where it fits first.

    The first sequence with enough room is found in a tree of the largest rooms.
    """
    total = 0
    for start in range(0, len(lengths), group):
        part = np.sort(lengths[start : start + group])[::-1].tolist()
        leaves = 1 << max(1, (len(part) - 1).bit_length())
        rooms = [LENGTH] * (2 * leaves)
        used = 0
        for length in part:
            node = 1
            while node < leaves:
                node = 2 * node if rooms[2 * node] >= length else 2 * node + 1
            rooms[node] -= length
            used = max(used, node - leaves + 1)
            while node > 1:
                node //= 2
                rooms[node] = max(rooms[2 * node], rooms[2 * node + 1])
        total += used
    return total


def packing(lengths: I64) -> tuple[list[dict[str, Any]], I64]:
    """Rows of the table, and the costs of the sequences, in order."""
    rows = []
    started = time.perf_counter()
    sequences = pack(lengths, LENGTH)
    seconds = time.perf_counter() - started
    costs = np.sort(attention_costs(lengths, sequences))
    rows.append(_row("best-fit-decreasing, all at once", lengths, len(costs), seconds))
    for group in GROUPS:
        started = time.perf_counter()
        count = first_fit_decreasing(lengths, group)
        seconds = time.perf_counter() - started
        rows.append(_row(f"baseline: first-fit-decreasing, groups of {group:,}", lengths, count, seconds))
    return rows, costs


def _row(name: str, lengths: I64, count: int, seconds: float) -> dict[str, Any]:
    efficiency = float(lengths.sum()) / (count * LENGTH)
    return {"name": name, "sequences": count, "efficiency": efficiency, "seconds": seconds}


def imbalance(costs: I64, shares: Callable[[int], Sequence[float]]) -> tuple[float, float]:
    """The largest deviation of a member's cost per sequence from its round's: (median round, worst round)."""
    worst = []
    for number in range(len(costs) // BATCH):
        share = np.cumsum([0.0, *shares(number)])
        cuts = np.floor(BATCH * share / share[-1] + 1e-9).astype(np.int64)
        batch = costs[number * BATCH : (number + 1) * BATCH]
        sums = np.add.reduceat(batch, cuts[:-1])
        worst.append(float(np.abs(sums / np.diff(cuts) / batch.mean() - 1).max()))
    return float(np.median(worst)), max(worst)


def balance(costs: I64) -> list[dict[str, Any]]:
    """One row per number of members and kind of shares."""
    positions = np.arange(len(costs))
    ours = costs[balanced_order(positions, len(costs), SEED).astype(np.int64)]
    plain = costs[permute(positions, len(costs), SEED).astype(np.int64)]
    rows = []
    for members in MEMBERS:
        rng = np.random.default_rng(1)
        drawn = rng.uniform(1, 4, (len(costs) // BATCH, members))
        kinds: dict[str, Callable[[int], Sequence[float]]] = {
            "equal": lambda number, members=members: [1.0] * members,  # type: ignore[misc]
            "1 to 4": lambda number, drawn=drawn: drawn[number].tolist(),  # type: ignore[misc]
        }
        for kind, shares in kinds.items():
            median, worst = imbalance(ours, shares)
            base_median, base_worst = imbalance(plain, shares)
            rows.append(
                {"members": members, "shares": kind, "median": median, "worst": worst}
                | {"baseline_median": base_median, "baseline_worst": base_worst}
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    lengths = lengths_of(options.samples)
    fitting = lengths[lengths <= LENGTH]
    print(f"{len(lengths):,} samples, {len(lengths) - len(fitting):,} longer than {LENGTH:,} tokens and dropped\n")
    packed, costs = packing(fitting)
    print(f"{'packing':<48} {'sequences':>10} {'efficiency':>11} {'seconds':>8}")
    for row in packed:
        print(f"{row['name']:<48} {row['sequences']:>10,} {row['efficiency']:>11.3%} {row['seconds']:>8.2f}")
    print(f"\nattention cost of a sequence: standard deviation {costs.std() / costs.mean():.0%} of the mean, ", end="")
    print(f"largest {costs[-1] / costs.mean():.2f} times it; {BATCH} sequences per round")
    print(f"{'members':>7} {'shares':>7} {'median':>8} {'worst':>8}   baseline: {'median':>8} {'worst':>8}")
    balanced = balance(costs)
    for row in balanced:
        print(
            f"{row['members']:>7} {row['shares']:>7} {row['median']:>8.1%} {row['worst']:>8.1%}   "
            f"          {row['baseline_median']:>8.1%} {row['baseline_worst']:>8.1%}"
        )
    missed = [
        name
        for name, bad in (
            ("efficiency", packed[0]["efficiency"] < GOAL_EFFICIENCY),
            ("seconds", packed[0]["seconds"] > GOAL_SECONDS * max(1.0, options.samples / 200_000)),
            ("balance", any(row["worst"] > GOAL_BALANCE for row in balanced if row["shares"] == "equal")),
        )
        if bad
    ]
    print(f"\nbelow the goal: {', '.join(missed)}" if missed else "\nall goals are reached")
    if options.json:
        machine = {"python": platform.python_version(), "machine": platform.machine()}
        figures = {"machine": machine, "packing": packed, "balance": balanced}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
