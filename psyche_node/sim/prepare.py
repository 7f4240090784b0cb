"""Data, tokenizer and initial model of a simulation, made in a process of its own: `python -m psyche_node.sim.prepare`.

Its memory goes back to the machine before the nodes start. It prints one JSON line, `Prepared`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from psyche_node.sim.settings import SimSettings


class Prepared(BaseModel):
    """What the run's terms and the nodes' folders are made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    data: Path
    model_root: str
    layout_digest: str
    data_manifest: str
    samples: int
    sequence_length: int
    update_bytes: int
    parameters: int
    unigram_entropy: float
    model_source: str
    data_source: str
