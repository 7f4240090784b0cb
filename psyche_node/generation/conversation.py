"""Questions and answers in turn, with the history a chat template needs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from psyche_node.generation.prompts import Message
from psyche_node.generation.reasoning import Parts, ReasoningSplitter, begins_inside
from psyche_node.generation.request import Completion, Request

if TYPE_CHECKING:
    from psyche_node.generation.engine import Engine


@dataclass(frozen=True, slots=True)
class Manner:
    """How to answer; None: as the folder's generation config advises, else greedily."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    system: str | None = None
    thinking: bool | None = None


class Conversation:
    """One conversation with a model. Reasoning is shown and then forgotten, as models are trained to expect.

    Attributes:
        last: the completion of the last answer that came to its end.
    """

    last: Completion

    def __init__(self, engine: Engine, manner: Manner) -> None:
        self._engine = engine
        self.manner = manner
        self._said: list[Message] = []

    @property
    def full(self) -> bool:
        """Whether the last answer ended at the end of the context window."""
        context = self._engine.context
        return context is not None and self.last.prompt_tokens + len(self.last.token_ids) >= context

    def think(self, thinking: bool) -> None:
        """Turn reasoning on or off from the next answer on."""
        self.manner = replace(self.manner, thinking=thinking)

    def forget(self) -> None:
        """Begin anew."""
        self._said = []

    def ask(self, question: str) -> Generator[Parts, None, None]:
        """Yield the answer in pieces. An answer that is closed early is not remembered.

        Raises:
            PromptError: the template refuses the conversation, or the context window is too small for it.
            ValueError: the manner is outside its range.
        """
        manner, advice = self.manner, self._engine.advice
        system = [{"role": "system", "content": manner.system}] if manner.system else []
        asked = [*self._said, {"role": "user", "content": question}]
        prompt = self._engine.prompts.render([*system, *asked], thinking=manner.thinking)
        self._engine.may_fit(len(prompt.text))
        request = Request(
            self._engine.prompts.encode(prompt),
            manner.max_tokens,
            next((value for value in (manner.temperature, advice.temperature) if value is not None), 0.0),
            next((value for value in (manner.top_p, advice.top_p) if value is not None), 1.0),
            manner.seed + len(self._said),
            advice=advice,
        )
        splitter = ReasoningSplitter(begins_inside(prompt.text))
        answer = ""
        completion: Completion | None = None
        with closing(self._engine.stream(request)) as stream:  # closing this generator ends the answer, too
            while completion is None:
                try:
                    parts = splitter.feed(next(stream))
                except StopIteration as end:
                    completion, parts = end.value, splitter.finish()
                answer += parts.answer
                yield parts
        self._said = [*asked, {"role": "assistant", "content": answer.strip()}]
        self.last = completion
