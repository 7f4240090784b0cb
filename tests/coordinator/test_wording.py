"""What pydantic finds is said in this project's words: where, which value, and what is allowed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from coordinator.wording import problems


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    regex: str


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["one", "two"] = "one"
    limit: int = Field(default=0, ge=0)
    fee: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    share: float = Field(default=0.5, gt=0, lt=1, allow_inf_nan=False)
    on: bool = False
    names: list[str] = Field(default=[], min_length=1, max_length=2)
    code: str = Field(default="a", min_length=1, max_length=3, pattern="^[a-z]*$")
    extract: list[Literal["whole"] | Part] = []
    even: int = 0
    part: Part = Part(regex="")
    root: str = Field(default=64 * "0", pattern="^[0-9a-fA-F]{64}$")

    @field_validator("even")
    @classmethod
    def _is_even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd")
        return value


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"kind": "three"}, ("kind", "it is 'three'; it must be 'one' or 'two'")),
        ({"limit": -1}, ("limit", "it is -1; it must be at least 0")),
        ({"fee": -1}, ("fee", "it is -1; it must be at least 0 or 'auto'")),
        ({"fee": "fast"}, ("fee", "it is 'fast'; it must be a whole number or 'auto'")),
        ({"limit": "many"}, ("limit", "it is 'many'; it must be a whole number")),
        ({"limit": None}, ("limit", "it is null; it must be a whole number")),
        ({"share": 1}, ("share", "it is 1; it must be less than 1.0")),
        ({"on": "perhaps"}, ("on", "it is 'perhaps'; it must be true or false")),
        ({"names": []}, ("names", "it has 0 entries; it must have at least 1")),
        ({"names": ["a"] * 3}, ("names", "it has 3 entries; it must have at most 2")),
        ({"names": {"a": 1}}, ("names", "it is an object; it must be a list")),
        ({"names": ["a", 7]}, ("names[1]", "it is 7; it must be a string")),
        ({"code": "abcd"}, ("code", "it has 4 characters; it must have at most 3")),
        ({"code": "A"}, ("code", "it is 'A'; it must match ^[a-z]*$")),
        (
            {"extract": ["whole", "half"]},
            ("extract[1]", "it is 'half'; it must be 'whole' or an object with keys of its own"),
        ),
        ({"even": 3}, ("even", "3 is odd")),
        ({"part": {}}, ("part.regex", "it is missing")),
        ({"part": 3}, ("part", "it is 3; it must be an object with keys of its own")),
        ({"part": {"rejex": "a", "regex": "b"}}, ("part.rejex", "there is no such key; did you mean regex?")),
        ({"reges": "a"}, ("reges", "there is no such key; did you mean part.regex?")),
        ({"root": "ab"}, ("root", "it is 'ab'; it must be 32 bytes in hex: 64 digits")),
        ({"share": float("inf")}, ("share", "it is inf; it must be a finite number")),
        ({"Colour": 3}, ("Colour", f"there is no such key; known are {', '.join(Settings.model_fields)}")),
        ({"limits": 3}, ("limits", "there is no such key; did you mean limit?")),
        ({"colour": 3}, ("colour", f"there is no such key; known are {', '.join(Settings.model_fields)}")),
        ({"code": 7 * "x" * 99}, ("code", "it has 693 characters; it must have at most 3")),
    ],
)
def test_words(values: dict[str, Any], expected: tuple[str, str]) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(values)
    assert problems(caught.value, Settings) == [expected]
    assert "pydantic" not in expected[1]


def test_section_and_origin_are_named() -> None:
    flags, file = {"limit": -1}, {"limit": 3, "limits": 4, "part": {"regex": 5}, "even": 3}
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(file | flags)
    assert problems(caught.value, Settings, "terms", [("--set", flags), ("run.toml", file)]) == [
        ("terms.limit", "it is -1 (--set); it must be at least 0"),
        ("terms.even", "3 is odd (run.toml)"),
        ("terms.part.regex", "it is 5 (run.toml); it must be a string"),
        ("terms.limits", "there is no such key (run.toml); did you mean limit?"),
    ]
