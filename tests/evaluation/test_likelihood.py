"""Log-likelihoods against a plain computation, one sequence at a time, and at the boundaries of tokens."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from psyche_node.evaluation import EvaluationError, Subject
from psyche_node.evaluation.likelihood import Pair, Score, encode_answer, encode_pair, score_pairs
from psyche_node.evaluation.steps import finish
from psyche_node.generation.prompts import Prompt

CPU = torch.device("cpu")


def plain(subject: Subject, pair: Pair) -> Score:
    """The definition: one sequence, all logits, a sum over the tokens of the continuation."""
    with torch.no_grad():
        logits = subject.model(input_ids=torch.tensor([pair.tokens])).logits[0].double()
    logprobs = logits.log_softmax(-1)
    places = range(pair.start, len(pair.tokens))
    return Score(
        sum(float(logprobs[at - 1, pair.tokens[at]]) for at in places),
        all(int(logprobs[at - 1].argmax()) == pair.tokens[at] for at in places),
        len(places),
    )


def some_pairs(subject: Subject) -> list[Pair]:
    rng = random.Random(3)
    pairs = []
    for length in (1, 2, 5, 9, 17, 40, 64):
        tokens = tuple(rng.randrange(263) for _ in range(length + 6))
        pairs += [Pair(tokens[: length + more], length) for more in (1, 3, 6)]
        pairs += [Pair((*tokens[:length], last), length) for last in (5, 9)]  # choices of one token share their input
    with torch.no_grad():  # and one that the model would say itself
        said = subject.model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    return [*pairs, Pair(tuple(said[0].tolist()), 3)]


def test_scores_are_those_of_a_plain_computation(subject: Subject) -> None:
    pairs = some_pairs(subject)
    with subject.measured():
        found = finish(score_pairs(subject.model, CPU, pairs))
    for score, pair in zip(found, pairs, strict=True):
        known = plain(subject, pair)
        assert score.logprob == pytest.approx(known.logprob, abs=1e-4)
        assert (score.greedy, score.tokens) == (known.greedy, known.tokens)
    assert found[-1].greedy
    assert not all(score.greedy for score in found)


@pytest.mark.parametrize("batch_tokens", [1, 64, 300, 100_000])
def test_batches_change_nothing_but_rounding(subject: Subject, batch_tokens: int) -> None:
    pairs = some_pairs(subject)
    with subject.measured():
        usual = finish(score_pairs(subject.model, CPU, pairs))
        other = finish(score_pairs(subject.model, CPU, pairs, batch_tokens))
    assert [score.logprob for score in other] == pytest.approx([score.logprob for score in usual], abs=1e-4)
    assert [score.greedy for score in other] == [score.greedy for score in usual]


def test_a_model_without_logits_to_keep_is_scored_the_same(subject: Subject) -> None:
    class Whole(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            return subject.model(input_ids=input_ids, use_cache=use_cache)

        def get_input_embeddings(self) -> object:
            return subject.model.get_input_embeddings()

    pairs = some_pairs(subject)
    with subject.measured():
        usual = finish(score_pairs(subject.model, CPU, pairs))
        whole = finish(score_pairs(Whole(), CPU, pairs))
    assert [score.logprob for score in whole] == pytest.approx([score.logprob for score in usual], abs=1e-4)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """Tokens whose boundaries are known: `ab`, `cd` and ` cd` are merged, nothing else is."""
    pieces = ["Ġ", *"abcdx"]
    merged = ["ab", "cd", "Ġcd"]
    vocabulary = {token: index for index, token in enumerate([*pieces, *merged])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("c", "d"), ("Ġ", "cd")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


@pytest.mark.parametrize(
    ("context", "continuation", "tokens", "start"),
    [
        ("ab", " cd", ["ab", "Ġcd"], 1),  # the blank belongs to the word that follows
        ("ab ", "cd", ["ab", "Ġcd"], 1),  # also where the context ends with it
        ("ab", "xcd", ["ab", "x", "cd"], 1),
        ("xa", "b", ["x", "ab"], 1),  # a merge over the boundary: something is left to be scored
        ("", "cd", ["cd"], 0),
    ],
)
def test_context_and_continuation_are_tokenized_together(
    words: Tokenizer, context: str, continuation: str, tokens: list[str], start: int
) -> None:
    pair = encode_pair(lambda text: words.encode(text).ids, [99], context, continuation, None)
    assert pair.tokens[0] == 99
    assert [words.id_to_token(token) for token in pair.tokens[1:]] == tokens
    assert (pair.start, pair.truncated) == (start + 1, False)


def test_of_a_long_context_the_end_is_kept() -> None:
    pair = encode_pair(lambda text: [ord(letter) for letter in text], [1], "abcdef", "gh", 5)
    assert (pair.tokens, pair.start, pair.truncated) == (tuple(map(ord, "defgh")), 3, True)
    with pytest.raises(EvaluationError, match="does not fit"):
        encode_pair(lambda text: [ord(letter) for letter in text], [1], "ab", "cdefg", 5)
    with pytest.raises(EvaluationError, match="nothing follows"):
        encode_pair(lambda text: [ord(letter) for letter in text], [1], "ab", "", 5)
    with pytest.raises(EvaluationError, match="neither bos_token nor eos_token"):
        encode_pair(lambda text: [ord(letter) for letter in text], [], "", "ab", 5)


@pytest.mark.parametrize(
    ("prompt", "answer", "given", "scored"),
    [
        ("xab ", "cd", ["x", "ab", "Ġ"], ["cd"]),  # in plain text the blank would be scored
        ("xa", "b", ["x", "a"], ["b"]),  # a merge over the boundary is not what the model is given
        ("x", "cd", ["x"], ["cd"]),
    ],
)
def test_of_a_chat_the_answer_alone_is_scored(
    words: Tokenizer, prompt: str, answer: str, given: list[str], scored: list[str]
) -> None:
    pair = encode_answer(lambda one: words.encode(one.text).ids, Prompt(prompt, ()), answer, None)
    tokens = [words.id_to_token(token) for token in pair.tokens]
    assert (tokens[: pair.start], tokens[pair.start :]) == (given, scored)
    with pytest.raises(EvaluationError, match="is empty"):
        encode_answer(lambda one: words.encode(one.text).ids, Prompt(prompt, ()), "", None)
