"""The transform is orthonormal and its own inverse; the inverse of votes is exact, against int64 arithmetic."""

import numpy as np
import pytest
import torch

from optimizer.transform import MOST_VOTES, hadamard, invert_votes, transform
from optimizer.votes import clip_votes, select

CPU = torch.device("cpu")
# Sylvester's matrix by its definition: the parity of the bits that row and column number share.
H = np.array([[1 - 2 * ((i & j).bit_count() % 2) for j in range(64)] for i in range(64)], np.int64)


def exact(votes: np.ndarray) -> np.ndarray:
    return H @ votes.reshape(-1, 64, 64).transpose(0, 2, 1) @ H


def test_the_matrix() -> None:
    assert np.array_equal(hadamard(CPU).numpy(), H)


def test_orthonormal_and_its_own_inverse() -> None:
    blocks = torch.randn(5, 64, 64)
    coefficients = transform(blocks)
    assert torch.allclose(coefficients.double(), torch.from_numpy(exact(blocks.double().numpy()) / 64), atol=1e-4)
    assert torch.allclose(transform(coefficients), blocks, atol=1e-5)
    assert torch.allclose(coefficients.norm(), blocks.norm())


@pytest.mark.parametrize("bound", [1, 4, 5, 64, 256, MOST_VOTES])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_inverse_of_votes_equals_int64(bound: int, precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        generator = np.random.default_rng(bound)
        votes = generator.integers(-bound, bound + 1, (6, 4096))
        votes[0] = bound  # every sum as large as it can be
        votes[1] = bound * np.outer(H[5], H[9]).ravel()
        with torch.autocast("cpu", torch.bfloat16):
            got = invert_votes(torch.from_numpy(votes).float(), bound)
        assert got.dtype == torch.float32
        assert np.array_equal(got.numpy().astype(np.int64), exact(votes))
        assert np.abs(exact(votes)).max() == bound * 4096
    finally:
        torch.set_float32_matmul_precision(before)


def narrow(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


@pytest.mark.parametrize("bound", [1, 4, 5, 64, 256, MOST_VOTES])
def test_operands_fit_the_narrowest_format(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a matrix unit that rounds fp32 operands to bfloat16 behind our back: still exact."""
    votes = np.random.default_rng(bound).integers(-bound, bound + 1, (4, 4096))
    votes[0] = bound
    monkeypatch.setattr(
        "optimizer.transform._product", lambda b, m: (narrow(b).reshape(-1, 64) @ narrow(m)).view(-1, 64, 64)
    )
    got = invert_votes(torch.from_numpy(votes).float(), bound)
    assert np.array_equal(got.numpy().astype(np.int64), exact(votes))


@pytest.mark.parametrize("bound", [0, MOST_VOTES + 1])
def test_beyond_the_bound_is_refused(bound: int) -> None:
    with pytest.raises(ValueError, match="cannot be inverted exactly"):
        invert_votes(torch.zeros(1, 4096), bound)


def test_select_takes_the_lowest_of_equal_values() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 6, (8, 4096), generator=generator).float()  # ties everywhere
    rows[0] = 0.0
    rows[1] = torch.randperm(4096, generator=generator).float()  # no tie at all
    rows[2, :40] = 9.0
    for topk in (1, 8, 32, 100, 4096):
        want = np.sort(np.argsort(-rows.numpy(), axis=1, kind="stable")[:, :topk], axis=1)
        assert np.array_equal(select(rows, topk).numpy(), want), topk
    assert select(rows, 32)[0].tolist() == list(range(32))


def test_clipping() -> None:
    assert clip_votes(torch.tensor([[-3.0, -1.0, 0.0, 1.0, 2.0]])).tolist() == [[-1.0, -1.0, 0.0, 1.0, 1.0]]
