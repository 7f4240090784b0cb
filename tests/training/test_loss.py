"""The chunked loss at trained places equals the plain one over full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LENGTH, Packed, RandomData
from torch.nn import functional

from psyche_node.training import ModelError, load_model, loss
from psyche_node.training.device import choose_device
from psyche_node.training.fit import checkpoint_activations
from psyche_node.training.forward import LossFunction, logits
from psyche_node.training.gradient import accumulate

CPU = torch.device("cpu")
SCALES = st.sampled_from([0.1, 1.0, 300.0])


def batch(data: RandomData) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    packed = data.batch(range(5), b"")
    return torch.from_numpy(packed.tokens), torch.from_numpy(packed.trained), torch.from_numpy(packed.places)


def test_loss_and_gradients_equal_full_logits(
    model_dir: Path, data: RandomData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psyche_node.training.loss.CHUNK_LOGITS", 7 * 300)  # several chunks, the last one short
    model, _ = load_model(model_dir, CPU)
    tokens, trained, places = batch(data)
    function = LossFunction(model)
    assert function.reason.startswith("loss from hidden states")
    found = function(tokens, trained, places)
    found.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    full = logits(model, tokens, places)
    labels = torch.where(trained, tokens, -100)
    expected = functional.cross_entropy(full[:, :-1].reshape(-1, 300), labels[:, 1:].reshape(-1), reduction="sum")
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=2e-4, atol=1e-5 * float(parameter.grad.abs().max()))


@pytest.mark.parametrize("short", [True, False])
def test_z_loss_is_in_the_gradient_and_not_in_the_value(
    model_dir: Path, data: RandomData, monkeypatch: pytest.MonkeyPatch, short: bool
) -> None:
    monkeypatch.setattr("psyche_node.training.loss.CHUNK_LOGITS", 7 * 300)
    model, _ = load_model(model_dir, CPU)
    tokens, trained, places = batch(data)
    plain = LossFunction(model)(tokens, trained, places).item()
    if not short:
        monkeypatch.setattr("psyche_node.training.forward._logits_are_one_product", lambda _: False)
    found = LossFunction(model, 0.01)(tokens, trained, places)
    assert found.item() == pytest.approx(plain, rel=1e-6)
    found.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    kept = logits(model, tokens, places)[:, :-1][trained[:, 1:]]
    log_z = kept.logsumexp(dim=1)
    (
        functional.cross_entropy(kept, tokens[:, 1:][trained[:, 1:]], reduction="sum") + 0.01 * (log_z**2).sum()
    ).backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=2e-4, atol=1e-5 * float(parameter.grad.abs().max()))


def test_only_trained_tokens_count(model_dir: Path, data: RandomData) -> None:
    model, _ = load_model(model_dir, CPU)
    tokens, trained, places = batch(data)
    function = LossFunction(model)
    one = torch.zeros_like(trained)
    one[2, 9] = True
    expected = functional.cross_entropy(logits(model, tokens, places)[2, 8], tokens[2, 9])
    assert function(tokens, one, places).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_that_scales_its_logits_takes_the_long_way(model_dir: Path, data: RandomData) -> None:
    model, _ = load_model(model_dir, CPU)
    plain = type(model).forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = plain(model, *args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    tokens, trained, places = batch(data)
    function = LossFunction(model)
    assert function.reason.startswith("loss from full logits")
    expected = functional.cross_entropy(
        logits(model, tokens, places)[:, :-1][trained[:, 1:]], tokens[:, 1:][trained[:, 1:]], reduction="sum"
    )
    assert function(tokens, trained, places).item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 3, 10, 7])
    found = torch.autograd.grad(3 * loss.cross_entropy_sum(hidden, weight, targets), (hidden, weight))
    expected = torch.autograd.grad(
        3 * functional.cross_entropy(hidden @ weight.T, targets, reduction="sum"), (hidden, weight)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_a_missing_model_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(tmp_path, CPU)


@given(
    st.integers(0, 9), st.integers(1, 6), st.integers(1, 40), st.integers(1, 90), st.sampled_from([0.0, 0.02]), SCALES
)
def test_any_shape_is_the_plain_loss(
    places: int, width: int, words: int, chunk: int, z_loss: float, scale: float
) -> None:
    """No place, one word, a chunk that holds less than a row, or that none divides: value and gradients are plain."""
    generator = torch.Generator().manual_seed(places + 10 * words + 1000 * chunk)
    hidden = (scale * torch.randn(places, width, generator=generator)).requires_grad_()
    weight = torch.randn(words, width, generator=generator).requires_grad_()
    targets = torch.randint(words, (places,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_LOGITS", chunk)
        found = loss.cross_entropy_sum(hidden, weight, targets, z_loss)
        gradients = torch.autograd.grad(found / 3, (hidden, weight))
    exact_hidden, exact_weight = (values.detach().double().requires_grad_() for values in (hidden, weight))
    kept = exact_hidden @ exact_weight.T
    plain = functional.cross_entropy(kept, targets, reduction="sum")
    expected = torch.autograd.grad(
        (plain + z_loss * kept.logsumexp(dim=1).square().sum()) / 3, (exact_hidden, exact_weight)
    )
    torch.testing.assert_close(found.double(), plain, rtol=1e-5, atol=1e-5 * scale)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * scale)


@settings(max_examples=12)
@given(st.integers(0, 2**32), st.integers(1, 5), st.booleans())
def test_micro_batches_of_any_size_make_one_gradient(
    model_dir: Path, data: RandomData, seed: int, size: int, again: bool
) -> None:
    """The mean over all trained tokens, however they lie: in one sequence, or in none of a micro-batch."""
    generator = np.random.default_rng(seed)
    packed = data.batch(range(7), b"")
    share = generator.choice([0.0, 0.03, 1.0], size=(7, 1))
    trained = packed.trained & (generator.random(packed.trained.shape) < share)
    trained[3, 5] = True  # one at least
    trained[:, 0] = False
    some = Packed(packed.tokens, trained, packed.places)
    model, _ = load_model(model_dir, CPU)
    if again:
        checkpoint_activations(model)
    function, device = LossFunction(model), choose_device("cpu", LENGTH, size, 1)
    mean = accumulate(function, some, device)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert np.isfinite(mean)
    model.zero_grad()
    plain, _ = load_model(model_dir, CPU)
    rows = logits(plain, torch.from_numpy(some.tokens), torch.from_numpy(some.places))[:, :-1]
    mask = torch.from_numpy(trained)[:, 1:]
    expected = functional.cross_entropy(rows[mask], torch.from_numpy(some.tokens)[:, 1:][mask])
    expected.backward()
    assert mean == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in plain.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=2e-5 * scale)
