"""Generated answers, in pieces: what is cut off between two of a node's rounds goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from psyche_node.evaluation.steps import Steps
from psyche_node.generation import Engine, Request

Cut = Callable[[], bool]
"""Whether to stop at the next token; what is there is kept."""


def never() -> bool:
    """Whoever waits for the whole result does not cut."""
    return False


@dataclass(frozen=True, slots=True)
class Reply:
    """A generated text, marks of reasoning included. ``ended``: by the model or a stop string, not by the budget."""

    text: str
    tokens: int
    ended: bool


@dataclass(slots=True)
class _Growing:
    """An answer in the making: its request, the tokens that it may have, those it has."""

    request: Request
    limit: int
    tokens: list[int] = field(default_factory=list)

    def next_piece(self) -> Request:
        prompt = (*self.request.prompt, *self.tokens)
        return replace(self.request, prompt=prompt, max_new_tokens=self.limit - len(self.tokens))


def answer(engine: Engine, requests: Sequence[Request], cut: Cut = never) -> Steps[list[Reply]]:
    """A step per batch, and one more per cut; returns the replies, in the order of ``requests``.

    A cut costs the next piece the work of reading what there is. Sampled answers are never cut: their noise could not
    go on. Raises PromptError for a prompt that leaves no room.
    """
    replies: list[Reply | None] = [None] * len(requests)
    for batch in engine.batches(requests):
        growing = {index: _Growing(requests[index], engine.room(requests[index])) for index in batch}
        while growing:
            order = list(growing)
            pieces = [growing[index].next_piece() for index in order]
            listeners = [lambda _piece, _done, whole=piece.temperature > 0.0: whole or not cut() for piece in pieces]
            for index, done in zip(order, engine.run(pieces, listeners), strict=True):
                one = growing[index]
                one.tokens += done.token_ids
                # A stop string may begin in one piece and end in the next.
                text, stopped = _before(engine.decode(one.tokens), one.request.stop)
                ended = stopped or done.finish_reason == "stop"
                if ended or len(one.tokens) >= one.limit:
                    replies[index] = Reply(text, len(one.tokens), ended)
                    del growing[index]
            yield
    return [reply for reply in replies if reply is not None]


def _before(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    places = [place for mark in stop if (place := text.find(mark)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
