"""How a simulation trains: a shipped recipe, made to fit one machine and a small model."""

from __future__ import annotations

from typing import Any, Final

from pydantic import Field

from coordinator.recipes import load_recipe
from coordinator.run_config import TrainingSettings

DEMO: Final = "demo"


class SimRecipe(TrainingSettings):
    """How the model is trained: what goes on chain as the run's terms. The defaults are those of the recipe `demo`."""

    sequence_length: int = Field(ge=16)
    """Tokens per packed sequence."""
    topk: int = Field(ge=1, le=512)
    """Coefficients kept of each block of 4,096: more is better and larger."""
    batch: int = Field(ge=1)
    """Sequences per round, all members together."""
    vocabulary: int = Field(ge=300)
    """Tokens of the tokenizer that is trained on the data when the model brings none."""
    overlap: int = Field(default=0, ge=0, le=1)
    """1: updates travel while the next round is trained. 0: each round waits for its own."""


def recipe_for(name: str, rounds: int, **changes: Any) -> SimRecipe:
    """The recipe of that name, for a run of ``rounds`` rounds with a small model on this machine.

    Schedule, decays, clipping, lookahead and overlap are the recipe's; warm-up, decay and ramp are as long a part of
    the run as there, if the run is shorter. What depends on the size of the model is `demo`'s: the sequence's length,
    the batch, topk and the peak of the learning rate, to which the other rate and the ramp keep their proportion.

    Args:
        changes: fields that are set otherwise.

    Raises:
        ConfigError: there is no such recipe.
        ValidationError: a change is out of range.
    """
    recipe, small = load_recipe(name), load_recipe(DEMO)
    values = recipe.terms.model_dump()
    size, batch = small.terms, small.limits.batch
    part = min(1.0, rounds / recipe.limits.total_rounds)
    ramp_rounds = round(recipe.terms.ramp_rounds * part)
    values |= {
        "sequence_length": size.sequence_length,
        "topk": size.topk,
        "peak_lr": size.peak_lr,
        "final_lr": size.peak_lr * (recipe.terms.final_lr / recipe.terms.peak_lr),
        "warmup_rounds": round(recipe.terms.warmup_rounds * part),
        "decay_rounds": round(recipe.terms.decay_rounds * part),
        "ramp_rounds": ramp_rounds,
        "ramp_batch": max(1, recipe.terms.ramp_batch * batch // recipe.limits.batch) if ramp_rounds else 0,
        "batch": batch,
        "vocabulary": small.data.vocabulary,
        "overlap": recipe.limits.overlap,
    }
    return SimRecipe.model_validate({**values, **changes})
