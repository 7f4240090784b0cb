"""What can go wrong with training data; every message says what, where, and what to do."""

from __future__ import annotations


class DataError(Exception):
    """The training data, or a folder prepared from it, cannot be used."""


class BadSample(DataError):
    """One line of a data file is not a sample in any known format."""

    def __init__(self, where: str, what: str, remedy: str) -> None:
        super().__init__(f"{where}: {what}. {remedy}")
        self.where, self.what, self.remedy = where, what, remedy


class DataMismatch(DataError):
    """A prepared folder does not hold the bytes that its manifest, or the run, names."""
