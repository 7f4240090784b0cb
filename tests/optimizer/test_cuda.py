"""A replica on a CUDA device holds the bytes of one on the CPU, and makes the same updates of the same gradients.

Whatever precision its matrix units are set to.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from optimizer import DisTrO, Update, encode
from optimizer.transform import MOST_VOTES, invert_votes
from optimizer.votes import select

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")

Named = list[tuple[str, torch.nn.Parameter]]
Make = Callable[..., Named]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RUN = bytes(range(32))


@pytest.fixture(params=["highest", "medium"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """fp32 products in fp32, and in what the device's matrix units are allowed to make of them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=["torch", "triton"])
def engine(request: pytest.FixtureRequest) -> str:
    """What works on the CUDA device; on the CPU it is the fastest there is."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="this build of PyTorch came without Triton")
    return str(request.param)


def on(device: torch.device, engine: str) -> str:
    return engine if device.type == "cuda" else "auto"


def replica(make: Make, device: torch.device, dtype: torch.dtype = torch.float32) -> Named:
    return [(name, torch.nn.Parameter(p.detach().to(device))) for name, p in make(dtype=dtype)]


def content(named: Named) -> bytes:
    return b"".join(
        p.detach().cpu().reshape(-1).view(torch.int16 if p.element_size() == 2 else torch.int32).numpy().tobytes()
        for _, p in named
    )


def give_gradients(named: Named, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, p in named:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


@pytest.mark.parametrize("topk", [32, 128])
@pytest.mark.parametrize(("overlap", "lookahead"), [(True, True), (False, False)])
def test_replicas_are_equal_over_fifty_rounds(
    make: Make, topk: int, overlap: bool, lookahead: bool, precision: str, engine: str
) -> None:
    """One member on each device, each with gradients of its own; some rounds are void, some updates left out."""
    names = [replica(make, device) for device in (CPU, CUDA)]
    settings = {"topk": topk, "decay": 0.95, "weight_decay": 0.1, "lookahead": lookahead}
    members = [
        DisTrO(named, lr=0.01, engine=on(device, engine), **settings)
        for named, device in zip(names, (CPU, CUDA), strict=True)
    ]
    sent: dict[int, list[bytes]] = {}
    start = content(names[0])
    for round in range(50):
        sent[round] = []
        for number, (named, member) in enumerate(zip(names, members, strict=True)):
            with member.lookahead():
                give_gradients(named, 2 * round + number)
            sent[round].append(member.encode(run=RUN, round=round, member=number))
        due = round - 1 if overlap else round
        if due < 0:
            continue
        included = [] if due % 11 == 7 else [0] if due % 5 == 3 else [0, 1]
        for number, member in enumerate(members):
            blobs = [sent[due][i] for i in included]
            member.apply(blobs if number else blobs[::-1], lr=0.01 / (1 + due))
            if number not in included:
                member.restore(sent[due][number])
        assert content(names[0]) == content(names[1]), f"round {due}"
        assert members[0].fingerprint() == members[1].fingerprint(), f"round {due}"
    assert content(names[0]) != start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [True, False])
def test_many_votes_are_equal(make: Make, dtype: torch.dtype, clip: bool, precision: str, engine: str) -> None:
    """Votes beyond what a narrow format holds, in other slabs, and under autocast."""
    results = []
    for device, slab in ((CPU, 256), (CUDA, 256), (CUDA, 3)):
        named = replica(make, device, dtype)
        settings = {"topk": 32, "weight_decay": 0.1, "clip_votes": clip, "slab_blocks": slab}
        optimizer = DisTrO(named, lr=0.01, engine=on(device, engine), **settings)
        layout = optimizer.layout
        same = np.tile(np.arange(32, dtype=np.uint16) * 128, (layout.blocks, 1))
        signs = np.random.default_rng(0).random((300, layout.blocks, 32)) < 0.2
        blobs = [encode(Update(RUN, 0, member, same, signs[member]), layout) for member in range(300)]
        with torch.autocast(device.type, torch.bfloat16):
            optimizer.apply(blobs, lr=0.003)
        results.append((content(named), optimizer.fingerprint()))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("bound", [1, 256, MOST_VOTES])
def test_the_inverse_of_votes_is_exact(bound: int, precision: str) -> None:
    votes = torch.from_numpy(np.random.default_rng(bound).integers(-bound, bound + 1, (40, 4096))).float()
    votes[0] = bound
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(invert_votes(votes.to(CUDA), bound).cpu(), invert_votes(votes, bound))


def test_the_same_of_equal_values_are_selected() -> None:
    values = torch.randint(0, 6, (50, 4096), generator=torch.Generator().manual_seed(0)).float()
    for topk in (1, 32, 128, 4096):
        assert torch.equal(select(values.to(CUDA), topk).cpu(), select(values, topk))


@pytest.mark.parametrize("topk", [24, 32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_of_equal_gradients_are_equal(
    make: Make, topk: int, dtype: torch.dtype, precision: str, engine: str
) -> None:
    """Butterflies in one order and separate roundings: the sender's own arithmetic is the same on every device, too."""
    blobs: list[list[bytes]] = []
    for device in (CPU, CUDA):
        named = replica(make, device, dtype)
        optimizer = DisTrO(named, lr=0.003, decay=0.95, topk=topk, engine=on(device, engine))
        blobs.append([])
        for round in range(5):
            give_gradients(named, round)
            named[-1][1].grad = None  # a block without any gradient votes, too
            blobs[-1].append(optimizer.encode(run=RUN, round=round, member=1))
            if round == 2:
                optimizer.restore(blobs[-1][1])
    assert blobs[0] == blobs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lookahead_restores_every_bit(make: Make, dtype: torch.dtype, engine: str) -> None:
    named = replica(make, CUDA, dtype)
    optimizer = DisTrO(named, lr=0.01, topk=32, engine=engine)
    give_gradients(named, 1)
    optimizer.encode(run=RUN, round=0, member=0)
    before, fingerprint = content(named), optimizer.fingerprint()
    with optimizer.lookahead():
        assert all((p.detach().cpu() != q).any() for (_, p), (_, q) in zip(named, make(dtype=dtype), strict=True))
    assert (content(named), optimizer.fingerprint()) == (before, fingerprint)


def test_a_state_moves_between_devices(make: Make, engine: str) -> None:
    """A state saved on one device goes on, on the other, to the same updates."""
    named = replica(make, CUDA)
    optimizer = DisTrO(named, lr=0.003, decay=0.95, topk=32, engine=engine)
    give_gradients(named, 0)
    optimizer.encode(run=RUN, round=0, member=0)
    moved = replica(make, CPU)
    other = DisTrO(moved, lr=0.5, topk=32, decay=0.95)
    other.load_state_dict(optimizer.state_dict())
    blobs = []
    for weights, one in ((named, optimizer), (moved, other)):
        give_gradients(weights, 1)
        blobs.append(one.encode(run=RUN, round=1, member=0))
    assert blobs[0] == blobs[1]


def test_a_gpu_takes_more_blocks_at_once() -> None:
    """Each costs some sixty launches of kernels and an answer."""
    slabs = []
    for device in (CPU, CUDA):
        optimizer = DisTrO([("w", torch.nn.Parameter(torch.zeros(64 * 30, 64 * 20, device=device)))], lr=0.01)
        slabs.append(len(optimizer._geometry.slabs))
    assert slabs == [3, 1]


@pytest.mark.parametrize("topk", [1, 8, 24, 200, 4096])
def test_kernels_in_triton_pass_their_rehearsal(topk: int) -> None:
    pytest.importorskip("triton", reason="this build of PyTorch came without Triton")
    from optimizer.triton_engine import trouble

    assert trouble(torch.device("cuda", 0), topk) is None


def test_triton_takes_little_memory() -> None:
    """A model of 256 MB with as much momentum: below 100 MB beside them, copies of messages included."""
    pytest.importorskip("triton", reason="this build of PyTorch came without Triton")
    named = [("w", torch.nn.Parameter(torch.randn(8192, 8192, device=CUDA)))]
    optimizer = DisTrO(named, lr=0.01, topk=32, lookahead=False, engine="triton")
    for _ in range(2):
        named[0][1].grad = torch.ones_like(named[0][1])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.apply([optimizer.encode(run=RUN)])
        assert torch.cuda.max_memory_allocated() - before < 100 << 20
