"""Length control at small scale: a model whose reasoning often never ends, and a second stage that ends it.

    python -m benchmarks.length_control                       # two cores, under six minutes
    python -m benchmarks.length_control --seed 1 --out FILE   # another seed, and the figures as JSON

Stage 1 trains a model from nothing on traces of which half never end (`sums`). Stage 2 is that of the Hermes 4 report,
by the recipe `length-control` and `psyche_node.data.prepare(length_control=...)`: the model is asked questions that it
was trained on; of the answers that do not end, only the end of the reasoning at a budget and the end token are trained;
samples of stage 1 are mixed in. Both stages are trained by two members with the product's sessions and optimizer.

Two baselines get as many rounds on the same terms: `continued` on stage 1's set, and `unmasked` on stage 2's samples,
prepared without length control. Held-out questions are asked once each, at temperature 1. Exit status 1 unless every
criterion is met.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.length_control.experiment import Plan, run
from benchmarks.length_control.verdict import criteria, table


def main() -> None:
    plan = Plan()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--seed", type=int, default=plan.seed)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder), Plan(seed=args.seed), lambda line: print(line, flush=True))
    seconds = time.monotonic() - started
    verdict = criteria(figures)
    print(f"\n{table(figures)}\n")
    for one in verdict:
        print(f"{'PASS  ' if one.met else 'MISSED'} {one.text}")
    print(f"\n{seconds:.0f} s, {time.process_time():.0f} s of processors, seed {args.seed}")
    if args.out is not None:
        machine = f"{platform.machine()}, torch {torch.__version__}, {args.threads} threads"
        record = {"machine": machine, "seconds": round(seconds), **figures.model_dump()}
        record["criteria"] = {one.text: one.met for one in verdict}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    raise SystemExit(not all(one.met for one in verdict))


if __name__ == "__main__":
    main()
