"""Packed documents do not see each other, and the start-up test notices when they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LENGTH, TINY, VOCABULARY, RandomData
from torch import Tensor

from psyche_node.training import ModelError, SeparationError, load_model, make_demo_model
from psyche_node.training.forward import LossFunction, logits
from psyche_node.training.separation import check_separation
from psyche_node.training.session import prepare_model

CPU = torch.device("cpu")
SEED_OSS = {**TINY, "vocab_size": VOCABULARY}
LLAMA = {**SEED_OSS, "model_type": "llama"}
LLAMA_3_1 = {
    **LLAMA,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
QWEN3 = {**SEED_OSS, "model_type": "qwen3"}
FAMILIES = {"seed_oss": SEED_OSS, "llama": LLAMA, "llama3.1": LLAMA_3_1, "qwen3": QWEN3}


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return load_model(model_dir, CPU)[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_are_separated(model: Any, attention: str) -> None:
    model.set_attn_implementation(attention)
    try:
        line = check_separation(lambda tokens, places: logits(model, tokens, places), VOCABULARY, CPU, LENGTH)
    finally:
        model.set_attn_implementation("sdpa")
    assert line.startswith("packed documents do not see each other")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_tested_when_it_starts_and_says_so(
    family: str, tokenizer: Path, data: RandomData, tmp_path: Path
) -> None:
    make_demo_model(FAMILIES[family], tokenizer, tmp_path, seed=0)
    ready = prepare_model(tmp_path, data, "cpu", micro_batch=1, threads=1)
    assert [line for line in ready.reasons if line.startswith("packed documents do not see each other")]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_starts_with_documents_that_see_each_other(
    family: str, tokenizer: Path, data: RandomData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(self: LossFunction, tokens: Tensor, places: Tensor) -> Tensor:
        joined = torch.arange(tokens.shape[1])[None]
        return intact(self, tokens, joined)

    intact = LossFunction.logits
    monkeypatch.setattr(LossFunction, "logits", leaking)
    make_demo_model(FAMILIES[family], tokenizer, tmp_path, seed=0)
    with pytest.raises(SeparationError, match="see each other"):
        prepare_model(tmp_path, data, "cpu", micro_batch=1, threads=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fault", ["mask", "cache", "places"])
def test_broken_separation_is_found(model: Any, attention: str, fault: str) -> None:
    def forward(tokens: Tensor, places: Tensor) -> Tensor:
        mask = torch.ones_like(tokens) if fault == "mask" else None
        places = torch.arange(tokens.shape[1])[None] if fault == "places" else places
        output = model(input_ids=tokens, position_ids=places, attention_mask=mask, use_cache=fault == "cache")
        return output.logits

    model.set_attn_implementation(attention)
    try:
        with pytest.raises(SeparationError, match="see each other"):
            check_separation(forward, VOCABULARY, CPU, LENGTH)
    finally:
        model.set_attn_implementation("sdpa")


def test_a_packed_document_has_the_logits_it_has_alone(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    one, two = (torch.randint(VOCABULARY, (1, n), generator=generator) for n in (9, 14))
    places = torch.cat([torch.arange(9), torch.arange(14)])[None]
    together = logits(model, torch.cat([one, two], dim=1), places)
    alone = logits(model, two, torch.arange(14)[None])
    torch.testing.assert_close(together[:, 9:], alone, rtol=1e-4, atol=1e-5)


ROPE = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 28}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, **ROPE}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], **ROPE}
BEYOND = {
    "dynamic": ({**LLAMA, "max_position_embeddings": 28, "rope_parameters": DYNAMIC}, "longest document"),
    "longrope": (
        {**LLAMA, "model_type": "phi3", "original_max_position_embeddings": 28, "rope_parameters": LONG},
        "longest document",
    ),
    "chance": (
        {
            **LLAMA,
            "model_type": "mixtral",
            "num_local_experts": 3,
            "router_jitter_noise": 0.3,
            "initializer_range": 0.3,
        },
        "draws lots while it trains",
    ),
    "bidirectional": (
        {**SEED_OSS, "model_type": "gemma3_text", "use_bidirectional_attention": True, "initializer_range": 0.3},
        "sees the tokens that it is to predict",
    ),
}


@pytest.mark.parametrize("kind", BEYOND)
def test_logits_that_follow_what_they_must_not_are_found(
    kind: str, tokenizer: Path, data: RandomData, tmp_path: Path
) -> None:
    config, why = BEYOND[kind]
    make_demo_model(config, tokenizer, tmp_path, seed=0)
    with pytest.raises(SeparationError, match=why):
        prepare_model(tmp_path, data, "cpu", micro_batch=1, threads=1)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_stay_the_same_within_the_sequences_are_no_matter(
    kind: str, tokenizer: Path, data: RandomData, tmp_path: Path
) -> None:
    config, _ = BEYOND[kind]
    rope = {**config["rope_parameters"], "original_max_position_embeddings": 64}
    longer = {"max_position_embeddings": 64, "original_max_position_embeddings": 64, "rope_parameters": rope}
    make_demo_model({**config, **longer}, tokenizer, tmp_path, seed=0)
    ready = prepare_model(tmp_path, data, "cpu", micro_batch=1, threads=1)
    assert [line for line in ready.reasons if line.startswith("packed documents do not see each other")]
    assert not any("the model is made for" in line for line in ready.reasons)


def test_places_beyond_what_the_model_was_made_for_are_told(tokenizer: Path, data: RandomData, tmp_path: Path) -> None:
    make_demo_model({**LLAMA, "max_position_embeddings": 31}, tokenizer, tmp_path, seed=0)
    ready = prepare_model(tmp_path, data, "cpu", micro_batch=1, threads=1)
    assert any(line.startswith("sequences of 32 tokens, and the model is made for 31 (by") for line in ready.reasons)


def test_learned_positions_reach_as_far_as_the_sequences(tokenizer: Path, data: RandomData, tmp_path: Path) -> None:
    short = {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24}
    make_demo_model(short, tokenizer, tmp_path, seed=0)
    with pytest.raises(ModelError, match=r"learned positions for 24 tokens \(transformer\.wpe\), .* have 32"):
        prepare_model(tmp_path, data, "cpu", micro_batch=1, threads=1)


def test_a_blind_test_says_so() -> None:
    line = check_separation(lambda tokens, places: torch.ones(*tokens.shape, 5), 5, CPU, LENGTH)
    assert "blind" in line


def test_how_a_mixture_of_experts_is_rounded_is_no_leak(model: Any) -> None:
    """Its products are of as many rows as an expert has tokens, and on a GPU in bf16 they are rounded accordingly."""

    def coarse(tokens: Tensor, places: Tensor) -> Tensor:
        found = logits(model, tokens, places)
        by_company = torch.Generator().manual_seed(int(tokens.sum()))
        return found * (1 + 1e-3 * torch.randn(found.shape[1:], generator=by_company))

    def leaking(tokens: Tensor, places: Tensor) -> Tensor:
        return coarse(tokens, torch.arange(tokens.shape[1])[None])

    with pytest.raises(SeparationError, match="see each other"):
        check_separation(coarse, VOCABULARY, CPU, LENGTH)
    assert "as rounding does in a mixture" in check_separation(coarse, VOCABULARY, CPU, LENGTH, mixture=True)
    with pytest.raises(SeparationError, match="see each other"):
        check_separation(leaking, VOCABULARY, CPU, LENGTH, mixture=True)


def test_a_mixture_that_sees_across_a_batch_is_found(model: Any) -> None:
    """What a sequence has of its company must not pass for rounding."""

    def mingling(tokens: Tensor, places: Tensor) -> Tensor:
        found = logits(model, tokens, places)
        return found + 0.5 * found.mean(dim=0, keepdim=True)

    with pytest.raises(SeparationError, match="see each other"):
        check_separation(mingling, VOCABULARY, CPU, LENGTH, mixture=True)
