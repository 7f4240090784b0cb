"""How a node runs the model: settings that do not change what a member sends, but for ``precision``. Without torch."""

from __future__ import annotations

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
