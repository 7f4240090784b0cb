"""What a generated text answers, and whether that is right.

Normalisation is SQuAD's (Rajpurkar et al. 2016): lower case, no punctuation, no articles, single blanks.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

# A sign is none after a word or a number (3-5, 2026-11-28); a comma divides thousands, or two numbers.
_NUMBER = re.compile(r"(?:(?<![\w.)\]])[-+\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_MINUS = "\u2212"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _valid_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


class Regex(BaseModel):
    """The last match of a pattern: its first group, or all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    regex: Annotated[str, AfterValidator(_valid_pattern)]


Extractor = Literal["whole", "first_line", "last_number", "boxed"] | Regex


def extract(extractors: Sequence[Extractor], text: str) -> str | None:
    """Return the answer by the first extractor that finds one; None if none does."""
    for extractor in extractors:
        found = _by_pattern(extractor, text) if isinstance(extractor, Regex) else EXTRACTORS[extractor](text)
        if found is not None:
            return found
    return None


def matches(answer: str | None, accepted: Sequence[str], how: Literal["exact", "normalised", "number"]) -> bool:
    """Whether an answer is one of the accepted ones."""
    if answer is None:
        return False
    if how == "exact":
        return answer.strip() in {one.strip() for one in accepted}
    value = _value(answer)
    if how == "normalised":
        # Without its punctuation -3.5 would be 35.
        alike = [one for one in accepted if normalised(one) == normalised(answer)]
        return any(None in (value, _value(one)) or value == _value(one) for one in alike)
    return value is not None and any(value == _value(one) for one in accepted)


def normalised(text: str) -> str:
    """Without case, punctuation and articles; of a text that is nothing else ("A") only the case goes."""
    folded = text.casefold()
    return " ".join(_ARTICLES.sub(" ", folded.translate(_PUNCTUATION)).split()) or folded.strip()


def _whole(text: str) -> str | None:
    return text.strip() or None


def _first_line(text: str) -> str | None:
    return next((line.strip() for line in text.splitlines() if line.strip()), None)


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").replace(_MINUS, "-") if found else None


def _boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, braces inside it balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    return None


def _by_pattern(extractor: Regex, text: str) -> str | None:
    found = list(re.finditer(extractor.regex, text))
    if not found:
        return None
    group: str | None = found[-1].group(1 if found[-1].re.groups else 0)
    return None if group is None else group.strip()


def _value(text: str) -> Decimal | None:
    try:
        value = Decimal(text.strip().replace(",", "").replace(_MINUS, "-").rstrip("."))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "whole": _whole,
    "first_line": _first_line,
    "last_number": _last_number,
    "boxed": _boxed,
}
