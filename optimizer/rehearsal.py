"""A short round of an engine over awkward blocks: whether it makes the same bits as another one on the same device."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from optimizer.codec import Header, encode_blocks
from optimizer.engine import Engine, Rule, Sent, Step
from optimizer.geometry import Geometry
from optimizer.layout import BLOCK, Layout

Build = Callable[[Geometry], Engine]

# Whole and ragged tiles, a long vector, two short ones that share a block, one without a gradient.
SHAPES: list[tuple[str, tuple[int, ...]]] = [
    ("matrix", (66, 64)),
    ("long", (4100,)),
    ("short", (70,)),
    ("still", (20, 30)),
    ("tiny", (300,)),
]


def differences(
    build: Build, other: Build, device: torch.device, topk: int, shapes: Sequence[tuple[str, tuple[int, ...]]] = SHAPES
) -> list[str]:
    """Names of the results in which two engines differ by a bit."""
    geometry = Geometry.build(Layout.build(shapes, topk), most=3)
    mine, others = (rehearse(make(geometry), geometry, device) for make in (build, other))
    return [name for name, tensors in mine.items() if not all(map(_same, tensors, others[name]))]


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def rehearse(engine: Engine, geometry: Geometry, device: torch.device) -> dict[str, list[Tensor]]:
    """What every method makes of seeded values: ties, zeros of both signs, a 16-bit gradient, clipped votes and not."""
    generator = torch.Generator("cpu").manual_seed(0)
    layout, blocks = geometry.layout, len(geometry.blocks)
    shapes = [placement.shape for placement in layout.placements]

    def values(coarse: bool = False) -> list[Tensor]:
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes]
        return [(x.round() if coarse else x).to(device) for x in drawn]

    names = [placement.name for placement in layout.placements]
    momentum = torch.zeros(blocks, BLOCK, dtype=torch.float32, device=device)
    rounds: list[Sent] = []
    results: dict[str, list[Tensor]] = {"encode": [], "apply": [], "ahead": [], "fingerprint": []}
    for round in range(2):
        gradients: list[Tensor | None] = [
            None if name == "still" else x.to(torch.bfloat16) if name == "long" else x
            for name, x in zip(names, values(coarse=round == 0), strict=True)
        ]
        sent = Sent.empty(Header(bytes(32), round, 0), blocks, layout.code, device)
        engine.encode(gradients, None, momentum, sent, Rule(decay=0.875, rate=0.01, salt=round))
        rounds.append(sent)
        results["encode"] += [torch.from_numpy(sent.body), sent.scale, momentum.clone()]
    engine.add(momentum, rounds[0], 0.7)
    results["add"] = [momentum.clone()]
    random = np.random.default_rng(0)
    bodies = [sent.body for sent in rounds]
    for _ in range(7):
        ordered = np.argsort(random.random((blocks, BLOCK)), axis=1)[:, : layout.topk]
        indices = np.sort(ordered, axis=1).astype(np.uint16)
        bodies.append(encode_blocks(indices, random.random((blocks, layout.topk)) < 0.3, layout.code))
    weights, trend = values(), torch.zeros(blocks, BLOCK, dtype=torch.int16, device=device)
    weights[0].view(-1)[:2] = -0.0
    rates = [float(np.float32(0.001 * (tensor + 1))) for tensor in range(len(shapes))]
    shares = [0.9990000128746033, *[1.0] * (len(shapes) - 1)]
    settings = [(9, 1, 3, torch.float32, 1), (3, 0, 0, torch.bfloat16, 0), (1, 2, 1, torch.float16, 2)]
    for members, limit, window, dtype, travelling in settings:
        engine.check(bodies[:members])
        step = Step(rates, shares, limit, window)
        engine.apply(trend, weights, bodies[:members], step)
        results["apply"] += [*(w.clone() for w in weights), trend.clone()]
        targets = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        engine.ahead(trend, rounds[:travelling], weights, targets, step)
        results["ahead"] += targets
    for counted in (weights, [None, *weights[1:]]):
        number = engine.fingerprint(counted)
        results["fingerprint"].append(torch.tensor([number - (1 << 64) if number >> 63 else number], device="cpu"))
    return results
