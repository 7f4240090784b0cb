"""Rounding by chance: the generator's known answers, exact means, and the same bits on every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizer import DisTrO, engine, report
from optimizer.rounding import Chance, philox, round_by_chance

# Of the authors' Random123, kat_vectors: counter, key, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def plain_philox(counter: list[int], key: int) -> list[int]:
    """The same in Python's integers, one counter at a time."""
    a, b, c, d = counter
    low, high = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = second >> 32 ^ b ^ low, second & 0xFFFFFFFF, first >> 32 ^ d ^ high, first & 0xFFFFFFFF
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: str, key: str, answer: str, device: str) -> None:
    low, high = words(key)
    a, b, c, d = (torch.tensor([word], device=device) for word in words(counter))
    assert [int(word) for word in philox((a, b, c, d), low | high << 32)] == words(answer)


@pytest.mark.parametrize("device", DEVICES)
def test_draws_are_by_place_in_the_layout(device: str) -> None:
    key, round, stream = 0x0123456789ABCDEF, 70, 1
    blocks = np.array([0, 5, 9_000_000], np.int64)
    drawn = Chance(key, round, stream).draws(blocks, torch.device(device)).cpu()
    assert drawn.shape == (3, 4096)
    for row, block in enumerate(blocks.tolist()):
        for place in (0, 1, 7, 8, 2049, 4095):
            index = 4096 * block + place
            counter = [index // 8 & 0xFFFFFFFF, index // 8 >> 32, round, stream]
            word = plain_philox(counter, key)[index // 2 % 4]
            assert int(drawn[row, place]) == (word >> 16 if index % 2 else word & 0xFFFF)


def test_draws_are_even() -> None:
    drawn = Chance(1, 2, 0).draws(np.arange(64), torch.device("cpu")).double()
    assert (int(drawn.min()), int(drawn.max())) == (0, 65535)
    assert float(drawn.mean()) == pytest.approx(32767.5, abs=5 * 18918 / 512)
    for other in (Chance(1, 3, 0), Chance(2, 2, 0), Chance(1, 2, 1)):
        both = torch.stack([drawn.flatten(), other.draws(np.arange(64), torch.device("cpu")).double().flatten()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.01


@given(st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100), st.integers(0, 65535))
def test_one_of_the_neighbours(value: float, draw: int) -> None:
    x = torch.tensor([value], dtype=torch.float32)
    found = round_by_chance(x, torch.tensor([draw], dtype=torch.int32))
    lower = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    rest = int(x.view(torch.int32)) & 0xFFFF
    upper = (lower.view(torch.int32) + 0x10000).view(torch.float32)
    assert float(found) == float(upper if rest + draw >= 65536 else lower)
    if rest == 0:
        assert float(found) == value


def test_the_mean_is_exact() -> None:
    """Over all draws there are."""
    draws = torch.arange(65536, dtype=torch.int32)
    for value in (0.1, -3.14159, 1e-5, 250.0, 1.0000001):
        x = torch.full((65536,), value)
        assert float(round_by_chance(x, draws).double().mean()) == float(x[0].double())


def test_what_is_not_finite_stays() -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan")])
    found = round_by_chance(x, torch.full((3,), 65535, dtype=torch.int32))
    assert found[0] == x[0]
    assert found[1] == x[1]
    assert bool(found[2].isnan())


def model(device: str = "cpu") -> torch.nn.Module:
    torch.manual_seed(1)
    made = torch.nn.Sequential(torch.nn.Linear(70, 130), torch.nn.Tanh(), torch.nn.Linear(130, 33))
    return made.to(device, torch.bfloat16)


def trained(slab_blocks: int = 256, threads: int = 1, device: str = "cpu", rounds: int = 6, lr: float = 1e-5) -> DisTrO:
    net = model(device)
    optimizer = DisTrO(
        net.named_parameters(), lr=lr, topk=64, weight_decay=0.01, stochastic_rounding=True, slab_blocks=slab_blocks
    )
    optimizer.net = net  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(4)
    torch.set_num_threads(threads)
    try:
        for number in range(rounds):
            with optimizer.lookahead():
                for parameter in net.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(device, torch.bfloat16)
            optimizer.apply([optimizer.encode(run=b"round by chance".ljust(32), round=number)])
    finally:
        torch.set_num_threads(1)
    return optimizer


@pytest.mark.parametrize(("slab_blocks", "threads"), [(1, 1), (3, 2)])
def test_slabs_and_threads_do_not_matter(slab_blocks: int, threads: int) -> None:
    assert trained(slab_blocks, threads).fingerprint() == trained().fingerprint()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_weights() -> None:
    assert trained(device="cuda").fingerprint() == trained().fingerprint()


def test_rounds_and_runs_draw_differently() -> None:
    one, other = trained(rounds=0), trained(rounds=0)
    for optimizer, run in ((one, b"a" * 32), (other, b"b" * 32)):
        optimizer.apply([optimizer.encode(run=run, round=0)])
    assert one.fingerprint() != other.fingerprint()


def test_steps_below_bf16s_resolution_are_not_lost() -> None:
    """1e-5 is far below the resolution at 0.02. The mean movement is the rate all the same."""
    net = torch.nn.Linear(256, 256, bias=False).bfloat16()
    before = torch.full((256, 256), 0.02).bfloat16()
    net.weight.data.copy_(before)
    optimizer = DisTrO(net.named_parameters(), lr=1e-5, topk=4096, window=0, lookahead=False, stochastic_rounding=True)
    net.weight.grad = torch.randn(256, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    optimizer.apply([optimizer.encode()])
    assert optimizer.report().lost == 0.0
    moved = net.weight.detach().double() - before.double()
    stepped = optimizer.state_dict()["trend"].count_nonzero()
    assert stepped > 60_000
    assert float(moved.abs().sum()) == pytest.approx(1e-5 * float(stepped), rel=0.1)
    assert 0.02 < float((moved != 0).double().mean()) < 0.2
    # Rounded to the nearest, all of it is lost.
    assert torch.equal((before.float() - 1e-5).bfloat16(), before)


@pytest.mark.parametrize("nearest", [False, True])
def test_the_report_tells_what_rounding_takes_back(nearest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if nearest:
        for user in (engine, report):
            monkeypatch.setattr(user, "round_by_chance", lambda values, draws: values.bfloat16())
    optimizer = trained()
    lost = optimizer.report().lost
    assert lost is not None
    assert lost > 0.5 if nearest else lost == 0.0


def test_a_step_that_no_chance_can_make_is_told_as_lost() -> None:
    found = trained(lr=1e-12).report()
    assert found.lost is not None
    assert found.ties is not None
    assert found.lost == pytest.approx(1 - found.ties, rel=0.01)


def test_only_bf16_parameters() -> None:
    net = model()
    net[0].float()
    with pytest.raises(ValueError, match=r"0\.weight is torch\.float32; stochastic rounding is for"):
        DisTrO(net.named_parameters(), lr=1e-3, stochastic_rounding=True)


def test_no_masters_are_kept_and_lookahead_puts_everything_back() -> None:
    optimizer = trained()
    assert optimizer.state_dict()["masters"] == {}
    net = optimizer.net  # type: ignore[attr-defined]
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer.set_lr(0.01)
    with optimizer.lookahead():
        assert any(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
