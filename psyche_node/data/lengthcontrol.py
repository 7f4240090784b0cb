"""Data for length control: samples whose reasoning overran a budget, which teach nothing but to end it.

Source: the second stage of the Hermes 4 report (arXiv 2508.18255, section on length control): overlong reasoning is
cut, ``</think>`` is put behind it, an answer follows, and only ``</think>`` and the end token are trained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from psyche_node.data.formats import Sample
from psyche_node.data.template import split_reasoning


def close_reasoning(sample: Sample, tokenizer: Tokenizer, budget: int) -> Sample:
    """Return the sample up to its first overlong message, whose reasoning is ended after ``budget`` tokens.

    A sample in which none is overlong comes back unchanged. Reasoning is a message's ``reasoning_content``, or what
    stands between ``<think>`` and ``</think>`` at its beginning. It is overlong with more than ``budget`` tokens, and
    where it was never ended. Nothing else of such a sample is trained. The end token is, if an answer precedes it:
    otherwise it would teach to stop right after the reasoning. Messages that are not trained are left alone.
    """
    number = -1
    for index, message in enumerate(sample.messages):
        number += message["role"] == "assistant"
        if message["role"] != "assistant" or not sample.train[number]:
            continue
        if (cut := _cut(message, tokenizer, budget)) is not None:
            train = (False,) * number + (True,)
            return replace(sample, messages=(*sample.messages[:index], cut), train=train, parts={}, closed=True)
    return sample


def _cut(message: dict[str, Any], tokenizer: Tokenizer, budget: int) -> dict[str, Any] | None:
    """The message with its reasoning cut, or None if it is within the budget."""
    split = None if "reasoning_content" in message else split_reasoning(message["content"])
    reasoning, answer, ended = split or (message.get("reasoning_content", ""), message["content"], True)
    if len(reasoning.encode()) <= budget and ended:  # a token is one byte at least
        return None
    offsets = tokenizer.encode(reasoning, add_special_tokens=False).offsets
    if len(offsets) <= budget and ended:
        return None
    kept = reasoning[: offsets[budget - 1][1]] if len(offsets) > budget else reasoning
    return {**message, "reasoning_content": kept, "content": answer}
