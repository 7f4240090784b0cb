"""What can go wrong when updates are made and applied. MalformedUpdate is in `optimizer.codec`."""


class OptimizerError(Exception):
    """Base of the errors below."""


class NonFiniteGradient(OptimizerError):
    """A gradient holds NaN, infinity or a number too large. Nothing was changed: leave this round out."""


class UnknownRound(OptimizerError):
    """A round for which this member keeps no update of its own."""
