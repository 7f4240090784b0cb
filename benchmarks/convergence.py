"""Loss against bytes: variants of the optimizer with simulated members beside AdamW, same model, data and tokens.

    python -m benchmarks.convergence                                  # the default beside AdamW
    python -m benchmarks.convergence --list                           # named sets of runs
    python -m benchmarks.convergence --set ablation --small --seeds 0 1 2
    python -m benchmarks.convergence --grid topk=8,32,128 values=votes,fp32 overlap=0,1

Every finished run is appended to --out as one line of JSON, at once. Runs that are there already are not repeated.
Tables come from that file; `--table` runs nothing. `--small` is several times faster, for first
orderings only: its gaps have been far smaller than those of the default size, whose blocks are full (hidden 96 leaves
a third of them empty, so that more coefficients are sent per parameter).

Members see disjoint sequences of each round. All tokens are targets, the prompts', too (`--assistant-only`: answers
only). AdamW takes the batch of all members at once. `--lr` gives peak rates to try with every method; the tables show
the best of those in the file. Held-out loss is that of the shared weights.
"""

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.laboratory import Recipe, parsed
from benchmarks.laboratory_model import Scale
from benchmarks.laboratory_runs import Trial, run
from benchmarks.laboratory_sets import SETS, Entry
from benchmarks.laboratory_table import table

SMALL = Scale(hidden=96, layers=3)


def grid(options: Sequence[str]) -> list[Entry]:
    """The cross product of `name=value,value` options. Raises ValueError with what is wrong."""
    axes = []
    for option in options:
        name, found, values = option.partition("=")
        if not found:
            raise ValueError(f"{option!r} is no option; write name=value,value")
        axes.append([(name, parsed(name, value)) for value in values.split(",")])
    return [
        Entry(" ".join(f"{name}={value}" for name, value in point), "laboratory", dict(point))
        for point in product(*axes)
    ]


def trials(entries: Sequence[Entry], args: argparse.Namespace) -> Iterator[tuple[str, Trial]]:
    """Every run that was asked for, with its label."""
    scale = SMALL if args.small else Scale(hidden=args.hidden, layers=args.layers)
    scale = replace(scale, length=args.length, assistant_only=args.assistant_only)
    for seed, entry in product(args.seeds, entries):
        for lr in args.lr or [None]:
            recipe = replace(Recipe(), **(entry.options | ({} if lr is None else {"lr": lr})))
            trial = Trial(
                method=entry.method,
                recipe=recipe,
                scale=scale,
                rounds=args.rounds,
                sequences=args.sequences,
                members=args.members,
                seed=seed,
                after=args.after,
            )
            yield entry.label, trial


def known(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", choices=SETS, default=[], help="named sets of runs; see --list")
    parser.add_argument("--only", nargs="+", default=[], metavar="LABEL", help="of those sets only these runs")
    parser.add_argument("--list", action="store_true", help="show the sets and the options of the grid")
    parser.add_argument("--grid", nargs="+", default=[], metavar="OPTION=VALUE,VALUE", help="cross product of options")
    parser.add_argument("--lr", type=float, nargs="*", default=[], help="peak learning rates to try with every method")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--sequences", type=int, default=8, help="per round, of all members together")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--small", action="store_true", help="half a million parameters instead of three")
    parser.add_argument("--assistant-only", action="store_true", help="answers are targets, prompts are not")
    parser.add_argument("--after", type=int, default=0, help="continue from that many rounds of AdamW, on other data")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/convergence.jsonl"))
    parser.add_argument("--table", action="store_true", help="run nothing, print what --out holds")
    args = parser.parse_args()
    if args.list:
        for name, entries in SETS.items():
            print(name, *(f"  {entry.label!r}" for entry in entries), sep="\n")
        for field in fields(Recipe):
            print(f"  {field.name}={field.default}")
        return
    if args.sequences % args.members:
        parser.error(f"{args.sequences} sequences cannot be shared by {args.members} members")
    torch.set_num_threads(args.threads)
    try:
        entries = [entry for name in args.set for entry in SETS[name]] + (grid(args.grid) if args.grid else [])
    except ValueError as problem:
        parser.error(str(problem))
    entries = [entry for entry in entries if not args.only or entry.label in args.only]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for label, trial in [] if args.table else trials(entries or SETS["default"], args):
        described = json.loads(json.dumps(asdict(trial)))
        if any(record["trial"] == described for record in known(args.out)):
            continue
        outcome = run(trial)
        record = {"label": label, "machine": f"{platform.machine()}, torch {torch.__version__}"} | outcome.record()
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{label}, lr {trial.recipe.lr:g}, seed {trial.seed}: {outcome.heldout:.3f}", flush=True)
    print(table(known(args.out)))


if __name__ == "__main__":
    main()
