"""Kernels in Triton against the definition, bit for bit, on tensors of the CPU: `test_triton` runs this file by itself,
with TRITON_INTERPRET=1. Triton's interpreter takes a tenth of a second for a block, so everything here is tiny.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from optimizer import DisTrO, MalformedUpdate, triton_engine
from optimizer.compiled import choose_engine
from optimizer.engine import PlainEngine, Rule, Sent, Step
from optimizer.geometry import Geometry, Part
from optimizer.layout import BLOCK, Layout
from optimizer.plain_codec import encode_blocks
from optimizer.rehearsal import differences
from optimizer.triton_engine import TritonEngine

CPU = torch.device("cpu")
RUN = bytes(32)


def plain(geometry: Geometry) -> PlainEngine:
    return PlainEngine(geometry, CPU)


def triton(geometry: Geometry) -> TritonEngine:
    return TritonEngine(geometry, CPU)


def test_the_rehearsal_finds_nothing() -> None:
    """Ragged tiles, shared blocks, ties, zeros, 16-bit tensors; a topk that is no power of two."""
    assert differences(triton, plain, CPU, topk=24) == []


def test_the_rehearsal_finds_an_engine_that_is_wrong() -> None:
    class Wrong(PlainEngine):
        def add(self, momentum_NC: torch.Tensor, sent: Sent, factor: float) -> None:
            super().add(momentum_NC, sent, factor * 1.0001)

    assert differences(lambda geometry: Wrong(geometry, CPU), plain, CPU, topk=4, shapes=[("only", (3,))]) == ["add"]


def test_after_a_failed_rehearsal_the_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_engine, "trouble", lambda device, topk: "other bits than torch in apply")
    geometry = Geometry.build(Layout.build([("one", (4,))], 2), 1)
    with pytest.raises(ValueError, match="cannot be used on cuda: other bits than torch in apply"):
        choose_engine(geometry, torch.device("cuda"), "triton")
    assert isinstance(choose_engine(geometry, torch.device("cuda")), PlainEngine)


@pytest.mark.parametrize(("topk", "shape"), [(1, (64, 64)), (200, (4096,))])
def test_bitmaps_of_every_length(topk: int, shape: tuple[int, ...]) -> None:
    assert differences(triton, plain, CPU, topk, [("only", shape)]) == []


def test_places_beyond_31_bits_and_many_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_engine, "SCRATCH", 100)

    def wide(geometry: Geometry) -> TritonEngine:
        engine = triton(geometry)
        engine._pieces = dataclasses.replace(engine._pieces, wide=True)
        return engine

    assert differences(wide, plain, CPU, 3, [("a", (66, 40)), ("b", (30,))]) == []


def test_border_blocks_come_whole_from_the_exchange() -> None:
    layout = Layout.build([("matrix", (130, 64))], 4096)
    geometry = Geometry.build(layout, 2, [Part((0, 70), (0, 64))], {1: 0})
    generator = torch.Generator().manual_seed(0)
    gradient, exchanged = torch.randn(70, 64, generator=generator), torch.randn(1, BLOCK, generator=generator)
    told = []
    for engine in (plain(geometry), triton(geometry)):
        momentum = torch.zeros(2, BLOCK)
        sent = Sent(None, np.zeros((2, layout.code.bytes), np.uint8), torch.zeros(2))  # type: ignore[arg-type]
        engine.encode([gradient], exchanged, momentum, sent, Rule(0.9, 0.01, 1))
        told.append((momentum.numpy().tobytes(), sent.body.tobytes(), sent.scale.numpy().tobytes()))
    assert told[0] == told[1]


def test_a_process_without_a_block_has_nothing_to_do() -> None:
    engine = triton(Geometry.build(Layout.build([("w", (70, 64))], 8), 2, [Part((0, 0), (0, 64))]))
    nothing = torch.empty(0, BLOCK)
    sent = Sent(None, np.zeros((0, 12), np.uint8), torch.zeros(0))  # type: ignore[arg-type]
    assert engine.encode([torch.empty(0, 64)], None, nothing, sent, Rule(0.9, 0.01, 1)).total == 0
    engine.apply(nothing.short(), [nothing], [np.zeros((2, 12), np.uint8)], Step([0.1], [1.0], 1, 3))
    assert engine.fingerprint([nothing]) == 0


@pytest.mark.parametrize("topk", [3, 130])
def test_malformed_rows_are_found(topk: int) -> None:
    """Bits of a row flipped, and rows that nearly keep the rules: valid where `plain_codec` says so."""
    layout = Layout.build([("one", (4,))], topk)
    engine, definition = triton(Geometry.build(layout, 1)), plain(Geometry.build(layout, 1))
    random = np.random.default_rng(topk)
    indices = np.sort(random.choice(BLOCK, topk, replace=False)).astype(np.uint16)[None]
    indices[0, 1] = indices[0, 0] + 1
    row = encode_blocks(indices, random.random((1, topk)) < 0.5, layout.code)
    bits = layout.code.bytes * 8
    good = []
    for flipped in (*[[bit] for bit in random.permutation(bits)[:12]], *random.integers(0, bits, (12, 2)), []):
        other = row.copy()
        for bit in flipped:
            other[0, bit // 8] ^= 1 << (bit % 8)
        good.append(is_valid(definition, [row, other]))
        assert is_valid(engine, [row, other]) == good[-1], flipped
    assert any(good)
    assert not all(good)


def is_valid(engine: PlainEngine | TritonEngine, bodies: Sequence[np.ndarray]) -> bool:
    try:
        engine.check(bodies)
    except MalformedUpdate:
        return False
    return True


def test_the_optimizer_with_either_engine() -> None:
    """By name, with masters, lookahead, an update that is put back and one that comes late."""
    told = []
    for engine in ("torch", "triton"):
        generator = torch.Generator().manual_seed(0)
        names = [("a", (9, 30)), ("b", (20,))]
        named = [(n, torch.nn.Parameter(torch.randn(s, generator=generator).to(torch.bfloat16))) for n, s in names]
        optimizer = DisTrO(named, lr=0.01, topk=8, weight_decay=0.1, engine=engine)
        blobs = []
        for round in range(2):
            with optimizer.lookahead():
                told.append([p.detach().float().numpy().tobytes() for _, p in named])
                for _, p in named:
                    p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            blobs.append(optimizer.encode(run=RUN, round=round))
            if round == 1:
                optimizer.restore(blobs[0])
        optimizer.apply([blobs[1]])
        told.append([*blobs, optimizer.fingerprint(), optimizer.state_dict()["momentum"].numpy().tobytes()])
    assert told[: len(told) // 2] == told[len(told) // 2 :]
