"""Learning rates: exact vectors, and agreement with the formulas in floating point."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche_node.training import Schedule, TrainingTerms, lr_bits
from psyche_node.training.schedule import _cos_pi, exact, fp32_bits
from psyche_node.training.terms import fp32

PEAK, FINAL = 0x3B03126F, 0x38D1B717  # 0.002, 0.0001

VECTORS = {
    "CONSTANT": (
        "3983126f 3a83126f 3b03126f 3b03126f 3b03126f 3b03126f 3b03126f 3b03126f 3b03126f 3b03126f 3b03126f 3b03126f"
    ),
    "LINEAR": (
        "3983126f 3a83126f 3b03126f 3b03126f 3ac9eff4 3a8841dd 3a07ae5f 3a023532 38fd807c 38d1b717 38d1b717 38d1b717"
    ),
    "COSINE": (
        "3983126f 3a83126f 3b03126f 3b03126f 3ae3ec64 3a8779f1 39a682d0 399bca65 38d2e6ff 38d1b717 38d1b717 38d1b717"
    ),
    "WSD": (
        "3983126f 3a83126f 3b03126f 3b03126f 3b03126f 3b03126f 3b03126f 3af9b132 394c78ea 38d1b717 38d1b717 38d1b717"
    ),
}


def schedule(kind: Schedule, **changes: int) -> TrainingTerms:
    values = {"total_rounds": 100, "warmup_rounds": 8, "peak_lr_bits": PEAK, "final_lr_bits": FINAL, "decay_rounds": 20}
    return TrainingTerms(schedule=kind, **{**values, **changes})


@given(st.floats(0, float(np.finfo(np.float32).max), allow_nan=False))
def test_rounding_to_fp32_is_that_of_the_hardware(value: float) -> None:
    expected = struct.unpack("<I", np.float32(value).tobytes())[0]
    assert fp32_bits(Fraction(value)) == expected
    assert exact(expected) == Fraction(float(np.float32(value)))


def test_rounding_ties_to_even_and_carries() -> None:
    assert fp32_bits(Fraction(1) + Fraction(1, 1 << 24)) == 0x3F800000
    assert fp32_bits(Fraction(1) + Fraction(3, 1 << 24)) == 0x3F800002
    assert fp32_bits(Fraction(2) - Fraction(1, 1 << 25)) == 0x40000000
    assert fp32_bits(Fraction(1, 1 << 149)) == 1
    assert fp32_bits(Fraction(1, 1 << 150)) == 0
    with pytest.raises(ValueError, match="beyond"):
        fp32_bits(Fraction(1 << 128))
    with pytest.raises(ValueError, match="negative"):
        fp32_bits(Fraction(-1))
    with pytest.raises(ValueError, match="not the bit pattern"):
        exact(0x7F800000)


@given(st.fractions(0, 1))
def test_cosine(turn: Fraction) -> None:
    assert float(_cos_pi(turn)) == pytest.approx(math.cos(math.pi * turn), abs=1e-15)


def test_cosine_at_exact_angles() -> None:
    for turn, value in ((0, 1), (Fraction(1, 3), Fraction(1, 2)), (Fraction(1, 2), 0), (1, -1)):
        assert abs(_cos_pi(Fraction(turn)) - value) < Fraction(1, 1 << 118)


def test_vectors() -> None:
    """Part of the protocol: every member must step by exactly these numbers."""
    rounds = (0, 3, 7, 8, 30, 54, 79, 80, 98, 99, 100, 10**6)
    found = {kind.name: " ".join(f"{lr_bits(schedule(kind), r):08x}" for r in rounds) for kind in Schedule}
    assert found == VECTORS


@pytest.mark.parametrize("kind", list(Schedule))
def test_shape(kind: Schedule) -> None:
    terms = schedule(kind)
    rates = [fp32(lr_bits(terms, r)) for r in range(101)]
    assert rates[:8] == sorted(rates[:8])
    assert rates[0] == pytest.approx(0.002 / 8)
    assert rates[7] == pytest.approx(0.002) == rates[8]
    assert rates[8:] == sorted(rates[8:], reverse=True)
    last = 0.002 if kind is Schedule.CONSTANT else 0.0001
    assert rates[99] == rates[100] == pytest.approx(last)
    middle = {
        Schedule.LINEAR: 0.002 - 0.0019 * 46 / 91,
        Schedule.COSINE: 0.0001 + 0.0019 * (1 + math.cos(math.pi * 46 / 91)) / 2,
    }
    assert rates[54] == pytest.approx(middle.get(kind, 0.002), rel=1e-6)


def test_short_runs_do_not_divide_by_zero() -> None:
    for kind in Schedule:
        for total in (1, 2, 3):
            for warmup in (0, 1, 5):
                terms = schedule(kind, total_rounds=total, warmup_rounds=warmup, decay_rounds=min(2, total))
                assert all(lr_bits(terms, r) > 0 for r in range(total + 1))
    assert lr_bits(schedule(Schedule.WSD, decay_rounds=0), 50) == PEAK
    with pytest.raises(ValueError, match="first round"):
        lr_bits(schedule(Schedule.COSINE), -1)


def test_a_schedule_begins_with_the_first_round_of_its_terms() -> None:
    for kind in Schedule:
        early, late = schedule(kind), schedule(kind, first_round=40)
        assert [lr_bits(late, r + 40) for r in range(120)] == [lr_bits(early, r) for r in range(120)]
        with pytest.raises(ValueError, match="first round of these terms, 40"):
            lr_bits(late, 39)
