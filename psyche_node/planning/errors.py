"""What can go wrong while planning."""


class PlanError(Exception):
    """Something cannot be planned as asked; the message says what, and what to write instead."""
