"""Learning rates: exact vectors, and agreement with the formulas in floating point."""

from __future__ import annotations

import json
import math
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche_node.training import Schedule, TrainingTerms, lr_bits
from psyche_node.training.schedule import _cos_pi, exact, fp32_bits
from psyche_node.training.terms import fp32

PEAK, FINAL = 0x3B03126F, 0x38D1B717  # 0.002, 0.0001

VECTORS = json.loads((Path(__file__).resolve().parent.parent / "vectors" / "schedules.json").read_text())


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


@pytest.mark.parametrize("kind", [Schedule.LINEAR, Schedule.COSINE, Schedule.WSD])
@pytest.mark.parametrize("rounds", [3, 9, 20, 9000])
def test_a_schedule_that_ends_at_zero_ends_at_zero(kind: Schedule, rounds: int) -> None:
    terms = schedule(kind, total_rounds=rounds, warmup_rounds=1, decay_rounds=min(rounds - 1, 20), final_lr_bits=0)
    assert lr_bits(terms, rounds - 1) == 0
    assert lr_bits(terms, rounds - 2) >= 0x00800000


@pytest.mark.parametrize("kind", list(Schedule))
def test_no_rate_is_subnormal(kind: Schedule) -> None:
    terms = schedule(kind, peak_lr_bits=0x00800000, final_lr_bits=1)
    assert {lr_bits(terms, round) for round in range(101)} <= {0, 0x00800000}


def test_edges_of_the_schedules() -> None:
    one = schedule(Schedule.COSINE, total_rounds=1, warmup_rounds=0)
    assert lr_bits(one, 0) == lr_bits(one, 5) == PEAK, "a single round is trained at the peak"
    only_warmup = schedule(Schedule.LINEAR, total_rounds=8, warmup_rounds=8)
    assert lr_bits(only_warmup, 7) == PEAK
    no_decay = schedule(Schedule.WSD, decay_rounds=0)
    assert {lr_bits(no_decay, round) for round in (8, 99, 1000)} == {PEAK}
    only_decay = schedule(Schedule.WSD, warmup_rounds=0, decay_rounds=100)
    assert lr_bits(only_decay, 0) < PEAK
    assert lr_bits(only_decay, 99) == FINAL
    later = schedule(Schedule.COSINE, first_round=50)
    assert [lr_bits(later, 50 + round) for round in range(100)] == [
        lr_bits(schedule(Schedule.COSINE), round) for round in range(100)
    ]
    with pytest.raises(ValueError, match="before the first round"):
        lr_bits(later, 49)


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name: str) -> None:
    """Part of the protocol: every member must step by exactly these numbers."""
    known = VECTORS[name]
    terms = TrainingTerms(**known["terms"])
    assert {at: f"{lr_bits(terms, int(at)):08x}" for at in known["rates"]} == known["rates"]


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
