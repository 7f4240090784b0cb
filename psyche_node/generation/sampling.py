"""Choosing tokens: each sequence of a batch by its own request and its own noise.

Shapes: B sequences, L tokens so far (padded on the left), V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from psyche_node.generation.request import Request

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class PerSequence(LogitsProcessor):
    """Turns taking the largest logit into each request's own sampling.

    Gumbel's trick: the largest of logits plus Gumbel noise is a sample of their softmax (Maddison, Tarlow & Minka 2014,
    "A* Sampling"). So one greedy loop serves a batch of different requests, and a sequence's noise comes from its own
    seed: it gets the same answer alone and beside others.
    """

    def __init__(self, requests: Sequence[Request], width: int, eos: Sequence[int], device: torch.device) -> None:
        self._starts = [width - len(request.prompt) for request in requests]
        self._steps = [_steps(request, eos, device) for request in requests]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores (B, V) whose largest of each row is the token to take; ids (B, L)."""
        if not any(self._steps):
            return scores
        rows = [scores[row : row + 1] for row in range(scores.shape[0])]
        for row, steps in enumerate(self._steps):
            tokens = input_ids[row : row + 1, self._starts[row] :]  # penalties must not count the padding
            for step in steps:
                rows[row] = step(tokens, rows[row])
        return torch.cat(rows)


def _steps(request: Request, eos: Sequence[int], device: torch.device) -> list[Step]:
    advice = request.advice
    steps: list[Any] = []
    if advice.repetition_penalty not in (None, 1.0):
        steps.append(RepetitionPenaltyLogitsProcessor(advice.repetition_penalty))
    if advice.no_repeat_ngram_size:
        steps.append(NoRepeatNGramLogitsProcessor(advice.no_repeat_ngram_size))
    if advice.min_new_tokens and eos:
        least = min(advice.min_new_tokens, request.max_new_tokens)
        steps.append(MinNewTokensLengthLogitsProcessor(len(request.prompt), least, list(eos), device=str(device)))
    if request.temperature == 0.0:
        return steps
    if request.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(request.temperature))
    if advice.top_k:
        steps.append(TopKLogitsWarper(advice.top_k))
    if request.top_p < 1.0:
        steps.append(TopPLogitsWarper(request.top_p))
    return [*steps, _gumbel(request.seed, device)]


def _gumbel(seed: int, device: torch.device) -> Step:
    generator = torch.Generator(device=device).manual_seed(seed)

    def step(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        waiting = torch.empty(scores.shape, dtype=torch.float32, device=scores.device).exponential_(generator=generator)
        return scores.float() - waiting.log()

    return step
