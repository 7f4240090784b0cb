"""Learning rates as fp32 bit patterns, so that every member steps by the same number."""

import struct
from numbers import Integral, Real


def rate(value: object, name: str = "learning rate") -> float:
    """The fp32 number meant by `value`: an int is a bit pattern (0x3F800000 is 1.0), a float is rounded to fp32.

    Raises ValueError, with `name`, unless it is finite and not negative.
    """
    if isinstance(value, bool) or not isinstance(value, Integral | Real):
        raise ValueError(f"a {name} is an fp32 bit pattern (int) or a number (float), not {value!r}")
    if isinstance(value, Integral) and 0 < int(value) < 1 << 23:
        raise ValueError(
            f"{name} {value!r} is an int, read as an fp32 bit pattern, and next to nothing; write {value}.0"
        )
    try:
        packed = struct.pack("<I", int(value)) if isinstance(value, Integral) else struct.pack("<f", float(value))
    except (struct.error, OverflowError) as error:
        raise ValueError(f"{name} {value!r} does not fit 32 bits: {error}") from error
    number = float(struct.unpack("<f", packed)[0])
    if not 0.0 <= number < float("inf"):
        raise ValueError(f"{name} {value!r} means {number}; it must be finite and not negative")
    return number


def kept_share(lr: float, weight_decay: float) -> float:
    """1 - lr * weight_decay as fp32, of fp32 factors: IEEE double arithmetic, the same on every host.

    Raises ValueError if nothing would be left of the weights.
    """
    if lr * weight_decay > 1.0:
        raise ValueError(f"weight decay {weight_decay} at learning rate {lr} takes more than all; lower one of them")
    return rate(1.0 - lr * weight_decay)
