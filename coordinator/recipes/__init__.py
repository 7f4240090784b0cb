"""Shipped recipes: whole training configs with their sources, to begin a run from.

A recipe has the sections of a run's settings, `[limits]` and `[terms]`, without what follows from a model and a data
set. `psyche-admin run create --recipe NAME` and `psyche-sim --recipe NAME` begin with it; files and flags go over it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from pydantic import Field, model_validator

from coordinator.run_config import ConfigError, LimitSettings, Settings, TrainingSettings, read_toml, validated

FOLDER: Final = Path(__file__).resolve().parent


class About(Settings):
    """What a recipe is for, and where its numbers come from."""

    title: str = Field(min_length=1)
    """One line."""
    text: str = Field(min_length=1)
    """When to use it, and what to change for another model."""
    sources: tuple[str, ...] = ()
    """Papers and model cards with the numbers."""


class DataSettings(Settings):
    """What the data of a recipe is prepared with: flags of `psyche-node data prepare`, which trains the assistant's
    tokens only."""

    template: str = ""
    """Chat template: a shipped one's name; none: the tokenizer's own."""
    length_control: int = Field(default=0, ge=0)
    """Tokens after which reasoning is ended, and only its end trained; 0: wherever the sample ends it."""
    vocabulary: int = Field(default=0, ge=0)
    """Tokens of a tokenizer that is trained on the data, for models that bring none; 0: the model brings one."""


class Recipe(Settings):
    """A training config without model and data. Unknown keys are errors."""

    about: About
    data: DataSettings = DataSettings()
    limits: LimitSettings
    terms: TrainingSettings

    @model_validator(mode="after")
    def _schedule_fits(self) -> Recipe:
        self.terms.check_schedule(self.limits.total_rounds)
        return self

    def settings(self) -> dict[str, Any]:
        """The keys that it sets, as a run's file has them."""
        return self.model_dump(include={"limits", "terms"}, exclude_unset=True)


def recipe_names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def recipe_file(name: str) -> Path:
    """The file of a recipe. Raises ConfigError if there is none of that name."""
    if name not in recipe_names():
        raise ConfigError(f"there is no recipe {name!r}; there are {', '.join(recipe_names())}")
    return FOLDER / f"{name}.toml"


def load_recipe(name: str) -> Recipe:
    """A shipped recipe. Raises ConfigError."""
    return validated(Recipe, read_toml(recipe_file(name)), f"recipe {name}")
