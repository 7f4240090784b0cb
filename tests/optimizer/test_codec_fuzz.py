"""The decoder against mutated and random bytes: a different valid update, or a reason; both codecs of one mind."""

import contextlib
import tracemalloc

import numpy as np
import pytest
from codec_fuzzing import fuzz, valid_blob

from optimizer.codec import Update, decode, encode, validate
from optimizer.errors import MalformedUpdate
from optimizer.layout import HEADER_BYTES, Layout


def test_mutated_bytes_are_refused_or_another_update() -> None:
    accepted, refused = fuzz(3000)
    assert min(accepted, refused) > 150, "the mutations reach both outcomes"


@pytest.mark.parametrize("topk", [8, 128])
def test_memory_is_bounded_by_the_layout(topk: int) -> None:
    """Whatever a header claims: refusing takes next to nothing, decoding the arrays of the result and one slab."""
    layout = Layout.build([("w", (64 * 3000, 64))], topk)
    good = valid_blob(Layout.build([("w", (64, 64))], topk), np.random.default_rng(0))
    body = good[HEADER_BYTES:] * layout.blocks
    header = encode(Update(bytes(32), 0, 0, *_empty(layout)), layout)[:HEADER_BYTES]
    result = layout.blocks * topk * 3
    for blob, most in (
        (header + body, result + (4 << 20)),
        ((header + body)[:-1], 1 << 16),
        (header[:8] + (1 << 62).to_bytes(8, "little") + header[16:] + body, 1 << 16),
    ):
        tracemalloc.start()
        with contextlib.suppress(MalformedUpdate):
            decode(blob, layout)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most
    tracemalloc.start()
    validate(header + body, layout)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20, "to validate needs no memory that grows with the model"


def _empty(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    indices = np.tile(np.arange(layout.topk, dtype=np.uint16), (layout.blocks, 1))
    return indices, np.zeros(indices.shape, np.bool_)
