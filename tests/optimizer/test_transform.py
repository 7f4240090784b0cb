"""The transform is orthonormal and its own inverse; every path of the inverse of votes is exact up to its bound."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer import transform
from optimizer.transform import MOST_VOTES, OPERANDS, butterflies, choose_path, hadamard, invert_votes, largest_votes
from optimizer.votes import mean_of_kept, select

CPU = torch.device("cpu")
# Sylvester's matrix by its definition: the parity of the bits that row and column number share.
H = np.array([[1 - 2 * ((i & j).bit_count() % 2) for j in range(64)] for i in range(64)], np.int64)
SETTINGS = {"fp32": "highest", "tf32": "high", "bf16": "medium"}


def exact(votes: np.ndarray) -> np.ndarray:
    return (H @ votes.reshape(-1, 64, 64) @ H).reshape(-1, 4096)


def edge_votes(bound: int) -> np.ndarray:
    """Random votes, and blocks whose sums are as large as they can be."""
    votes = np.random.default_rng(bound).integers(-bound, bound + 1, (6, 4096))
    votes[0] = bound
    votes[1] = bound * np.outer(H[5], H[9]).ravel()
    votes[2, ::2] = bound
    # Sums over a row that need every bit: one vote less than the most.
    votes[3] = bound
    votes[3, ::64] = bound - 1
    return votes


def rounded_to(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rounds fp32 values to a significand of so many bits, as a matrix unit does with its operands."""
    unit = 1 << (24 - bits)

    def to_format(x: torch.Tensor) -> torch.Tensor:
        raw = x.contiguous().view(torch.int32).long()
        half = unit // 2 - 1 + ((raw // unit) & 1)
        return ((raw + half) // unit * unit).to(torch.int32).view(torch.float32)

    return to_format


FORMATS = {"fp32": lambda x: x, "tf32": rounded_to(11), "bf16": rounded_to(8)}


@pytest.fixture
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Products with operands rounded to a format behind our back, PyTorch being set to that precision."""
    path = request.param
    narrow = FORMATS[path]
    product = transform._product
    monkeypatch.setattr(transform, "_product", lambda tiles: product(narrow(tiles)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(SETTINGS[path])
    yield path
    torch.set_float32_matmul_precision(before)


def test_the_matrix() -> None:
    assert np.array_equal(hadamard(CPU).numpy(), H)
    assert rounded_to(8)(torch.tensor([257.0, 258.0, 259.0])).tolist() == [256.0, 258.0, 260.0]


def test_orthonormal_and_its_own_inverse() -> None:
    blocks = torch.randn(5, 4096)
    coefficients = butterflies(blocks) / 64
    assert torch.allclose(coefficients.double(), torch.from_numpy(exact(blocks.double().numpy()) / 64), atol=1e-4)
    assert torch.allclose(butterflies(coefficients) / 64, blocks, atol=1e-5)
    assert torch.allclose(coefficients.norm(), blocks.norm())


def test_butterflies_round_in_the_documented_order() -> None:
    """Strides 1, 2, 4, ... over the flat block, written out: every rounding is part of the definition."""
    want = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    got = butterflies(torch.from_numpy(want.copy())[None]).numpy()[0]
    stride = 1
    while stride < 4096:
        pairs = want.reshape(-1, 2, stride)
        want = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(4096)
        stride *= 2
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("unit", SETTINGS, indirect=True)
def test_float_paths_are_exact_at_their_bound_and_refused_beyond(unit: str) -> None:
    bound = largest_votes(unit)
    votes = edge_votes(bound)
    assert np.abs(exact(votes)).max() == bound * 4096
    with torch.autocast("cpu", torch.bfloat16):
        got = invert_votes(torch.from_numpy(votes).float(), bound, unit)
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy().astype(np.int64), exact(votes))
    if unit != "fp32":
        with pytest.raises(ValueError, match=f"not exact by {unit}; it allows {bound}"):
            invert_votes(torch.zeros(1, 4096), bound + 1, unit)


@pytest.mark.parametrize("unit", ["tf32", "bf16"], indirect=True)
def test_beyond_the_bound_such_a_unit_is_wrong_and_integers_take_over(unit: str, monkeypatch) -> None:
    bound = largest_votes(unit) + 1
    votes = edge_votes(bound)
    assert choose_path(bound) == "int64"
    assert np.array_equal(invert_votes(torch.from_numpy(votes).float(), bound).numpy(), exact(votes))
    monkeypatch.setattr(transform, "largest_votes", lambda path: MOST_VOTES)
    wrong = invert_votes(torch.from_numpy(votes).float(), bound, unit)
    assert not np.array_equal(wrong.numpy(), exact(votes)), "the bound could be larger"


@pytest.mark.parametrize("unit", SETTINGS, indirect=True)
@pytest.mark.parametrize("bound", [1, 4, 5, 4096])
def test_the_path_chosen_is_exact_at_any_precision(unit: str, bound: int) -> None:
    assert choose_path(bound) == ("bf16" if bound <= 4 else "int64")
    votes = edge_votes(bound)
    assert np.array_equal(invert_votes(torch.from_numpy(votes).float(), bound).numpy(), exact(votes))


def test_int8_at_its_bound() -> None:
    bound = largest_votes("int8")
    assert bound == 1
    votes = edge_votes(bound)
    assert np.array_equal(invert_votes(torch.from_numpy(votes).float(), bound, "int8").numpy(), exact(votes))
    with pytest.raises(ValueError, match="not exact by int8; it allows 1"):
        invert_votes(torch.zeros(1, 4096), 2, "int8")


def test_bounds_follow_from_the_formats() -> None:
    assert {path: largest_votes(path) for path in OPERANDS} == {
        "fp32": 4096,
        "tf32": 32,
        "bf16": 4,
        "int8": 1,
        "int64": ((1 << 63) - 1) // 4096,
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(1, MOST_VOTES), st.integers(0, 2**32))
def test_all_paths_that_allow_a_bound_agree(bound: int, seed: int) -> None:
    votes = torch.from_numpy(np.random.default_rng(seed).integers(-bound, bound + 1, (2, 4096))).float()
    admitted = [path for path in OPERANDS if bound <= largest_votes(path)]
    results = [invert_votes(votes, bound, path) for path in admitted]
    assert {"fp32", "int64"} <= set(admitted)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("bound", [0, MOST_VOTES + 1])
def test_beyond_fp32_is_refused(bound: int) -> None:
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


@pytest.mark.parametrize("topk", [1, 2, 3, 32, 100, 4096])
def test_the_mean_adds_halves(topk: int) -> None:
    values = np.random.default_rng(topk).random((3, topk)).astype(np.float32)
    sums = np.zeros((3, 1 << (topk - 1).bit_length()), np.float32)
    sums[:, :topk] = values
    while sums.shape[1] > 1:
        sums = sums[:, : sums.shape[1] // 2] + sums[:, sums.shape[1] // 2 :]
    want = sums[:, 0] / np.float32(topk)
    assert mean_of_kept(torch.from_numpy(values)).numpy().tobytes() == want.tobytes()
