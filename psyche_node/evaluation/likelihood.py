"""Log-likelihoods of continuations, as lm-evaluation-harness defines them.

In plain text, context and continuation are tokenized together and divided after as many tokens as the context has
alone; blanks at the end of the context belong to the continuation. So a word that begins with a blank is scored as one
token. In a chat the prompt is what the template makes it, header and line feeds included, and the answer alone is
scored.

Shapes: B sequences of a batch, L tokens of the longest, V vocabulary, T tokens of a continuation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psyche_node.evaluation.errors import EvaluationError
from psyche_node.evaluation.steps import Steps
from psyche_node.generation.prompts import Prompt

BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}
"""Tokens of a forward pass, padding included."""
LOGITS = 1 << 26
"""Logits of a forward pass at most, if it has more than one sequence (256 MiB in fp32)."""

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Pair:
    """A sequence whose tokens from ``start`` on are the continuation.

    ``truncated``: the beginning of its context was left out.
    """

    tokens: tuple[int, ...]
    start: int
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """``logprob`` is the sum over the ``tokens`` of a continuation, in nats; ``greedy``: each is the likeliest one."""

    logprob: float
    greedy: bool
    tokens: int


def encode_pair(encode: Encode, prefix: Sequence[int], context: str, continuation: str, window: int | None) -> Pair:
    """Tokenize a context with its continuation.

    Args:
        encode: text to tokens, without special ones.
        prefix: tokens that every text begins with, such as bos; at least one if ``context`` may be empty.
        window: tokens that the model sees at most; None if it does not say. Of a longer context the end is kept.

    Raises:
        EvaluationError: the continuation is empty or does not fit, or nothing precedes it.
    """
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    if not continuation:
        raise EvaluationError(f"nothing follows the prompt that ends with {context[-60:]!r}; mend the task's choices")
    whole = list(encode(context + continuation))
    # A merge over the boundary may leave fewer tokens than the context has alone; something is left to be scored.
    start = min(len(encode(context)), len(whole) - 1)
    tokens, start = [*prefix, *whole], start + len(prefix)
    if start == 0:
        raise EvaluationError(
            "a prompt is empty, and the tokenizer has neither bos_token nor eos_token to begin with; write one into it"
        )
    return _within(tokens, start, window)


def encode_answer(encode: Callable[[Prompt], Sequence[int]], prompt: Prompt, answer: str, window: int | None) -> Pair:
    """Tokenize a prompt of the chat template with an answer, all tokens of which are scored, and no others.

    Raises:
        EvaluationError: the answer is empty or does not fit.
    """
    if not answer:
        raise EvaluationError(f"an answer to {prompt.text[-60:]!r} is empty; mend the task's choices")
    given = list(encode(prompt))
    whole = list(encode(Prompt(prompt.text + answer, prompt.quoted)))
    # Where a token reaches from the prompt into the answer: the model is never given half a token to go on from.
    if whole[: len(given)] != given or len(whole) == len(given):
        whole = given + list(encode(Prompt(answer, ())))
    return _within(whole, len(given), window)


def _within(tokens: list[int], start: int, window: int | None) -> Pair:
    """The pair, without what of the context does not fit. Raises EvaluationError if the continuation does not."""
    excess = 0 if window is None else max(0, len(tokens) - window)
    if excess >= start:
        raise EvaluationError(
            f"a continuation of {len(tokens) - start} tokens does not fit into the model's context of {window}"
        )
    return Pair(tuple(tokens[excess:]), start - excess, excess > 0)


def score_pairs(model: Any, device: torch.device, pairs: Sequence[Pair], batch_tokens: int = 0) -> Steps[list[Score]]:
    """A step per batch; returns the scores of ``pairs``, in their order.

    The model must be in ``eval``. Results do not depend on ``batch_tokens`` but for rounding; 0 chooses.
    """
    scores: list[Score | None] = [None] * len(pairs)
    for rows in _batches(pairs, batch_tokens or BATCH_TOKENS[device.type], _vocabulary(model)):
        found = _score([[pairs[index] for index in group] for group in rows], model, device)
        for group, ones in zip(rows, found, strict=True):
            for index, one in zip(group, ones, strict=True):
                scores[index] = one
        yield
    return [score for score in scores if score is not None]


def _batches(pairs: Sequence[Pair], tokens: int, vocabulary: int) -> Iterator[list[list[int]]]:
    """Batches of rows, the longest first; pairs whose inputs are equal (choices of one token each) share a row."""
    groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault((pair.tokens[:-1], pair.start), []).append(index)
    batch: list[list[int]] = []
    width = first = 0
    for (inputs, start), group in sorted(groups.items(), key=lambda item: (-len(item[0][0]), item[1])):
        size, kept = len(batch) + 1, width - min(first, start) + 1
        if not batch or size * width > tokens or size * kept * vocabulary > LOGITS:
            if batch:
                yield batch
            batch, width, first = [], len(inputs), start
        batch.append(group)
        first = min(first, start)
    if batch:
        yield batch


def _score(pairs: Sequence[Sequence[Pair]], model: Any, device: torch.device) -> list[list[Score]]:
    inputs = [group[0].tokens[:-1] for group in pairs]
    width = max(map(len, inputs))
    tokens_BL = torch.zeros((len(inputs), width), dtype=torch.long)
    for row, one in enumerate(inputs):
        tokens_BL[row, : len(one)] = torch.tensor(one)
    # Padding is on the right, where no token of a causal model looks; so there is no mask to make.
    first = min(group[0].start for group in pairs) - 1
    logits_BLV, offset = _logits(model, tokens_BL.to(device), first)
    result = []
    for row, group in enumerate(pairs):
        start, end = group[0].start - 1 - offset, len(inputs[row]) - offset
        logprobs_TV = torch.log_softmax(logits_BLV[row, start:end].float(), dim=-1)
        targets_GT = torch.tensor([pair.tokens[pair.start :] for pair in group], device=device)
        picked_GT = logprobs_TV.expand(len(group), -1, -1).gather(2, targets_GT[:, :, None])[:, :, 0]
        greedy_G = (logprobs_TV.argmax(-1) == targets_GT).all(1)
        sums = picked_GT.double().sum(1).tolist()
        result.append([Score(s, g, targets_GT.shape[1]) for s, g in zip(sums, greedy_G.tolist(), strict=True)])
    return result


def _logits(model: Any, tokens_BL: Tensor, first: int) -> tuple[Tensor, int]:
    """Logits (B, places, V) from place ``first`` on if the model can leave out the others, and their first place."""
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = tokens_BL.shape[1] - first
    logits: Tensor = model(input_ids=tokens_BL, use_cache=False, **options).logits
    return logits, tokens_BL.shape[1] - logits.shape[1]


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
