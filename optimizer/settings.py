"""What an optimizer is made with besides its parameters and their rates: checked once, in words."""

from dataclasses import dataclass
from numbers import Real


@dataclass(frozen=True, slots=True)
class Settings:
    """Arguments of `DisTrO`, which describes them. Raises ValueError, with the name, for one that cannot be.

    `topk` is checked where a layout is built, `engine` where one is chosen.
    """

    decay: float
    topk: int
    window: int
    lookahead: bool
    clip_votes: bool
    stochastic_rounding: bool
    robust: bool
    slab_blocks: int | None
    engine: str

    def __post_init__(self) -> None:
        if not (_is(self.decay, Real) and 0.0 <= self.decay < 1.0):
            raise ValueError(f"decay is {self.decay!r}; it must be a number of at least 0 and below 1")
        if not (_is(self.window, int) and 0 <= self.window <= 8):
            raise ValueError(
                f"window is {self.window!r}; it must be an int between 0 and 8, for a memory of 1 to 256 rounds"
            )
        if self.slab_blocks is not None and not (_is(self.slab_blocks, int) and self.slab_blocks >= 1):
            raise ValueError(f"slab_blocks is {self.slab_blocks!r}; it must be None or an int of at least 1")
        for name in ("lookahead", "clip_votes", "stochastic_rounding", "robust"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
