"""From samples of any kind to documents: token ids, and which of them are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from psyche_node.data.errors import BadSample, DataError
from psyche_node.data.formats import Sample
from psyche_node.data.lengthcontrol import close_reasoning
from psyche_node.data.samples import AnySample, Text
from psyche_node.data.skipping import Bad, refuse
from psyche_node.data.spill import Document
from psyche_node.data.template import ChatTemplate
from psyche_node.data.tokenized import Tokens

# Tokenized together, which keeps the tokenizer's threads busy. The characters bound memory: a token takes some 150
# bytes until it is an integer.
_CHUNK_SAMPLES = 2048
_CHUNK_CHARACTERS = 1 << 21
S = TypeVar("S")
T = TypeVar("T")


class Encoder:
    """Encodes samples with the tokenizer of a folder and a chat template, by default the folder's own.

    ``length_control`` is a budget for reasoning in tokens, or 0 for none; see ``close_reasoning``.

    Raises:
        DataError: the folder or the template cannot be used, or the budget is negative.
    """

    def __init__(self, tokenizer: Path, template: str | None = None, length_control: int = 0) -> None:
        if length_control < 0:
            raise DataError(
                f"a reasoning budget of {length_control} tokens is no budget. Use 0 for none; Hermes 4 has 30000"
            )
        self.template = ChatTemplate(tokenizer, template)
        self._budget = length_control
        self.vocabulary = self.template.vocabulary
        ends = (self.template.token_id(name) for name in ("pad_token", "eos_token"))
        self.pad = next((token for token in ends if token is not None), 0)

    def documents(self, samples: Iterable[AnySample], bad: Bad = refuse) -> Iterator[tuple[AnySample, Document]]:
        """Yield each sample with its document, in order.

        Raises:
            BadSample: one cannot be encoded, and ``bad`` does not pass over it.
        """
        for chunk in _chunks(map(self._controlled, samples)):
            yield from self._encoded(type(chunk[0]), chunk, bad)

    def _controlled(self, sample: AnySample) -> AnySample:
        if not self._budget or not isinstance(sample, Sample):
            return sample
        return close_reasoning(sample, self.template.tokenizer, self._budget)

    def _encoded(
        self, kind: type[AnySample], samples: list[AnySample], bad: Bad
    ) -> Iterable[tuple[AnySample, Document]]:
        if kind is Sample:
            rendered = _good(self.template.render, [one for one in samples if isinstance(one, Sample)], bad)
            kept, texts = [sample for sample, _ in rendered], [text for _, text in rendered]
            return zip(kept, self.template.tokenize(texts), strict=True)
        if kind is Text:
            return zip(samples, self._texts([one for one in samples if isinstance(one, Text)]), strict=True)
        return _good(self._tokens, [one for one in samples if isinstance(one, Tokens)], bad)

    def _texts(self, samples: list[Text]) -> Iterator[Document]:
        """Text between the tokens for its beginning, if the tokenizer has one, and its end."""
        first, last = (self.template.token_id(name) for name in ("bos_token", "eos_token"))
        encodings = self.template.tokenizer.encode_batch([one.text for one in samples], add_special_tokens=False)
        for encoding in encodings:
            ids = [token for token in (first, *encoding.ids, last) if token is not None]
            trained = np.ones(len(ids), dtype=np.bool_)
            trained[:1] = False
            yield np.array(ids, dtype=np.uint32), trained

    def _tokens(self, sample: Tokens) -> Document:
        if (largest := int(sample.ids.max())) >= self.vocabulary:
            raise BadSample(
                sample.where,
                f"the token {largest} is beyond the vocabulary of {self.vocabulary}",
                f"Name the tokenizer that made the tokens; this is {self.template.folder}",
            )
        return sample.ids, sample.trained


def _good(make: Callable[[S], T], samples: Iterable[S], bad: Bad) -> list[tuple[S, T]]:
    """Each sample with what is made of it; ``bad`` hears of those of which nothing can be made."""
    made = []
    for sample in samples:
        try:
            made.append((sample, make(sample)))
        except BadSample as error:
            bad(error)
    return made


def _chunks(samples: Iterable[AnySample]) -> Iterator[list[AnySample]]:
    """Samples of one kind in a row, as many as are encoded together."""
    chunk: list[AnySample] = []
    characters = 0
    for sample in samples:
        full = len(chunk) == _CHUNK_SAMPLES or characters >= _CHUNK_CHARACTERS
        if chunk and (full or type(sample) is not type(chunk[0])):
            yield chunk
            chunk, characters = [], 0
        chunk.append(sample)
        characters += _size(sample)
    if chunk:
        yield chunk


def _size(sample: AnySample) -> int:
    if isinstance(sample, Sample):
        return sum(len(message["content"]) for message in sample.messages)
    return len(sample.text) if isinstance(sample, Text) else len(sample.ids)
