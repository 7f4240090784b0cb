"""Learning rates as fp32 bit patterns, so that every member steps by the same number."""

import struct


def rate(value: int | float) -> float:
    """The fp32 number meant by `value`: an int is a bit pattern (0x3F800000 is 1.0), a float is rounded to fp32.

    Raises ValueError unless it is finite and not negative.
    """
    if isinstance(value, bool):
        raise ValueError("a learning rate is an fp32 bit pattern (int) or a number (float), not a bool")
    try:
        packed = struct.pack("<I", value) if isinstance(value, int) else struct.pack("<f", value)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"learning rate {value!r} does not fit 32 bits: {error}") from error
    number = float(struct.unpack("<f", packed)[0])
    if not 0.0 <= number < float("inf"):
        raise ValueError(f"learning rate {value!r} means {number}; it must be finite and not negative")
    return number


def rate_bits(value: float) -> int:
    """The bit pattern of `value` rounded to fp32."""
    return int(struct.unpack("<I", struct.pack("<f", rate(float(value))))[0])


def kept_share(lr: float, weight_decay: float) -> float:
    """1 - lr * weight_decay as fp32, both factors fp32: IEEE double arithmetic, the same on every host."""
    return rate(1.0 - lr * rate(float(weight_decay)))
