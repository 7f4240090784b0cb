"""The AdamW run that a simulation is compared with, in a process of its own: `python -m psyche_node.sim.baseline FILE`.

FILE is a JSON `BaselineRequest`. Progress goes to standard error, the result, a JSON `Baseline`, to standard output.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from psyche_node.data.dataset import PackedDataset
from psyche_node.sim.result import Baseline, CurvePoint
from psyche_node.training.terms import TrainingTerms


class BaselineRequest(BaseModel):
    """What to train: the same model, the same data, the same positions in each round."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    data: Path
    terms: TrainingTerms
    rounds: list[list[int]]
    evaluate_every: int
    device: str
    threads: int


def main() -> int:
    # Threads that wait must not spin: where the cores are shared, that made the run several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from psyche_node.training.baseline import (
        run_adamw,
    )  # torch: the simulation itself, which makes the request, has none

    request = BaselineRequest.model_validate_json(Path(sys.argv[1]).read_bytes())
    result = run_adamw(
        request.model,
        PackedDataset(request.data),
        request.terms,
        request.rounds,
        evaluate_every=request.evaluate_every,
        device=request.device,
        threads=request.threads,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    baseline = Baseline(
        loss=list(result.loss),
        heldout_curve=[CurvePoint(round=number, loss=loss) for number, loss in result.heldout_curve],
        heldout_loss=result.heldout_loss,
        learning_rate=result.learning_rate,
        wall_seconds=result.wall_seconds,
    )
    print(baseline.model_dump_json(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
