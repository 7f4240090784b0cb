"""Packed documents do not see each other, and the start-up test notices when they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, VOCABULARY
from torch import Tensor

from psyche_node.training import SeparationError, load_model, make_demo_model
from psyche_node.training.forward import logits
from psyche_node.training.separation import check_separation

CPU = torch.device("cpu")
LLAMA = {k: v for k, v in TINY.items() if k != "model_type"} | {"model_type": "llama", "vocab_size": VOCABULARY}
QWEN3 = {**LLAMA, "model_type": "qwen3"}


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return load_model(model_dir, CPU)[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_are_separated(model: Any, attention: str) -> None:
    model.set_attn_implementation(attention)
    try:
        line = check_separation(lambda tokens, places: logits(model, tokens, places), VOCABULARY, CPU)
    finally:
        model.set_attn_implementation("sdpa")
    assert line.startswith("packed documents are separated")


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_other_families_are_separated_too(config: dict[str, Any], tokenizer: Path, tmp_path: Path) -> None:
    make_demo_model(config, tokenizer, tmp_path, seed=0)
    other, _ = load_model(tmp_path, CPU)
    check_separation(lambda tokens, places: logits(other, tokens, places), VOCABULARY, CPU)


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
            check_separation(forward, VOCABULARY, CPU)
    finally:
        model.set_attn_implementation("sdpa")


def test_a_packed_document_has_the_logits_it_has_alone(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    one, two = (torch.randint(VOCABULARY, (1, n), generator=generator) for n in (9, 14))
    places = torch.cat([torch.arange(9), torch.arange(14)])[None]
    together = logits(model, torch.cat([one, two], dim=1), places)
    alone = logits(model, two, torch.arange(14)[None])
    torch.testing.assert_close(together[:, 9:], alone, rtol=1e-4, atol=1e-5)


def test_a_blind_test_says_so() -> None:
    line = check_separation(lambda tokens, places: torch.ones(*tokens.shape, 5), 5, CPU)
    assert "blind" in line
