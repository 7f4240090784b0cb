"""What every rank of a `gloo_world.World` runs: each function is one test, the same on all ranks."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle, product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sharded_models import Net, Shares, alone, fsdp, fsdp_tp, hsdp, layouts, like, mesh, net, trained, values
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from optimizer import DisTrO, MalformedUpdate, Update, encode
from optimizer.blocks import gather
from optimizer.errors import NonFiniteGradient, OptimizerError
from optimizer.geometry import Geometry, Part
from optimizer.layout import Layout, LayoutError
from optimizer.sharding import Alone, local, site_of

RUN = bytes(range(32))
ROUNDS = int(os.environ.get("REPLICA_ROUNDS", "40"))  # `make nightly` has 500
# Tensors that are cut in every awkward way: less rows than ranks, tiles cut by shards, shards left empty.
SHAPES = [(64, 128), (70, 130), (300, 130), (1000, 100), (3, 200), (203, 5), (1, 130)]
SHAPES += [(9, 7, 5), (1, 9, 70), (4, 1, 90), (5000,), (70,), (3,)]


def named(tensors: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"{number:03}", tensor) for number, tensor in enumerate(tensors)]


def layout_of(tensors: list[Tensor]) -> Layout:
    return Layout.build([(name, tuple(tensor.shape)) for name, tensor in named(tensors)], topk=4)


def distributed() -> Iterator[Shares]:
    """SHAPES by every pair of placements that the mesh allows."""
    world = dist.get_world_size()
    ways = [(mesh(world), (how,)) for how in (Shard(0), Shard(1), Shard(2), Replicate())]
    if world > 1:
        both = mesh(2, world // 2)
        ways += [(both, hows) for hows in product((Shard(0), Shard(1), Replicate()), repeat=2)]
    for over, hows in ways:
        shapes = [shape for shape in SHAPES if Shard(1) not in hows or len(shape) > 1]
        if Shard(2) in hows:
            shapes = [(4, 1, 90), (4, 1, 2)]
        full = [torch.arange(1.0, prod(shape) + 1).view(shape) for shape in shapes]
        yield Shares(named(distribute_tensor(tensor, over, hows) for tensor in full))


def same_parts(shares: Shares) -> None:
    """Parts name exactly the values that are here, and those of all processes count every value once."""
    parts = site_of(shares.layout, shares.parameters).parts
    for placement, tensor, part in zip(shares.layout.placements, shares.parameters, parts, strict=True):
        height, width = placement.matrix or (1, placement.numel)
        matrix = torch.arange(1.0, placement.numel + 1).view(height, width)
        found = matrix[slice(*part.rows), slice(*part.cols)].reshape(-1)
        assert torch.equal(found, local(tensor).reshape(-1)), (placement, tensor.placements, part)
        counts = torch.zeros(height, width)
        counts[slice(*part.rows), slice(*part.cols)] = float(part.counted)
        dist.all_reduce(counts)
        assert torch.equal(counts, torch.ones(height, width)), (placement, tensor.placements)


def parts_of_distributed_tensors() -> None:
    for shares in distributed():
        same_parts(shares)


def parts_of_fsdp_over_tensor_parallel() -> None:
    """Both cut dimension 0, tensor parallelism first, also where nothing divides evenly."""
    both = mesh(2, dist.get_world_size() // 2)
    holder = nn.ParameterList()
    for rows in (*range(1, 20), 63, 64, 70, 203):
        full = torch.arange(1.0, rows * 70 + 1).view(rows, 70)
        holder.extend(nn.Parameter(distribute_tensor(full, both["inner"], (how,))) for how in (Shard(0), Shard(1)))
    fully_shard(holder, mesh=both["outer"])
    same_parts(Shares(named(holder)))


def parts_of_models() -> None:
    for shard in layouts():
        shares = Shares.of_net(shard)
        same_parts(shares)
        assert {p.name for p in shares.layout.placements} == {name for name, _ in trained(Net())}


def exchange_completes_the_border() -> None:
    """With a missing gradient, 16-bit ones, and little memory at a time."""
    for shares in [*distributed(), *(Shares.of_net(shard) for shard in layouts())]:
        layout = shares.layout
        whole = Geometry.build(layout, layout.blocks).slabs[0]
        held, complete = (
            gather(whole, mask, torch.device("cpu"))
            for mask in (shares.mask(), [torch.ones(p.shape) for p in layout.placements])
        )
        border = (held.any(1) & (held != complete).any(1)).nonzero().view(-1).tolist()
        somewhere = torch.tensor(len(border))
        dist.all_reduce(somewhere)
        for dtype, scratch in ((torch.float32, 64 << 20), (torch.bfloat16, 100_000)):
            full = [tensor.to(dtype) for tensor in shares.random(3)]
            gradients = shares.held(full)
            gradients[1], full[1] = None, torch.zeros_like(full[1])
            site = site_of(layout, shares.parameters, scratch=scratch)
            assert list(site.border) == border
            exchanged = site.exchange(gradients)
            assert (exchanged is None) == (somewhere == 0)
            if exchanged is not None:
                assert (exchanged.dtype, tuple(exchanged.shape)) == (torch.float32, (len(border), 4096))
                wanted = gather(whole, full, torch.device("cpu"))
                assert torch.equal(exchanged[list(site.border.values())], wanted[border])


def assemble_makes_the_body_on_every_rank() -> None:
    everything = [*distributed(), *(Shares.of_net(shard) for shard in layouts())]
    for shares, scratch in zip(everything, cycle([64 << 20, 500]), strict=False):
        layout, site = shares.layout, site_of(shares.layout, shares.parameters, scratch=scratch)
        body = np.random.default_rng(5).integers(0, 256, (layout.blocks, layout.code.bytes), np.uint8)
        geometry = Geometry.build(layout, 7, site.parts, site.border)
        found = np.empty_like(body)
        site.assemble(body[geometry.blocks], found)
        assert np.array_equal(found, body)


def copies_that_differ_are_told() -> None:
    over = mesh(dist.get_world_size())
    tensors = [distribute_tensor(torch.ones(70, 70), over, (Shard(0),)), torch.ones(70)]
    layout = layout_of(tensors)
    site = site_of(layout, tensors)
    rows = np.zeros((len(Geometry.build(layout, 7, site.parts).blocks), 3), np.uint8)
    body = np.ones((layout.blocks, 3), np.uint8)
    site.assemble(rows, body)
    assert not body.any()
    rows[-1] = dist.get_rank()
    with pytest.raises(OptimizerError, match="different updates"):
        site.assemble(rows, body)


def agreement_and_sums() -> None:
    shares = Shares.of_net(layouts()[0])
    site = site_of(shares.layout, shares.parameters)
    rank, world = dist.get_rank(), dist.get_world_size()
    assert site.all(True)
    assert not site.all(rank != world - 1)
    parts = [(1 << 64) - 1 - 7 * number for number in range(world)]
    assert site.total(parts[rank]) == sum(parts) % (1 << 64)
    assert site.sum(0.1 * (rank + 1)) == pytest.approx(0.1 * world * (world + 1) / 2)


def plain_tensors_are_one_process() -> None:
    tensors = [torch.ones(3, 5), torch.ones(7)]
    layout = layout_of(tensors)
    site = site_of(layout, tensors)
    assert isinstance(site, Alone)
    assert site.parts == [Part.whole(placement) for placement in layout.placements]
    rows, body = np.ones((layout.blocks, 3), np.uint8), np.zeros((layout.blocks, 3), np.uint8)
    site.assemble(rows, body)
    assert (site.border, site.exchange(tensors), np.array_equal(body, rows)) == ({}, None, True)
    assert (site.all(False), site.total(-1), site.sum(0.5)) == (False, (1 << 64) - 1, 0.5)


def shards_that_cannot_be_told() -> None:
    """Every rank raises the same error, although only some find the fault."""
    world = dist.get_world_size()
    over, full, half = mesh(world), torch.ones(4, 8, 6), world // 2
    groups = [dist.new_group(list(range(first, first + half))) for first in (0, half)]
    faults = [
        (distribute_tensor(full, over, (Shard(2),)), None, "'000' of shape .* first or second dimension"),
        (DTensor.from_local(full, over, (Partial(),)), None, "'000' has placements .*Partial"),
        (DTensor.from_local(torch.ones(8, 4).T, over, (Shard(0),)), None, "'000' .* not contiguous"),
        (distribute_tensor(full, over, (Shard(0),)), groups[dist.get_rank() // half], "'000'.* the group of all"),
    ]
    for tensor, group, message in faults:
        with pytest.raises(LayoutError, match=message):
            site_of(layout_of([tensor]), [tensor], group)
    uneven = nn.Linear(9 if dist.get_rank() == 0 else 8, 4)
    fully_shard(uneven, mesh=over)
    with pytest.raises(LayoutError, match="ranks 0 and 1 have different layouts"):
        site_of(layout_of(list(uneven.parameters())), list(uneven.parameters()))


def gradients_are_placed_like_their_parameters() -> None:
    over, world = mesh(dist.get_world_size()), dist.get_world_size()
    full = torch.arange(70.0 * 130).view(70, 130)
    parameter = nn.Parameter(distribute_tensor(torch.zeros(70, 130), over, (Shard(0),)))
    wanted = distribute_tensor(full, over, (Shard(0),)).to_local()
    for gradient in (
        distribute_tensor(full, over, (Shard(0),)),
        distribute_tensor(full, over, (Shard(1),)),
        distribute_tensor(full, over, (Replicate(),)),
        DTensor.from_local(full / world, over, (Partial(),)),
    ):
        assert torch.equal(local(gradient, like=parameter), wanted)
    assert local(full) is full
    local(parameter).fill_(3.0)
    assert torch.equal(parameter.full_tensor(), torch.full((70, 130), 3.0))


def writes_reach_the_next_forward() -> None:
    """What is written into local tensors between rounds is what FSDP gathers, from the first forward pass on."""
    full = values(1, Net())
    model, tokens = net(full, fsdp), torch.arange(20).view(2, 10)
    for seed in (2, 3):
        new = values(seed, Net())
        here = net(new, fsdp)
        with torch.no_grad():
            for (_, old), (_, other) in zip(trained(model), trained(here), strict=True):
                local(old).copy_(local(other))
        model(tokens).sum().backward()
        found = model(tokens)
        assert torch.equal(found, here(tokens))
        model.reshard()


@dataclass
class Pair:
    """One member twice: with plain tensors in this process, and sharded over all of them."""

    shares: Shares
    plain: nn.Module
    sharded: nn.Module
    one: DisTrO
    many: DisTrO

    @classmethod
    def of(cls, shard: Callable[[nn.Module], None], dtype: torch.dtype = torch.float32, **settings: Any) -> Pair:
        full, settings = values(1, Net()), {"lr": 0.01, "topk": 8, "slab_blocks": 20, "weight_decay": 0.1, **settings}
        plain, sharded = net(full, alone, dtype), net(full, shard, dtype)
        one = DisTrO(trained(plain), **{**settings, "engine": "torch"})
        return cls(Shares.of_net(shard), plain, sharded, one, DisTrO(trained(sharded), **settings))

    def give(self, seed: int, missing: str = "") -> None:
        """The same gradients to both."""
        full = values(seed, self.plain)
        for name, parameter in trained(self.plain):
            parameter.grad = None if name == missing else full[name].to(parameter.dtype)
        for name, parameter, shard in self.shares.shards(self.sharded, full):
            parameter.grad = None if name == missing else like(shard.to(parameter.dtype), parameter)

    def same_weights(self) -> None:
        """Bit for bit, in what this process holds, and in the fingerprint."""
        full = {name: p.detach() for name, p in trained(self.plain)}
        for name, parameter, wanted in self.shares.shards(self.sharded, full):
            assert torch.equal(local(parameter).view(torch.uint8), wanted.contiguous().view(torch.uint8)), name

    def encode(self, round: int, member: int = 0) -> bytes:
        blob = self.one.encode(run=RUN, round=round, member=member)
        assert self.many.encode(run=RUN, round=round, member=member) == blob
        return blob

    def apply(self, blobs: list[bytes]) -> None:
        left_out = [optimizer.apply(blobs, lr=0.003) for optimizer in (self.one, self.many)]
        assert left_out[0] == left_out[1]
        self.same_weights()
        assert self.one.fingerprint() == self.many.fingerprint()


@cache
def vote(layout: Layout, round: int, member: int) -> bytes:
    """A peer's update."""
    generator = np.random.default_rng([round, member])
    keys = generator.random((layout.blocks, 4096))
    indices = np.sort(np.argsort(keys, axis=1)[:, : layout.topk], axis=1).astype(np.uint16)
    return encode(Update(RUN, round, member, indices, generator.random(indices.shape) < 0.5), layout)


def rounds_equal_those_of_one_process() -> None:
    """Four rounds: lookahead, a missing gradient, an own update that is not included, members left out as hostile."""
    ways = [(shard, torch.float32, {}) for shard in layouts()]
    ways += [(layouts()[0], torch.bfloat16, {"robust": True}), (layouts()[-1], torch.float32, {"engine": "torch"})]
    ways += [(shard, torch.bfloat16, {"stochastic_rounding": True}) for shard in layouts()]
    for number, (shard, dtype, settings) in enumerate(ways):
        pair, waiting, late = Pair.of(shard, dtype, **settings), list[list[bytes]](), number % 2
        for round in range(4):
            before = {name: local(p).clone() for name, p in trained(pair.sharded)}
            with pair.one.lookahead(), pair.many.lookahead():
                pair.same_weights()
                moved = torch.tensor([float((local(p) != before[name]).any()) for name, p in trained(pair.sharded)])
            assert all(torch.equal(local(p), before[name]) for name, p in trained(pair.sharded))
            assert bool(moved.any()) == (round > 0)
            pair.give(round, missing="long" if round == 2 else "")
            own, peers = pair.encode(round), [vote(pair.one.layout, round, member) for member in (1, 2)]
            waiting.append(peers if round == 1 else [*peers, own])
            if len(waiting) > late:
                pair.apply(waiting.pop(0))
            if round == 1 + late:
                lost = pair.one.travelling[1]
                for optimizer in (pair.one, pair.many):
                    optimizer.restore(lost)
        assert pair.many.travelling == pair.one.travelling
        assert pair.many.report().sampled > 0


def replicas_stay_equal_for_long() -> None:
    """A site of several processes beside one process: every update and, at the end, every weight."""
    pair = Pair.of(fsdp)
    full = [values(seed, pair.plain) for seed in range(5)]
    shards = [[(p, s.clone()) for _, p, s in pair.shares.shards(pair.sharded, these)] for these in full]
    for round in range(ROUNDS):
        for name, parameter in trained(pair.plain):
            parameter.grad = full[round * 3 % 5][name]
        for parameter, shard in shards[round * 3 % 5]:
            parameter.grad = like(shard, parameter)
        blobs = [vote.__wrapped__(pair.one.layout, round, 1), pair.encode(round)]
        for optimizer in (pair.one, pair.many):
            optimizer.apply(blobs, lr=0.003)
    pair.same_weights()
    assert pair.one.fingerprint() == pair.many.fingerprint()


def training_equals_that_of_one_process() -> None:
    """Forward and backward passes for real. All ranks have one batch: the mean of equal gradients is exact."""
    for shard in [way for way in layouts() if way in (fsdp, hsdp)]:
        pair = Pair.of(shard)
        generator = torch.Generator().manual_seed(0)
        for round in range(3):
            tokens = torch.randint(0, 130, (2, 10), generator=generator)
            for optimizer, model in ((pair.one, pair.plain), (pair.many, pair.sharded)):
                with optimizer.lookahead():
                    logits = model(tokens)
                    nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
                if model is pair.plain:
                    wanted = logits
            assert torch.equal(logits, wanted)
            pair.apply([pair.encode(round)])
            with torch.no_grad():
                assert torch.equal(pair.sharded(tokens), pair.plain(tokens))
            # Without a backward pass the root's parameters stay gathered, and would hide what is written next.
            pair.sharded.reshard()


def sites_of_every_layout_stay_one_model() -> None:
    """Members on different layouts, one a single process, apply the same updates; each process has its own data."""
    full, rank, half = values(1, Net()), dist.get_rank(), max(1, dist.get_world_size() // 2)
    ways, batches = [alone, *layouts()], {fsdp: rank, hsdp: rank, fsdp_tp: rank // half}
    models = [net(full, way) for way in ways]
    optimizers = [DisTrO(trained(model), lr=0.01, topk=8, slab_blocks=20) for model in models]
    tokens = torch.arange(40).view(4, 10)
    for round in range(3):
        blobs = []
        for member, (way, model, optimizer) in enumerate(zip(ways, models, optimizers, strict=True)):
            with optimizer.lookahead():
                logits = model((tokens * (member + 1) + batches.get(way, 0)) % 130)
                nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
            blobs.append(optimizer.encode(run=RUN, round=round, member=member))
        for optimizer in optimizers:
            optimizer.apply(blobs, lr=0.01)
        assert len({optimizer.fingerprint() for optimizer in optimizers}) == 1
    for way, model in zip(ways[1:], models[1:], strict=True):
        Pair(Shares.of_net(way), models[0], model, optimizers[0], optimizers[0]).same_weights()


def a_saved_state_goes_on() -> None:
    for shard, dtype in zip(layouts(), cycle([torch.float32, torch.bfloat16]), strict=False):
        pair = Pair.of(shard, dtype)
        for round in range(2):
            pair.give(round)
            pair.encode(round)
        file = io.BytesIO()
        torch.save(pair.many.state_dict(), file)
        file.seek(0)
        fresh = Pair.of(shard, dtype)
        fresh.many.load_state_dict(torch.load(file, weights_only=True))
        pair.many = fresh.many
        pair.sharded = fresh.sharded
        pair.apply([vote(pair.one.layout, 0, 1), pair.one.travelling[0]])
        pair.give(2)
        pair.encode(2)
        with pair.one.lookahead(), pair.many.lookahead():
            pair.same_weights()


def a_state_of_another_sharding_is_refused() -> None:
    states = [Pair.of(shard).many.state_dict() for shard in layouts()]
    pair = Pair.of(fsdp)
    for state in [pair.one.state_dict(), *states[1:2]]:
        with pytest.raises(ValueError, match="sharded alike"):
            pair.many.load_state_dict(state)
    pair.many.load_state_dict(states[0])


def faults_on_one_process_are_raised_on_all() -> None:
    for shard in layouts():
        pair = Pair.of(shard)
        pair.give(1)
        worst = dict(trained(pair.sharded))["tall"]
        assert worst.grad is not None
        if dist.get_rank() == 0:
            local(worst.grad)[0, 0] = float("nan")
        with pytest.raises(NonFiniteGradient):
            pair.many.encode(run=RUN, round=0, member=0)
        pair.give(1)
        blob = bytearray(pair.encode(0))
        tall = next(p for p in pair.one.layout.placements if p.name == "tall")
        start = 96 + tall.first * pair.one.layout.code.bytes
        blob[start : start + pair.one.layout.code.bytes] = b"\xff" * pair.one.layout.code.bytes
        with pytest.raises(MalformedUpdate):
            pair.many.apply([bytes(blob)])
        pair.same_weights()
