"""How a node runs the model: settings that do not change what a member sends, but for ``precision``. Without torch."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict

Precision = Literal["fp32", "bf16"]
"""What the weights are kept in."""


class Options(BaseModel):
    """Unknown keys are errors. The texts for operators are in ``node.config``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """All members of a run need the same; ``auto`` takes what the run's layout digest was made for."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    attention: Literal["auto", "sdpa", "eager", "flex", "flash"] = "auto"
    compile: bool = False


DEFAULTS = Options()


def known_device(device: str) -> str:
    """Return the name of a device to train on. Raises ValueError for one that PyTorch would not be asked for."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"{device!r} is no device to train on; use auto, cpu, cuda or cuda:1")
    return device
