"""Whether this machine's devices and kernels make the same bits as the definition: `python -m optimizer`.

Every check compares something with the plain torch path on one CPU thread, in slabs of another size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from optimizer import native
from optimizer.codec import encode_blocks
from optimizer.distro import DisTrO
from optimizer.layout import BLOCK, BlockCode
from optimizer.transform import MOST_VOTES, OPERANDS, butterflies, invert_votes, largest_votes

_SHAPES = [("ragged", (130, 200)), ("square", (128, 128)), ("long", (9000,)), ("bias", (70,)), ("norm", (300,))]
_ROUNDS, _MEMBERS, _TOPK = 6, 3, 24
_RUN = bytes(range(32))


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. `good`: None where it could not be made; `detail` says what was compared, or why not."""

    name: str
    good: bool | None
    detail: str


def checks() -> Iterator[Check]:
    """All checks that this machine allows, one after the other."""
    devices = [torch.device("cpu"), *(torch.device("cuda", number) for number in range(torch.cuda.device_count()))]
    for device in devices:
        yield from _exactness(device)
    definition = _story("torch", torch.device("cpu"), threads=1, slab_blocks=3)
    if native.available():
        for isa in native.isas():
            yield _exact_kernels(isa)
            yield _same(f"compiled kernels, {isa}", definition, _story(isa, torch.device("cpu"), 1, 256))
        yield _same("compiled kernels, all threads", definition, _story("compiled", torch.device("cpu"), _threads(), 2))
    else:
        yield Check("compiled kernels", None, f"not available: {native.reason()}")
    for device in devices:
        yield _same(f"torch on {device}", definition, _story("torch", device, _threads(), 256))
    for device in devices[1:]:
        yield _triton(device, definition)
    if len(devices) == 1:
        yield Check("torch and Triton on cuda", None, "PyTorch sees no CUDA device")


def _triton(device: torch.device, definition: tuple[list[bytes], int]) -> Check:
    """Whether the kernels in Triton can be used, and make the bits of the definition on a CPU."""
    name = f"triton on {device}"
    try:
        from optimizer.triton_engine import trouble
    except ImportError as error:
        return Check(name, None, f"Triton cannot be imported: {error}")
    if found := trouble(device, topk=_TOPK):
        return Check(name, False, found)
    return _same(name, definition, _story("triton", device, _threads(), 256))


def _exactness(device: torch.device) -> Iterator[Check]:
    """Every path of the inverse of votes at its bound, against 64-bit integers; the bound PyTorch's setting admits."""
    for path in OPERANDS:
        bound = min(largest_votes(path), largest_votes("fp32"))
        votes = torch.from_numpy(np.random.default_rng(bound).integers(-bound, bound + 1, (8, 4096))).float()
        votes[0] = bound
        wanted = butterflies(votes.long())
        try:
            found = invert_votes(votes.to(device), bound, path).cpu().long()
        except RuntimeError as error:
            yield Check(f"{path} on {device}", None, f"not offered by this device: {str(error).splitlines()[0][:80]}")
            continue
        yield Check(f"{path} on {device}", torch.equal(found, wanted), f"H V H exact for votes up to {bound}")


def _exact_kernels(isa: str) -> Check:
    """The inverse of votes by the kernels, in both integer widths that they count in, against 64-bit integers."""
    code, signs = BlockCode(BLOCK), np.random.default_rng(0).random((8, BLOCK)) < 0.5
    signs[0] = False
    body = encode_blocks(np.tile(np.arange(BLOCK, dtype=np.uint16), (8, 1)), signs, code)
    wanted = butterflies(torch.from_numpy(np.where(signs, -1, 1)))
    found, good = np.empty(signs.shape, np.int32), True
    for members in (7, 8, MOST_VOTES):
        native.kernels(isa).inverse([body] * members, code, 0, found)
        good &= bool((torch.from_numpy(found) == members * wanted).all())
    return Check(f"votes by kernels, {isa}", good, f"H V H exact for votes up to {MOST_VOTES}")


def _same(name: str, wanted: tuple[list[bytes], int], found: tuple[list[bytes], int]) -> Check:
    alike = sum(a == b for a, b in zip(wanted[0], found[0], strict=True))
    detail = f"{alike} of {len(found[0])} updates equal, fingerprint {found[1]:016x}"
    return Check(name, wanted == found, detail)


def _story(engine: str, device: torch.device, threads: int, slab_blocks: int) -> tuple[list[bytes], int]:
    """All updates of a short run of several members, one of whose updates is left out, and the last fingerprint."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _play(engine, device, slab_blocks)
    finally:
        torch.set_num_threads(before)


def _play(engine: str, device: torch.device, slab_blocks: int) -> tuple[list[bytes], int]:
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=generator) for name, shape in _SHAPES}
    replicas = [
        {name: torch.nn.Parameter(value.to(device, copy=True)) for name, value in start.items()}
        for _ in range(_MEMBERS)
    ]
    settings: dict[str, Any] = {"topk": _TOPK, "weight_decay": 0.1, "slab_blocks": slab_blocks, "engine": engine}
    members = [DisTrO(replica.items(), lr=0.01, **settings) for replica in replicas]
    updates: list[bytes] = []
    for round in range(_ROUNDS):
        blobs = []
        for number, (member, replica) in enumerate(zip(members, replicas, strict=True)):
            with member.lookahead():
                for parameter in replica.values():
                    noise = torch.randn(parameter.shape, generator=generator).to(device)
                    parameter.grad = parameter.detach() + noise
            blobs.append(member.encode(run=_RUN, round=round, member=number))
        counted = blobs[1:] if round == 2 else blobs
        for member, blob in zip(members, blobs, strict=True):
            member.apply(counted)
            if blob not in counted:
                member.restore(blob)
        updates += blobs
    prints = {member.fingerprint() for member in members}
    return updates, prints.pop() if len(prints) == 1 else -1


def _threads() -> int:
    return max(2, torch.get_num_threads())
