"""What is asked of an engine and what it answers: plain values, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Advice:
    """What the folder's ``generation_config.json`` advises; None where it says nothing.

    A model that has learned little repeats itself without a penalty, one that reasons is meant to be sampled at its
    maker's temperature: only the folder knows.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    min_new_tokens: int | None = None

    @classmethod
    def of(cls, config: Any) -> Advice:
        """Read transformers' ``GenerationConfig``. ``do_sample: false`` is temperature 0."""
        return cls(
            0.0 if config.do_sample is False else config.temperature,
            config.top_p,
            config.top_k,
            config.repetition_penalty,
            config.no_repeat_ngram_size,
            config.min_new_tokens,
        )


PLAIN = Advice()
"""No penalties and no filters: what an evaluation wants."""


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to make.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: longest answer; cut to what the context window leaves.
        temperature: 0 takes the likeliest token; other logits are divided by it.
        top_p: samples from the smallest set of tokens with this probability (Holtzman et al. 2020).
        seed: of the noise. Equal seeds give equal answers on one kind of machine, whatever else is in the batch.
        stop: the text ends before the first of these; none of them may be empty.
        advice: ``top_k``, penalties and shortest answer are taken from it.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    advice: Advice = field(default=PLAIN)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt has no tokens; begin it with the tokenizer's bos_token, or with any text")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; ask for at least 1")
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature is {self.temperature}; it is 0 (the likeliest token) to 100")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it is above 0 and at most 1 (all tokens)")
        if "" in self.stop:
            raise ValueError("an empty stop string would end every answer at once; leave it out")


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer.

    Attributes:
        token_ids: what was generated, without the end token; a stop string's own tokens are among them.
        text: the same in words, up to the stop string. Marks such as ``<think>`` stay, other special tokens do not.
        finish_reason: "stop" at the model's end token or a stop string, "length" when it was cut off.
        prompt_tokens: tokens of the prompt.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
