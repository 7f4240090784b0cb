"""What pydantic finds is said in this project's words: where, which value, and what is allowed."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from psyche_node.wording import problems


class Part(BaseModel):
    regex: str


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["one", "two"] = "one"
    limit: int = Field(default=0, ge=0)
    share: float = Field(default=0.5, gt=0, lt=1)
    on: bool = False
    names: list[str] = Field(default=[], min_length=1, max_length=2)
    code: str = Field(default="a", min_length=1, max_length=3, pattern="^[a-z]*$")
    extract: list[Literal["whole"] | Part] = []
    even: int = 0
    part: Part | None = None

    @field_validator("even")
    @classmethod
    def _is_even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd")
        return value


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"kind": "three"}, ("kind", "it is 'three'; allowed: 'one' or 'two'")),
        ({"limit": -1}, ("limit", "it is -1; it must be at least 0")),
        ({"limit": "many"}, ("limit", "it is 'many'; it must be a whole number")),
        ({"limit": None}, ("limit", "it is null; it must be a whole number")),
        ({"share": 1}, ("share", "it is 1; it must be less than 1.0")),
        ({"on": "perhaps"}, ("on", "it is 'perhaps'; it must be true or false")),
        ({"names": []}, ("names", "it has 0 entries; at least 1 is needed")),
        ({"names": ["a"] * 3}, ("names", "it has 3 entries; at most 2 are taken")),
        ({"names": {"a": 1}}, ("names", "it is an object; it must be a list")),
        ({"names": ["a", 7]}, ("names[1]", "it is 7; it must be a string")),
        ({"code": "abcd"}, ("code", "it has 4 characters; at most 3 are taken")),
        ({"code": "A"}, ("code", "it is 'A'; it must match ^[a-z]*$")),
        ({"extract": ["whole", "half"]}, ("extract[1]", "it is 'half'; allowed: 'whole'")),
        ({"even": 3}, ("even", "3 is odd")),
        ({"part": {}}, ("part.regex", "it is missing")),
        ({"limits": 3}, ("limits", "there is no such key; perhaps `limit` is meant")),
        ({"colour": 3}, ("colour", f"there is no such key; known are {', '.join(Settings.model_fields)}")),
        ({"code": 7 * "x" * 99}, ("code", "it has 693 characters; at most 3 are taken")),
    ],
)
def test_words(values: dict[str, Any], expected: tuple[str, str]) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(values)
    assert problems(caught.value, Settings) == [expected]
    assert "pydantic" not in expected[1]
