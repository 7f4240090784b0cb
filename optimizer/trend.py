"""Which way the votes of the last rounds point: a leaky sum of H V H in 16-bit integers, equal on all replicas.

One round's few votes say little about a single weight: the sign of H V H is mostly noise, and its mean is proportional
to the gradient as in plain SGD. Summed over some rounds it says enough for the sign to make steps of equal size, which
is what Adam and sign momentum live on. Members keep this sum, not each its own momentum in the weights' domain, so it
costs no byte on the wire.
"""

from torch import Tensor

FRACTION = 3
"""Bits behind the point: the trend counts in eighths of a vote, so that the leak is a shift and rounds little."""
LARGEST = (1 << 15) - 1


def follow(trend: Tensor, changes: Tensor, window: int) -> Tensor:
    """trend - trend / 2^window + changes, both of any one shape, int16 and int32, to int16.

    The leak is rounded away from zero, so that without votes every trend ends at zero and its weight at rest; beyond 16
    bits the trend stays at the end of its range. `window` 0 keeps nothing of the past.
    """
    held = trend.int()
    leak = (held.abs() + ((1 << window) - 1)) >> window
    return (held - held.sign() * leak + (changes << FRACTION)).clamp_(-LARGEST, LARGEST).short()
