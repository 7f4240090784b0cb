"""Compute units of the on-chain program, per instruction and number of members: `python -m benchmarks.program_cu`.

Prints a table and, with `--json FILE`, writes the figures. They are deterministic: the same program gives the same
numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "coordinator" / "program"))

from program_costs import measure, over_budget

SIZES = (4, 64, 256)


def main() -> int:
    """Exit status 1 when an instruction is over the protocol's budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    columns = {size: measure(size) for size in SIZES}
    width = max(len(name) for name in columns[SIZES[-1]])
    print(f"{'compute units with members:':<{width}}" + "".join(f"{size:>9}" for size in SIZES))
    for name in columns[SIZES[-1]]:
        print(f"{name:<{width}}" + "".join(f"{columns[size].get(name, 0):>9,}" for size in SIZES))
    if options.json:
        options.json.write_text(json.dumps(columns, indent=2) + "\n", encoding="utf-8")
    broken = {size: over_budget(costs) for size, costs in columns.items() if over_budget(costs)}
    print(f"over budget: {broken}" if broken else "all within budget (60,000; commit and attest 10,000)")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
