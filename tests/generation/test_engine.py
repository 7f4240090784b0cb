"""The engine: batches answer as singles do, and what bounds, ends and seeds an answer does so."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from psyche_node.exits import Exit, exit_for
from psyche_node.generation import Advice, Engine, GenerationError, PromptError, Request

PROMPTS = [[7, 8, 9], [20], [100, 101, 102, 103, 104, 105, 106, 107], [55, 56, 57, 58]]


def say(engine: Engine, text: str) -> tuple[int, ...]:
    return engine.encode([{"role": "user", "content": text}])


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_batch_answers_as_each_prompt_alone(engine: Engine, temperature: float) -> None:
    together = engine.generate(PROMPTS, 24, temperature, 0.9, seed=5)
    alone = [engine.generate([prompt], 24, temperature, 0.9, seed=5 + i)[0] for i, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert [one.prompt_tokens for one in together] == [3, 1, 8, 4]
    assert len({one.token_ids for one in together}) == len(PROMPTS)


def test_greedy_is_what_plain_transformers_says(engine: Engine, model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for prompt in PROMPTS:
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, repetition_penalty=1.0, min_new_tokens=0
        )[0, len(prompt) :].tolist()
        found = engine.generate([prompt], 20)[0]
        assert list(found.token_ids) == [token for token in expected if token not in engine.eos]


def test_seeds(engine: Engine) -> None:
    def ask(seed: int | None) -> str:
        return engine.generate([PROMPTS[0]], 24, 1.0, seed=seed)[0].text

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) == 4
    assert ask(None) != ask(None), "without a seed the system's entropy is one"


def test_sampling_follows_the_models_probabilities(engine: Engine) -> None:
    """First tokens of 600 samples against the softmax of the logits, by total variation."""
    with torch.inference_mode():
        logits = engine._model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    expected = torch.softmax(logits / 0.5, -1)
    done = engine.generate([PROMPTS[0]] * 600, 1, 0.5, seed=0)
    counts = torch.zeros_like(expected)
    for one in done:
        for token in one.token_ids or sorted(engine.eos)[:1]:
            counts[token] += 1
    reference = torch.bincount(
        torch.multinomial(expected, 600, replacement=True, generator=torch.Generator().manual_seed(1)),
        minlength=len(expected),
    )
    distance = (counts / 600 - expected).abs().sum() / 2
    usual = (reference / 600 - expected).abs().sum() / 2
    assert distance < 1.3 * usual, "as near to the probabilities as torch.multinomial's own samples"


def test_a_stop_string_ends_the_answer_before_it(engine: Engine) -> None:
    whole = engine.generate([PROMPTS[0]], 40)[0]
    stop = whole.text[10:13]
    cut = engine.generate([PROMPTS[0]], 40, stop=["never there", stop])[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < len(whole.token_ids)
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids


def test_the_end_token_ends_it_and_is_not_part_of_it(engine: Engine) -> None:
    whole = engine.generate([PROMPTS[0]], 12)[0]
    assert (whole.finish_reason, len(whole.token_ids)) == ("length", 12)
    end = next(token for token in whole.token_ids[4:] if token not in whole.token_ids[:4])
    before, engine.eos = engine.eos, frozenset({end})
    try:
        cut = engine.generate([PROMPTS[0]], 12)[0]
        longer = engine.generate([PROMPTS[0]], 12, advice=Advice(min_new_tokens=12))[0]
    finally:
        engine.eos = before
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(end)]
    assert len(longer.token_ids) == 12


def test_advice_against_repetition(engine: Engine) -> None:
    plain = engine.generate([PROMPTS[0]], 60)[0].token_ids
    varied = engine.generate([PROMPTS[0]], 60, advice=Advice(no_repeat_ngram_size=2))[0].token_ids
    pairs = list(itertools.pairwise(varied))
    assert len(set(pairs)) == len(pairs)
    assert varied != plain


def test_streaming_says_the_same_in_pieces(engine: Engine) -> None:
    request = Request(tuple(PROMPTS[0]), 30)
    pieces = list(engine.stream(request))
    assert len(pieces) > 5
    assert "".join(pieces) == engine.run([request])[0].text


def test_closing_a_stream_ends_the_generation(engine: Engine) -> None:
    stream = engine.stream(Request(tuple(PROMPTS[0]), 240))
    next(stream)
    stream.close()
    heard: list[object] = []

    def three(piece: str, done: object) -> bool:
        heard.append(done)
        return len(heard) < 3

    first, second = engine.run([Request((7,), 200), Request((8,), 20)], [three, lambda piece, done: True])
    assert (len(first.token_ids), len(second.token_ids)) == (3, 20)
    assert heard == [None, None, None, first]


def test_the_context_window_bounds_prompt_and_answer(engine: Engine) -> None:
    assert engine.context == 256
    done = engine.generate([[9] * 250], 100)[0]
    assert (done.finish_reason, len(done.token_ids)) == ("length", 6)
    with pytest.raises(PromptError, match="300 tokens, the model's context window 256"):
        engine.generate([[9] * 300], 1)
    with pytest.raises(PromptError):
        list(engine.stream(Request((9,) * 300, 1)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ()}, "no tokens"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"stop": ("",)}, "empty stop"),
    ],
    ids=["prompt", "max", "cold", "nan", "top_p", "stop"],
)
def test_bad_requests_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Request(**{"prompt": (1,), "max_new_tokens": 1, **change})  # type: ignore[arg-type]


def test_batches_are_bounded_and_keep_the_order(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    import psyche_node.generation.engine as module

    whole = engine.generate(PROMPTS, 5)
    monkeypatch.setattr(module, "_CPU_TOKENS", 20)
    sizes: list[int] = []
    run = engine.run
    monkeypatch.setattr(engine, "run", lambda requests: sizes.append(len(requests)) or run(requests))
    assert engine.generate(PROMPTS, 5) == whole
    assert sizes == [1, 2, 1]


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def half_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])


def more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_config, r"has no config\.json. Name a model folder"),
        (no_tokenizer, "the tokenizer of .* cannot be loaded"),
        (no_weights, "the model of .* cannot be loaded"),
        (half_the_weights, "the model of .* cannot be loaded"),
        (more_layers, r"lacks \d+ tensors"),
    ],
)
def test_folders_that_are_no_model(
    spoil: Callable[[Path], None], words: str, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, folder := tmp_path / "model")
    spoil(folder)
    with pytest.raises(GenerationError, match=words) as caught:
        Engine.load(folder, device="cpu")
    assert exit_for(caught.value) is Exit.MODEL


def test_a_folder_without_a_template_still_completes_text(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, folder := tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    engine = Engine.load(folder, device="cpu", dtype="bfloat16")
    with pytest.raises(GenerationError, match="has no chat template"):
        say(engine, "hello")
    assert engine.generate([engine.prompts.encode_text("hello", special=True)], 4)[0].text
    with pytest.raises(GenerationError, match="dtype 'int4' is unknown"):
        Engine.load(folder, dtype="int4")
