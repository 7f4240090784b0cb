"""Sizes of a model of 36 billion parameters on eight GPUs: by arithmetic, on the meta device and in sparse files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from optimizer.blocks import in_tensor
from optimizer.border import filling
from optimizer.codec import Header, encode_header, open_body
from optimizer.geometry import Geometry, Part
from optimizer.layout import BLOCK, Layout
from psyche_node.mapping import mapped
from psyche_node.network.blobs import piece_count, piece_length
from psyche_node.network.messages import MAX_BLOB_BYTES
from psyche_node.planning.meta import shape_from
from psyche_node.planning.shape import config_of

GPUS = 8


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout.build(shape_from(config_of("Seed-OSS-36B")).tensors, topk=512)


def share(layout: Layout, rank: int) -> list[Part]:
    """What FSDP2 leaves a rank of each tensor: its part of the rows, or of a vector's values."""
    parts = []
    for placement in layout.placements:
        whole = Part.whole(placement)
        _, stop = whole.rows if placement.matrix else whole.cols
        chunk = -(-stop // GPUS)
        held = (min(rank * chunk, stop), min((rank + 1) * chunk, stop))
        parts.append(Part(held, whole.cols) if placement.matrix else Part(whole.rows, held))
    return parts


def test_every_value_of_36_billion_is_in_one_place(layout: Layout) -> None:
    """Blocks of the last rank: its pieces say where in its tensors each begins, and together they are all of them."""
    parts = share(layout, GPUS - 1)
    geometry = Geometry.build(layout, 256, parts)
    assert len(geometry.blocks) * BLOCK > 1 << 32, "a momentum of so many values needs more than 32 bits"
    assert filling(layout, parts).sum(dtype=np.int64) == sum(part.numel for part in parts)
    values = np.zeros(len(parts), np.int64)
    furthest = np.zeros(len(parts), np.int64)
    for slab in geometry.slabs:
        pieces = slab.pieces()
        assert pieces["block"].min(initial=0) >= 0
        assert pieces["block"].max(initial=0) < slab.count
        sizes = pieces["rows"].astype(np.int64) * pieces["cols"]
        np.add.at(values, pieces["tensor"], sizes)
        last = pieces["start"] + (pieces["rows"] - 1) * pieces["stride"] + pieces["cols"]
        np.maximum.at(furthest, pieces["tensor"], last)
    assert values.tolist() == furthest.tolist() == [part.numel for part in parts]


def test_a_tensor_of_more_than_32_bits_is_found() -> None:
    """As a mixture's experts are, which one matrix holds."""
    layout = Layout.build([("experts", (70_000, 70_000))], topk=1)
    geometry = Geometry.build(layout, 4096)
    slab = geometry.slabs[-1]
    last = slab.pieces()[-1]
    wanted = 70_000 * 70_000
    assert last["start"] + (last["rows"] - 1) * last["stride"] + last["cols"] == wanted
    experts = torch.empty(70_000, 70_000, device="meta")
    region = in_tensor(experts, slab.regions[-1])
    ends = sum((n - 1) * stride for n, stride in zip(region.shape, region.stride(), strict=True))
    assert region.storage_offset() + ends + 1 == wanted


def test_an_update_of_gigabytes_is_opened_and_not_read(layout: Layout, tmp_path: Path) -> None:
    header = Header(bytes(range(32)), 7, 23)
    path = tmp_path / "update"
    with path.open("wb") as file:
        file.write(encode_header(header, layout))
        file.truncate(layout.update_bytes)
    found, body = open_body(mapped(path), layout)
    assert found == header
    assert body.shape == (layout.blocks, layout.code.bytes)
    assert not body[-1].any()
    assert path.stat().st_blocks * 512 < 1 << 20, "it has no bytes but its header's"


def test_its_updates_fit_what_carries_them(layout: Layout) -> None:
    assert 1 << 31 < layout.update_bytes <= MAX_BLOB_BYTES
    pieces = piece_count(layout.update_bytes)
    assert sum(piece_length(layout.update_bytes, index) for index in range(pieces)) == layout.update_bytes
