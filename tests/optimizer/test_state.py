"""What the optimizer keeps, puts back and refuses: the fates of its updates, its parameters, its state."""

import copy
import struct

import numpy as np
import pytest
import torch
from drawn import RUN, Make, Named, bits, give_gradients, updates

from optimizer import DisTrO, Update, compiled, decode, encode
from optimizer.codec import Header
from optimizer.errors import NonFiniteGradient, OptimizerError, UnknownRound


def momentum_after(make: Make, fate: str, when: str) -> torch.Tensor:
    """Momentum after rounds 0 and 1; `early`: the fate of round 0's update is known before round 1 is encoded."""
    named = make()
    optimizer = DisTrO(named, lr=0.01, decay=0.9, topk=32)
    blobs: list[bytes] = []
    for round in (0, 1):
        give_gradients(named, round)
        blobs.append(optimizer.encode(run=RUN, round=round, member=0))
        if (round == 0) == (when == "early") and fate != "kept":
            optimizer.restore(blobs[0]) if fate == "restored" else optimizer.apply([blobs[0]])
    return optimizer.state_dict()["momentum"].clone()


def test_restore_puts_back_what_was_taken_out(make: Make) -> None:
    """To apply changes nothing about the own momentum; to restore late is to add what decay has left."""
    applied = [momentum_after(make, "applied", when) for when in ("early", "late")]
    kept = momentum_after(make, "kept", "late")
    assert torch.equal(applied[0], kept)
    assert torch.equal(applied[1], kept)
    named = make()
    optimizer = DisTrO(named, lr=0.01, decay=0.9, topk=32)
    give_gradients(named, 0)
    blob = optimizer.encode(run=RUN, round=0, member=0)
    without = optimizer.state_dict()["momentum"].clone()
    optimizer.restore(blob)
    whole = optimizer.state_dict()["momentum"]
    assert ((whole - without != 0).sum(dim=1) == 32).all()
    late = momentum_after(make, "restored", "late")
    assert torch.allclose(late - kept, 0.9 * (whole - without), atol=1e-7)
    early = momentum_after(make, "restored", "early")
    assert not torch.equal(early, late), "put back early, it competes for a place in the next update"


def test_fates_are_decided_once(make: Make) -> None:
    named = make()
    optimizer = DisTrO(named, lr=0.01)
    give_gradients(named, 0)
    blob = optimizer.encode(run=RUN, round=7, member=0)
    assert optimizer.travelling == {7: blob}
    with pytest.raises(OptimizerError, match="round 7 was encoded already"):
        optimizer.encode(run=RUN, round=7, member=0)
    strangers = encode(Update(RUN, 7, 1, *_votes(blob, optimizer)), optimizer.layout)
    with pytest.raises(UnknownRound, match=r"round 7 by member 1 is kept \(rounds kept: 7\)"):
        optimizer.restore(strangers)
    optimizer.apply([strangers])
    assert list(optimizer.travelling) == [7], "the update of another member decides nothing"
    votes = _votes(blob, optimizer)
    forged = encode(Update(RUN, 7, 0, votes[0], ~votes[1]), optimizer.layout)
    optimizer.apply([forged])
    assert optimizer.travelling == {7: blob}, "other bytes under the same round and member decide nothing either"
    with pytest.raises(UnknownRound):
        optimizer.restore(forged)
    optimizer.apply([blob])
    with pytest.raises(UnknownRound, match="kept: none"):
        optimizer.restore(blob)


def test_a_header_names_an_update_to_restore(make: Make) -> None:
    """Who keeps no copy of its update restores the same."""
    after = []
    for by_header in (False, True):
        named = make()
        optimizer = DisTrO(named, lr=0.01, topk=32)
        give_gradients(named, 0)
        blob, header = optimizer.encode(run=RUN, round=7, member=2), Header(RUN, 7, 2)
        for other in (Header(RUN, 7, 1), Header(RUN, 6, 2), Header(bytes(32), 7, 2)):
            with pytest.raises(UnknownRound):
                optimizer.restore(other)
        optimizer.restore(header if by_header else blob)
        with pytest.raises(UnknownRound, match="kept: none"):
            optimizer.restore(header)
        after.append(optimizer.state_dict()["momentum"])
    assert torch.equal(*after)


def _votes(blob: bytes, optimizer: DisTrO) -> tuple[np.ndarray, np.ndarray]:
    update = decode(blob, optimizer.layout)
    return update.indices, update.signs


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e35])
def test_a_gradient_that_is_not_finite_changes_nothing(make: Make, bad: float) -> None:
    named = make()
    optimizer = DisTrO(named, lr=0.01)
    give_gradients(named, 0)
    optimizer.encode(run=RUN, round=0, member=0)
    before = optimizer.state_dict()["momentum"].clone()
    give_gradients(named, 1)
    dict(named)["long"].grad[4999] = bad
    with pytest.raises(NonFiniteGradient, match="gradient of long"):
        optimizer.encode(run=RUN, round=1, member=0)
    assert torch.equal(optimizer.state_dict()["momentum"], before)
    give_gradients(named, 1)
    optimizer.encode(run=RUN, round=1, member=0)


def test_blocks_without_gradient_cancel_out(make: Make) -> None:
    named = make()
    optimizer = DisTrO(named, lr=0.01, topk=8)
    blobs = [optimizer.encode(run=RUN, round=r, member=m) for r, m in ((0, 0), (1, 1))]
    signs = [decode(blob, optimizer.layout).signs for blob in blobs]
    assert np.array_equal(signs[0], signs[1])
    other = decode(optimizer.encode(run=RUN, round=2, member=1), optimizer.layout)
    assert np.array_equal(other.signs, ~signs[0])


def test_tied_and_frozen_parameters(make: Make) -> None:
    named = make()
    named[1][1].requires_grad_(False)
    optimizer = DisTrO([*named, ("again", named[0][1])], lr=0.01)
    assert {name for name, _ in optimizer.shapes} == {name for name, _ in named} - {"square"}
    assert optimizer.layout.numel == sum(p.numel() for _, p in named) - named[1][1].numel()


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ([], "no parameter requires a gradient"),
        ([("a", torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)))], "a is torch.float64"),
        ([("a", torch.nn.Parameter(torch.zeros(3, 4).t()))], "a is not contiguous"),
        (
            [("a", torch.nn.Parameter(torch.zeros(3))), ("a", torch.nn.Parameter(torch.zeros(3)))],
            "two different parameters are called a",
        ),
    ],
)
def test_parameters_that_cannot_be_trained_are_named(named: Named, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DisTrO(named, lr=0.01)


def test_low_precision_parameters_have_fp32_masters(make: Make) -> None:
    """Steps far below the resolution of bf16 add up, and replicas in bf16 and fp32 hold the same weights."""
    coarse, fine = (
        make(dtype=torch.bfloat16),
        [(n, torch.nn.Parameter(p.detach().bfloat16().float())) for n, p in make()],
    )
    a, b = DisTrO(coarse, lr=1e-4, topk=8), DisTrO(fine, lr=1e-4, topk=8)
    for round in range(20):
        blobs = updates(a, 3, round)
        a.apply(blobs, lr=1e-4)
        b.apply(blobs, lr=1e-4)
    assert a.fingerprint() == b.fingerprint()
    for (_, x), (_, y) in zip(coarse, fine, strict=True):
        assert torch.equal(x, y.bfloat16())
    assert bits(coarse) != bits(make(dtype=torch.bfloat16))


def test_fingerprint_notices_one_bit_and_sums_by_definition(make: Make) -> None:
    named = make()
    optimizer = DisTrO(named, lr=0.01)
    first = optimizer.fingerprint()
    assert 0 <= first < 1 << 64
    weights = dict(named)["ragged"].detach().view(torch.int32)
    for bit in (0, 13, 31):
        weights[69, 129] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
        assert optimizer.fingerprint() != first
        weights[69, 129] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert optimizer.fingerprint() == first

    one = torch.nn.Parameter(torch.tensor([[1.5, -2.0]]))
    optimizer = DisTrO([("w", one)], lr=0.01)
    mask, state, drawn = (1 << 64) - 1, int.from_bytes(optimizer.layout.digest[:8], "little"), []
    for _ in range(4097):  # SplitMix64 as published
        state = (state + 0x9E3779B97F4A7C15) & mask
        x = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        drawn.append((x ^ (x >> 31)) | 1)
    words = struct.unpack("<2I", struct.pack("<2f", 1.5, -2.0))
    assert optimizer.fingerprint() == (words[0] * drawn[0] + words[1] * drawn[1]) * drawn[4096] & mask


def test_state_survives_a_restart_to_the_same_bytes(make: Make) -> None:
    def play(optimizer: DisTrO, named: Named, rounds: range) -> bytes:
        blob = b""
        for round in rounds:
            give_gradients(named, round)
            blob = optimizer.encode(run=RUN, round=round, member=1)
            if round:
                before = optimizer.travelling[round - 1]
                optimizer.restore(before) if round == 2 else optimizer.apply([before])
        return blob

    for dtype in (torch.float32, torch.bfloat16):
        named = make(dtype=dtype)
        optimizer = DisTrO(named, lr=0.01, topk=16)
        play(optimizer, named, range(3))
        optimizer.apply(updates(optimizer, 2), lr=0.01)
        saved = copy.deepcopy(optimizer.state_dict())
        fresh = [(n, torch.nn.Parameter(p.detach().clone())) for n, p in named]
        again = DisTrO(fresh, lr=0.5, topk=16)
        again.load_state_dict(saved)
        assert again.fingerprint() == optimizer.fingerprint()
        assert play(optimizer, named, range(3, 5)) == play(again, fresh, range(3, 5))
    with pytest.raises(ValueError, match="model or topk differ"):
        DisTrO(make(), lr=0.01, topk=17).load_state_dict(saved)


def test_a_state_that_does_not_fit_changes_nothing(make: Make) -> None:
    named = make()
    optimizer = DisTrO(named, lr=0.01, topk=16)
    optimizer.apply(updates(optimizer, 2))
    good = copy.deepcopy(optimizer.state_dict())
    receiver = DisTrO(make(), lr=0.01, topk=16)
    before = copy.deepcopy(receiver.state_dict())
    for change, text in (
        ({key: value for key, value in good.items() if key != "trend"}, "has no 'trend'"),
        (good | {"momentum": good["momentum"][1:]}, "start as many processes, sharded alike"),
        (good | {"blocks": good["blocks"] + 1}, "start as many processes, sharded alike"),
        (good | {"param_groups": good["param_groups"] * 2}, "has 2 parameter groups, not 1"),
        (good | {"masters": {"square": torch.zeros(64, 128)}}, "fp32 masters of other parameters"),
    ):
        with pytest.raises(ValueError, match=text):
            receiver.load_state_dict(change)
        after = receiver.state_dict()
        assert torch.equal(after["trend"], before["trend"])
        assert torch.equal(after["momentum"], before["momentum"])
    receiver.load_state_dict(good)
    assert torch.equal(receiver.state_dict()["trend"], good["trend"])


@pytest.mark.parametrize("convert", ["bfloat16", "channels_last", "resized"])
def test_a_model_converted_afterwards_is_refused(convert: str) -> None:
    """Kernels write by address: what was fp32 and contiguous must still be."""
    model = torch.nn.Conv2d(8, 8, 3)
    optimizer = DisTrO(model.named_parameters(), lr=0.01, topk=8)
    blob = optimizer.encode()
    if convert == "bfloat16":
        model.bfloat16()
    elif convert == "channels_last":
        model.to(memory_format=torch.channels_last)
    else:
        model.weight.data = torch.zeros(4, 8, 3, 3)
    with pytest.raises(
        OptimizerError, match=r"weight was torch\.float32 .* convert the model before making the optimizer"
    ):
        optimizer.apply([blob])


def test_the_default_type_and_device_of_torch_do_not_matter(make: Make) -> None:
    blobs = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        named = make()
        give_gradients(named, 1)
        torch.set_default_dtype(dtype)
        torch.set_default_device("cpu" if dtype == torch.float32 else "meta")
        compiled._rehearsed.cache_clear()  # as in a process that makes its first optimizer
        try:
            optimizer = DisTrO(named, lr=0.01, topk=8)
            blobs.append(optimizer.encode())
            with optimizer.lookahead():
                optimizer.report()
            optimizer.apply([blobs[-1]])
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    assert blobs[0] == blobs[1] == blobs[2]


def test_flushed_subnormals_are_refused(make: Make) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        with pytest.raises(ValueError, match="subnormal numbers are flushed"):
            DisTrO(make(), lr=0.01)
    finally:
        torch.set_flush_denormal(False)


def test_gathering_of_low_precision_gradients(make: Make) -> None:
    coarse, fine = make(dtype=torch.bfloat16), make()
    a, b = DisTrO(coarse, lr=0.01), DisTrO(fine, lr=0.01)
    give_gradients(coarse, 3)
    for (_, x), (_, y) in zip(coarse, fine, strict=True):
        y.grad = x.grad.float()
    assert a.encode(run=RUN, round=0, member=0) == b.encode(run=RUN, round=0, member=0)
