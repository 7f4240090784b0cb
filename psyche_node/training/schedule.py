"""Learning rates as fp32 bit patterns, in exact integer arithmetic: no host's mathematics library is asked."""

from __future__ import annotations

from enum import IntEnum
from fractions import Fraction
from typing import Protocol

_POINT = 128  # binary places of the fixed-point cosine
_PI = 0x3243F6A8885A308D313198A2E03707344  # pi * 2**128, rounded down
_SMALLEST_NORMAL = 0x00800000


class Schedule(IntEnum):
    """What the learning rate does after its warm-up."""

    CONSTANT = 0
    """It stays at its peak."""
    LINEAR = 1
    """It falls in a line to its final value, which the last round has."""
    COSINE = 2
    """It falls along half a cosine to its final value, which the last round has."""
    WSD = 3
    """Warm-up, stable, decay: it stays at its peak and falls in a line during the last ``decay_rounds``."""


class Scheduled(Protocol):
    """What ``lr_bits`` needs to know of a run's terms."""

    @property
    def first_round(self) -> int: ...
    @property
    def total_rounds(self) -> int: ...
    @property
    def schedule(self) -> int: ...
    @property
    def warmup_rounds(self) -> int: ...
    @property
    def decay_rounds(self) -> int: ...
    @property
    def peak_lr_bits(self) -> int: ...
    @property
    def final_lr_bits(self) -> int: ...


def lr_bits(terms: Scheduled, round: int) -> int:
    """Return the learning rate of ``round`` as an fp32 bit pattern, the same on every host.

    In warm-up round r of w it is (r + 1) / w of the peak. The exact value is rounded to the nearest fp32 number, ties
    to even; what is below the smallest normal number, which not all hardware multiplies by, is 0. After the last round
    it stays where it is. Raises ValueError for a round before the first.
    """
    bits = _bits(terms, round)
    return bits if bits >= _SMALLEST_NORMAL else 0


def _bits(terms: Scheduled, round: int) -> int:
    if round < terms.first_round:
        raise ValueError(f"round {round} is before the first round of these terms, {terms.first_round}")
    round -= terms.first_round
    peak, final = exact(terms.peak_lr_bits), exact(terms.final_lr_bits)
    if round < terms.warmup_rounds:
        return fp32_bits(peak * Fraction(round + 1, terms.warmup_rounds))
    last = terms.total_rounds - 1
    at = min(round, max(last, 0))
    schedule = Schedule(terms.schedule)
    if schedule is Schedule.CONSTANT:
        return terms.peak_lr_bits
    if schedule is Schedule.WSD:
        start = terms.total_rounds - terms.decay_rounds
        if at < start:
            return terms.peak_lr_bits
        return fp32_bits(peak + (final - peak) * Fraction(at - start + 1, terms.decay_rounds))
    done = Fraction(max(0, at - terms.warmup_rounds), max(1, last - terms.warmup_rounds))
    if schedule is Schedule.LINEAR:
        return fp32_bits(peak + (final - peak) * done)
    return fp32_bits(final + (peak - final) * (1 + _cos_pi(done)) / 2)


def exact(bits: int) -> Fraction:
    """Return the exact value of an fp32 bit pattern. Raises ValueError unless it is finite and not negative."""
    if not 0 <= bits < 0x7F800000:
        raise ValueError(f"{bits:#x} is not the bit pattern of a finite fp32 number that is not negative")
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    if exponent == 0:
        return Fraction(mantissa, 1 << 149)
    return Fraction(mantissa | 1 << 23) * Fraction(2) ** (exponent - 150)


def fp32_bits(value: Fraction) -> int:
    """Return the bit pattern of the fp32 number nearest to ``value``, ties to even.

    Raises ValueError if it is negative or beyond the largest finite number.
    """
    if value < 0:
        raise ValueError(f"{float(value)} is negative; learning rates are not")
    if value == 0:
        return 0
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if value < Fraction(2) ** exponent:
        exponent -= 1
    exponent = max(exponent, -126)
    # The mantissa includes the leading 1 of a normal number, so that a carry into the exponent comes out by itself.
    mantissa = round(value / Fraction(2) ** (exponent - 23))
    bits = ((exponent + 126) << 23) + mantissa
    if bits >= 0x7F800000:
        raise ValueError(f"{float(value)} is beyond the largest fp32 number")
    return bits


def _cos_pi(turn: Fraction) -> Fraction:
    """Cosine of pi * turn for turn in [0, 1], to about 120 binary places, by its Taylor series in fixed point.

    Where it is 1, 0 or -1 it is exact: a schedule that ends at 0 ends there.
    """
    if (2 * turn).denominator == 1:
        return 1 - 2 * turn
    angle = _PI * turn.numerator // turn.denominator
    square = angle * angle >> _POINT
    term = total = 1 << _POINT
    n = 0
    while term:
        n += 2
        term = (term * square >> _POINT) // (n * (n - 1))
        total += -term if n % 4 == 2 else term
    return max(Fraction(-1), min(Fraction(1), Fraction(total, 1 << _POINT)))
