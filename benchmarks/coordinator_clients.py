"""What a round costs a node on chain, with 64 real clients: `python -m benchmarks.coordinator_clients`.

A ledger process, and that many members that do everything on chain that a node does, without training: ticks per
transition, bytes received per client and round, and fees, beside the protocol's budgets. Exit status 1 above one.
`--clients 256 --slot-ms 400 --rounds 3` takes about three minutes and measures what is extrapolated otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "coordinator"))

from many_clients import BUDGET_BYTES, CLUSTER_SLOT_SECONDS, Measured, Setting, measure

TICKS_BUDGET = 2.0
ROUND_SECONDS = 30.0
SIZES = (64, 256)


def main() -> int:
    """Exit status 1 when a budget does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="the first one is not measured")
    parser.add_argument("--slot-ms", type=int, default=200, help="longer where this machine is too slow")
    parser.add_argument("--round-slots", type=int, default=int(ROUND_SECONDS / CLUSTER_SLOT_SECONDS) - 10)
    parser.add_argument("--overlap", type=int, default=1, choices=(0, 1))
    parser.add_argument("--dead", type=int, default=0, help="members that go silent after the first round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    setting = Setting(
        options.clients,
        options.rounds,
        options.slot_ms,
        options.round_slots,
        overlap=options.overlap,
        dead=options.dead,
        seed=options.seed,
    )
    measured = asyncio.run(measure(setting))
    _print(measured)
    if options.json:
        figures = asdict(measured) | {"machine": platform.platform(), "cores": os.cpu_count()}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if measured.ticks_per_transition <= TICKS_BUDGET and measured.bytes_most < BUDGET_BYTES else 1


def _print(m: Measured) -> None:
    s = m.setting
    print(
        f"{s.clients} clients ({s.dead} silent), {m.rounds} rounds of about {m.seconds / m.rounds:.1f} s "
        f"({m.seconds / m.rounds * 1000 / s.slot_ms:.0f} slots of {s.slot_ms} ms), overlap {s.overlap}, seed {s.seed}"
    )
    for name, value, budget in (
        (
            "tick transactions per transition",
            f"{m.ticks_per_transition:.2f}",
            f"<= {TICKS_BUDGET:.0f}; {m.transitions} transitions, {m.ticks_refused} more refused unpaid by simulation",
        ),
        ("bytes received per client and round, mean", f"{m.bytes_mean:,.0f}", f"< {BUDGET_BYTES:,} with 256 members"),
        ("  the client that received most", f"{m.bytes_most:,.0f}", f"< {BUDGET_BYTES:,}"),
        ("  of the mean, by WebSocket", f"{m.pushed_mean:,.0f}", ""),
        ("requests per client and round", f"{m.requests_mean:.1f}", ""),
        ("lamports per client and round", f"{m.lamports_mean:,.0f}", "checkpoint at the end included"),
        ("void rounds", f"{m.void_rounds}", "0"),
    ):
        print(f"{name:<44}{value:>12}   {budget}")
    for members in SIZES:
        lamports = m.lamports_per_day(members, ROUND_SECONDS)
        print(
            f"lamports per node and day at {members} members, a round of {ROUND_SECONDS:.0f} s: {lamports:,.0f} "
            f"({lamports / 1e9:.4f} SOL)"
        )


if __name__ == "__main__":
    sys.exit(main())
