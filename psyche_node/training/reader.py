"""What training needs of data, as protocols: the packages do not import each other.

Shapes: B sequences of a batch, L the sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt


class PackedBatch(Protocol):
    """Packed sequences of documents."""

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """(B, L)"""

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        """(B, L): the token is a target, predicted from the place before it."""

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """(B, L): the place of each token in its own document."""


class DataReader(Protocol):
    """A prepared data set."""

    def __len__(self) -> int: ...

    @property
    def sequence_length(self) -> int: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def digest(self) -> bytes: ...

    @property
    def unigram_entropy(self) -> float: ...

    def batch(self, positions: Sequence[int], seed: bytes) -> PackedBatch: ...

    def heldout(self, limit: int | None = None) -> PackedBatch: ...
