"""What a slow line costs, with overlap and without: `python -m benchmarks.overlap` (six minutes on two cores).

Three simulations of the same run: without a line; over one whose transfers take a good half of the time that a round is
computed, with overlap 1; and the same with overlap 0. The line's rate follows from the first run, so the benchmark is
the same on any machine. Printed per run: tokens per second, what a round's training, waiting and the whole of it take
(medians), and the share of the time in which the models were not idle.

With overlap the line must cost less than 5% of the throughput; without, the round gets longer by what the transfer
takes. Throughput is also given at equal speed of the cores (the busy shares compared), which other work on this
machine moves less. Exit status 1 when the first of these is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from psyche_node.sim.result import RoundRecord, RunResult, load_result

TRANSFER_SHARE = 0.6
RTT_MS = 80
LARGEST_COST = 0.05
# The first rounds load what later ones have in memory, and with overlap the first one waits for nothing.
SKIPPED = 2


def simulate(folder: Path, name: str, options: argparse.Namespace, overlap: int, link: str | None) -> RunResult:
    out = folder / name
    command = [sys.executable, "-m", "psyche_node.sim.cli", "--out", str(out), "--overlap", str(overlap)]
    command += ["--nodes", str(options.nodes), "--rounds", str(options.rounds), "--batch", str(options.batch)]
    command += ["--same-hosts", "--check-every", "0", "--evaluate-every", "0", "--seed", "1"]
    if link is not None:
        command += ["--link", link]
    print(f"{name}: {'no line' if link is None else link}, overlap {overlap} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: psyche-sim ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return load_result(out / "report.json")


def measured(result: RunResult) -> list[RoundRecord]:
    """The rounds that count: not the first ones, and not the last, after which nobody trains again."""
    return [record for record in result.timeline if SKIPPED <= record.round < result.rounds - 1]


def figures(result: RunResult) -> dict[str, float]:
    records = measured(result)
    rows = [row for record in records for row in record.members if row.train_start is not None and row.train_end]
    trained = [row.train_end - row.train_start for row in rows]  # type: ignore[operator]
    applied, waited = [row.apply_seconds for row in rows], [row.wait_seconds for row in rows]
    worked = sum(trained) + sum(applied)
    seconds = records[-1].end - records[0].start
    return {
        "tokens_per_second": sum(record.tokens for record in records) / seconds,
        "train_seconds": statistics.median(trained),
        "wait_seconds": statistics.median(waited),
        "round_seconds": seconds / len(records),
        "busy": worked / (worked + sum(waited)),
    }


def line(result: RunResult, nodes: int) -> tuple[str, float]:
    """A line over which a round's updates take TRANSFER_SHARE of the time that the first run trained a round, and how
    long that is in seconds: each node sends as many updates as it receives."""
    seconds = TRANSFER_SHARE * figures(result)["train_seconds"]
    kbit = 8 * result.update_bytes * (nodes - 1) / seconds / 1000
    return f"{max(1, round(kbit))}kbit/{RTT_MS}ms", seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, help="nodes, best one per core (default: 2)")
    parser.add_argument("--rounds", type=int, default=14, help="rounds of each run (default: 14)")
    parser.add_argument("--batch", type=int, default=96, help="sequences per round: more make it longer (default: 96)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.rounds < SKIPPED + 3:
        raise SystemExit(f"--rounds: at least {SKIPPED + 3}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        free = simulate(folder, "no-line", options, 1, None)
        link, transfer = line(free, options.nodes)
        results = {
            "no line, overlap 1": free,
            "line, overlap 1": simulate(folder, "overlap-1", options, 1, link),
            "line, overlap 0": simulate(folder, "overlap-0", options, 0, link),
        }
    runs = {name: figures(result) for name, result in results.items()}
    base = runs["no line, overlap 1"]
    print(f"{options.nodes} nodes, updates of {free.update_bytes:,} bytes, line {link}: {transfer:.2f} s for a round's")
    print(
        f"{'':<22}{'tokens/s':>9}{'training':>10}{'waiting':>9}{'round':>8}{'busy':>7}{'cost':>7}{'at equal speed':>16}"
    )
    for name, run in runs.items():
        run["cost"] = 1 - run["tokens_per_second"] / base["tokens_per_second"]
        run["cost_at_equal_speed"] = 1 - run["busy"] / base["busy"]
        print(
            f"{name:<22}{run['tokens_per_second']:>9,.0f}{run['train_seconds']:>8.2f} s{run['wait_seconds']:>7.2f} s"
            f"{run['round_seconds']:>6.2f} s{run['busy']:>7.0%}{run['cost']:>7.1%}{run['cost_at_equal_speed']:>16.1%}"
        )
    more = runs["line, overlap 0"]["wait_seconds"] - base["wait_seconds"]
    print(f"without overlap a round waits {more:.2f} s longer; the transfer takes {transfer:.2f} s")
    cost = runs["line, overlap 1"]["cost_at_equal_speed"]
    print(f"goal, less than {LARGEST_COST:.0%} with overlap: {'met' if cost < LARGEST_COST else 'MISSED'}")
    if options.json:
        found: dict[str, Any] = {"link": link, "transfer_seconds": transfer, "runs": runs}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0 if cost < LARGEST_COST else 1


if __name__ == "__main__":
    sys.exit(main())
