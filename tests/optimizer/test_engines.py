"""Every engine makes the bits of the definition, whatever the shapes, slabs, threads and order; over rounds, too."""

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer import DisTrO, native
from optimizer.selfcheck import checks

RUN = bytes(range(32))
ROUNDS = int(os.environ.get("REPLICA_ROUNDS", "100"))  # `make nightly` has 500
Named = list[tuple[str, torch.nn.Parameter]]
SHAPE = st.one_of(
    st.just(()),
    st.tuples(st.integers(1, 9000)),
    st.tuples(st.integers(1, 140), st.integers(1, 140)),
    st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 70)),
)
compiled = pytest.mark.skipif(not native.available(), reason=f"the kernels are not built: {native.reason()}")


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Named:
    generator = torch.Generator().manual_seed(0)
    return [(f"t{i}", torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype))) for i, s in enumerate(shapes)]


def give_gradients(named: Named, seed: int, coarse: bool = False) -> None:
    """Seeded gradients; coarse ones tie. One tensor has none."""
    generator = torch.Generator().manual_seed(seed)
    for number, (_, p) in enumerate(named):
        gradient = torch.randn(p.shape, generator=generator)
        p.grad = (gradient.round() if coarse else gradient).to(p.dtype)
        if number == seed % (len(named) + 3):
            p.grad = None


def content(named: Named) -> list[bytes]:
    return [p.detach().float().numpy().tobytes() for _, p in named]


@compiled
@settings(max_examples=40, deadline=None)
@given(
    st.lists(SHAPE, min_size=1, max_size=5),
    st.sampled_from([1, 2, 3, 8, 32, 33, 128, 512]),
    st.integers(1, 20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0, 3, 8]),
    st.booleans(),
    st.booleans(),
)
def test_compiled_and_plain_make_the_same_bits(
    shapes: list[tuple[int, ...]],
    topk: int,
    slab: int,
    dtype: torch.dtype,
    window: int,
    clip: bool,
    coarse: bool,
) -> None:
    """Four rounds of two members: an update restored, one applied late, lookahead, weight decay, momentum, masters."""
    told = []
    for engine, slab_blocks, threads in (("torch", 256, 1), ("compiled", slab, 1), ("compiled", slab, 3)):
        torch.set_num_threads(threads)
        names = [parameters(shapes, dtype), parameters(shapes, dtype)]
        settings = {"topk": topk, "decay": 0.9, "weight_decay": 0.1, "window": window, "clip_votes": clip}
        members = [DisTrO(n, lr=0.01, slab_blocks=slab_blocks, engine=engine, **settings) for n in names]
        seen: list[object] = []
        blobs: list[list[bytes]] = []
        for round in range(4):
            blobs.append([])
            for number, (named, member) in enumerate(zip(names, members, strict=True)):
                with member.lookahead():
                    seen.append(content(named))
                    give_gradients(named, 2 * round + number, coarse)
                blobs[-1].append(member.encode(run=RUN, round=round, member=number))
            seen += blobs[-1]
            if round:
                for number, member in enumerate(members):
                    member.apply(blobs[round - 1][: 1 if round == 2 else 2], lr=0.01)
                    if round == 2 and number == 1:
                        member.restore(blobs[1][1])
        seen += [content(names[0]), members[0].fingerprint(), members[1].fingerprint()]
        seen += [member.state_dict()[key].numpy().tobytes() for member in members for key in ("momentum", "trend")]
        told.append(seen)
    torch.set_num_threads(1)
    assert told[0] == told[1] == told[2]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.randoms(), st.sampled_from(["torch", "auto"]), st.booleans())
def test_order_of_updates_does_not_matter(members: int, shuffler: random.Random, engine: str, clip: bool) -> None:
    results = set()
    blobs = []
    for member in range(members):
        named = parameters([(70, 130), (300,)])
        give_gradients(named, member)
        blobs.append(DisTrO(named, lr=0.01, topk=16).encode(run=RUN, round=3, member=member))
    for _ in range(3):
        shuffler.shuffle(blobs)
        fresh = parameters([(70, 130), (300,)])
        receiver = DisTrO(fresh, lr=0.01, topk=16, clip_votes=clip, engine=engine)
        receiver.apply(blobs)
        results.add((receiver.fingerprint(), *content(fresh)))
    assert len(results) == 1


def test_replicas_after_many_rounds_over_threads_engines_slabs_and_micro_batches() -> None:
    """Each member computes its own gradients in its own way; the weights must be equal, byte for byte."""
    ways = [
        {"engine": "torch", "slab_blocks": 4, "threads": 1, "micro": 6},
        {"engine": "auto", "slab_blocks": 256, "threads": 1, "micro": 12},
        {"engine": "auto", "slab_blocks": 2, "threads": 2, "micro": 2},
        {"engine": "auto", "slab_blocks": 3, "threads": 4, "micro": 3},
    ]
    replicas = [parameters([(66, 70), (70,)]) for _ in ways]
    members = [
        DisTrO(r, lr=0.01, topk=16, decay=0.99, slab_blocks=w["slab_blocks"], engine=w["engine"])
        for r, w in zip(replicas, ways, strict=True)
    ]
    generator = torch.Generator().manual_seed(1)
    start, travelling = content(replicas[0]), None
    for round in range(ROUNDS):
        lr, blobs = 0.01 * (1 - round / ROUNDS), []
        for number, (member, replica, way) in enumerate(zip(members, replicas, ways, strict=True)):
            torch.set_num_threads(way["threads"])
            member.set_lr(lr)
            x = torch.randn(12, 66, generator=generator)
            with member.lookahead():
                for part in x.split(way["micro"]):
                    ((part @ replica[0][1] + replica[1][1] - part.sum(1, keepdim=True)) ** 2).mean().backward()
            blobs.append(member.encode(run=RUN, round=round, member=number))
        if travelling is not None:
            included = [b for i, b in enumerate(travelling[0]) if (round + i) % 7]
            for number, (member, way) in enumerate(zip(members, ways, strict=True)):
                torch.set_num_threads(way["threads"])
                member.apply(included[number:] + included[:number], lr=travelling[1])
                if travelling[0][number] not in included:
                    member.restore(travelling[0][number])
        travelling = (blobs, lr)
    torch.set_num_threads(1)
    assert all(content(replica) == content(replicas[0]) for replica in replicas)
    assert len({member.fingerprint() for member in members}) == 1
    assert content(replicas[0]) != start


def test_the_self_check_passes_and_says_what_it_compared() -> None:
    made = list(checks())
    assert not [check for check in made if check.good is False]
    names = [check.name for check in made]
    assert {"fp32 on cpu", "int64 on cpu", "torch on cpu"} <= set(names)
    if native.available():
        assert {f"compiled kernels, {isa}" for isa in native.isas()} <= set(names)


def test_an_engine_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="no engine is called 'abacus' here; there are auto, torch, compiled"):
        DisTrO(parameters([(3,)]), lr=0.01, engine="abacus")


def test_without_kernels_the_plain_path_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "not built")
    named = parameters([(70, 66)])
    optimizer = DisTrO(named, lr=0.01, topk=8)
    give_gradients(named, 9)
    blob = optimizer.encode()
    optimizer.apply([blob])
    assert optimizer.report().seconds.keys() >= {"encode", "apply"}
    with pytest.raises(ValueError, match="compiled kernels cannot be used on cpu: not built"):
        DisTrO(named, lr=0.01, engine="compiled")
    monkeypatch.undo()
    again = parameters([(70, 66)])
    other = DisTrO(again, lr=0.01, topk=8)
    give_gradients(again, 9)
    assert other.encode() == blob
