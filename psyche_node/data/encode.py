"""From samples of any kind to documents: token ids, and which of them are trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from psyche_node.data.errors import BadSample
from psyche_node.data.formats import Sample
from psyche_node.data.samples import AnySample, Text
from psyche_node.data.spill import Document
from psyche_node.data.template import ChatTemplate
from psyche_node.data.tokenized import Tokens

_CHUNK = 2048  # samples tokenized together: bounds memory, keeps the threads of the tokenizer busy


class Encoder:
    """Encodes samples with the tokenizer and the chat template of a folder.

    Raises:
        DataError: the folder cannot be used.
    """

    def __init__(self, tokenizer: Path) -> None:
        self.template = ChatTemplate(tokenizer)
        self.vocabulary = self.template.vocabulary
        ends = (self.template.token_id(name) for name in ("pad_token", "eos_token"))
        self.pad = next((token for token in ends if token is not None), 0)

    def documents(self, samples: Iterable[AnySample]) -> Iterator[tuple[AnySample, Document]]:
        """Yield each sample with its document, in order. Raises BadSample for one that cannot be encoded."""
        stream = iter(samples)
        while chunk := list(itertools.islice(stream, _CHUNK)):
            for kind, group in itertools.groupby(chunk, type):
                alike = list(group)
                yield from zip(alike, self._encoded(kind, alike), strict=True)

    def _encoded(self, kind: type[AnySample], samples: list[AnySample]) -> Iterable[Document]:
        if kind is Sample:
            return self.template.encode([one for one in samples if isinstance(one, Sample)])
        if kind is Text:
            return self._texts([one for one in samples if isinstance(one, Text)])
        return [self._tokens(one) for one in samples if isinstance(one, Tokens)]

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
