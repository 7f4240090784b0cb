"""Text to tokens and the characters of each, with control tokens only where the chat template put them.

Legend: L tokens of a text.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from psyche_node.data.errors import DataError
from psyche_node.folder_files import hub_hint


@dataclass(slots=True)
class Coded:
    """Token ids (L,), and of each the characters [start, end) that it is made of. Both ascend."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def inside(self, start: int, end: int) -> range:
        """Return the tokens that lie in the characters [start, end) with all of theirs."""
        first = bisect.bisect_left(self.offsets, start, key=lambda token: token[0])
        last = bisect.bisect_right(self.offsets, end, key=lambda token: token[1])
        return range(first, max(first, last))


class TextCoder:
    """A tokenizer, by what its ``tokenizer.json`` says. Raises whatever `tokenizers` does for what is none."""

    def __init__(self, state: dict[str, Any]) -> None:
        # Post-processors take the blanks off a token's characters, which would hide that it reaches out of a span.
        self._state = {**state, "post_processor": None}
        self.tokenizer = _load(self._state)
        added = {token.content: number for number, token in self.tokenizer.get_added_tokens_decoder().items()}
        self._added = frozenset(added.values())
        self._controlling = frozenset(number for text, number in added.items() if not text.isspace())
        self.controls = tuple(sorted(added, key=lambda text: (-len(text), text)))
        """The texts of all control tokens, longest first."""
        # Runs of blanks, which some tokenizers add for program text, control nothing.
        spelled = [re.escape(text) for text in self.controls if not text.isspace()]
        self.spelled = re.compile("|".join(spelled) or r"(?!)")
        """Matches the text of any control token."""

    @classmethod
    def read(cls, folder: Path) -> TextCoder:
        """Return the tokenizer of a Hugging Face folder. Raises DataError if it cannot be read."""
        if not folder.is_dir():
            wrong = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
            what = "Name the Hugging Face folder that holds the tokenizer's tokenizer.json"
            raise DataError(f"{wrong}. {what}{hub_hint(folder)}")
        path = folder / "tokenizer.json"
        try:
            return cls(json.loads(path.read_bytes()))
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(
                f"{path} cannot be read ({error}). Save the tokenizer with transformers' "
                "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`, which writes one"
            ) from error

    @property
    def vocabulary(self) -> int:
        """One more than the largest token id."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def _plain(self) -> Tokenizer:
        """The same tokenizer, to which control tokens are text like any other."""
        return _load({**self._state, "added_tokens": []})

    def encode(self, texts: Sequence[str], quoted: Sequence[Sequence[int]]) -> list[Coded]:
        """Encode together, in parallel. A control token around one of a text's places in ``quoted`` becomes text."""
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        coded = [Coded(encoding.ids, encoding.offsets) for encoding in encodings]
        return [self._unquoted(*one) if one[2] else one[1] for one in zip(texts, coded, quoted, strict=True)]

    def _unquoted(self, text: str, coded: Coded, quoted: Sequence[int]) -> Coded:
        """Between control tokens that are real, encode again what has some that are not."""
        result = Coded([], [])
        start = begin = 0  # first token, and first character, since the last real control token
        false = False
        for number, (token, (left, right)) in enumerate(zip(coded.ids, coded.offsets, strict=True)):
            if token not in self._added:
                continue
            at = bisect.bisect_right(quoted, left)
            if at < len(quoted) and quoted[at] <= right:  # at its end, where it is a single character
                false = True
                continue
            self._append(result, text, coded, range(start, number), (begin, left), quoted if false else ())
            result.ids.append(token)
            result.offsets.append((left, right))
            start, begin, false = number + 1, right, False
        self._append(result, text, coded, range(start, len(coded.ids)), (begin, len(text)), quoted if false else ())
        return result

    def _append(
        self,
        result: Coded,
        text: str,
        coded: Coded,
        tokens: range,
        characters: tuple[int, int],
        quoted: Sequence[int],
    ) -> None:
        """Add what is between two real control tokens; encoded again, if it has ``quoted`` places."""
        if not quoted:
            result.ids += coded.ids[tokens.start : tokens.stop]
            result.offsets += coded.offsets[tokens.start : tokens.stop]
            return
        left, right = characters
        again = self._plainly(text, left, right)
        if not self._controlling.isdisjoint(again.ids):
            # A vocabulary of pieces has control tokens as pieces of text, too. No piece goes over where text is cut.
            cuts = [left, *(place for place in quoted if left < place < right), right]
            parts = [self._plainly(text, a, b) for a, b in pairwise(cuts)]
            again = Coded([n for one in parts for n in one.ids], [at for one in parts for at in one.offsets])
        result.ids += again.ids
        result.offsets += again.offsets

    def _plainly(self, text: str, left: int, right: int) -> Coded:
        encoding = self._plain.encode(text[left:right], add_special_tokens=False)
        return Coded(encoding.ids, [(left + a, left + b) for a, b in encoding.offsets])


def _load(state: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
