"""The base of everything in ``report.json``, and the kinds of its numbers."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN; a loss that diverged is reported as unknown."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Count = Annotated[int, Field(ge=0)]
Loss = Annotated[float | None, BeforeValidator(_finite)]
Seconds = Annotated[float, Field(ge=0)]


class Record(BaseModel):
    """Base of every object in the report: immutable, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
