"""What happens to a batch while it is generated: each sequence has its own end, its own text and its own listener."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from transformers.generation.stopping_criteria import StoppingCriteria

from psyche_node.generation.request import Completion, FinishReason, Request
from psyche_node.generation.text import Detokenizer, StopText

Listener = Callable[[str, Completion | None], bool]
"""Called per token with what is new of the text (it may be empty) and, the last time, the whole completion.

Returns False to end this sequence, which is then told as any other end is.
"""


def deaf(_piece: str, _done: Completion | None) -> bool:
    """The listener of one who waits for the whole answer."""
    return True


class Answer:
    """One sequence as it grows."""

    def __init__(
        self, request: Request, limit: int, decode: Callable[[Sequence[int]], str], listener: Listener = deaf
    ) -> None:
        self._request, self._limit, self._listener = request, limit, listener
        self._words, self._stop = Detokenizer(decode), StopText(request.stop)
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self.finish_reason: FinishReason | None = None

    def take(self, token: int, *, end: bool) -> None:
        """Add a token, or end at the model's end token."""
        if self.finish_reason is not None:
            return
        piece = ""
        if end:
            self.finish_reason = "stop"
        else:
            self._tokens.append(token)
            piece = self._stop.feed(self._words.feed(token))
            if self._stop.found:
                self.finish_reason = "stop"
            elif len(self._tokens) >= self._limit:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            piece += self._rest()
        if not self._tell(piece) and self.finish_reason is None:
            self.finish_reason = "length"
            self._tell(self._rest())

    def completion(self) -> Completion:
        """The finished answer."""
        reason = self.finish_reason or "length"
        return Completion(tuple(self._tokens), "".join(self._pieces), reason, len(self._request.prompt))

    def _tell(self, piece: str) -> bool:
        if piece:
            self._pieces.append(piece)
        return self._listener(piece, None if self.finish_reason is None else self.completion())

    def _rest(self) -> str:
        piece = self._stop.feed(self._words.finish())
        if self._stop.found:
            self.finish_reason = "stop"
        return piece + self._stop.finish()


class Watch(StoppingCriteria):
    """Hands each new token to its answer, and ends the sequences that are done."""

    def __init__(self, answers: Sequence[Answer], eos: Collection[int]) -> None:
        self._answers, self._eos = answers, frozenset(eos)

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        """Return which sequences are done, (B,) bool; ids are (B, L)."""
        for answer, token in zip(self._answers, input_ids[:, -1].tolist(), strict=True):
            answer.take(token, end=token in self._eos)
        done = [answer.finish_reason is not None for answer in self._answers]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)
