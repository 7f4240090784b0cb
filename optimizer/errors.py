"""What can go wrong when updates are made, read and applied."""


class OptimizerError(Exception):
    """Base of the errors of the optimizer itself."""


class NonFiniteGradient(OptimizerError):
    """A gradient holds NaN, infinity or a number too large. Nothing was changed: leave this round out."""


class UnknownRound(OptimizerError):
    """An update that is not among the own ones whose fate is open."""


class MalformedUpdate(ValueError):
    """Bytes that are not an update of this layout. `reason` says what is wrong and where."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"malformed update: {reason}")
        self.reason = reason
