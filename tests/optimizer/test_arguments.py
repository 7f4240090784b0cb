"""What a user may get wrong is refused in words: what it was, where, and what to do."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from optimizer import DisTrO, MalformedUpdate
from optimizer.layout import LayoutError

Make = Callable[..., list[tuple[str, torch.nn.Parameter]]]


@pytest.mark.parametrize(
    ("argument", "value", "text"),
    [
        ("decay", "0.9", "decay is '0.9'; it must be a number"),
        ("decay", float("nan"), "decay is nan"),
        ("topk", 8.0, r"topk is 8\.0; it must be an int between 1 and 4096"),
        ("topk", True, "topk is True"),
        ("window", 1.5, r"window is 1\.5; it must be an int"),
        ("window", 9, "between 0 and 8, for a memory of 1 to 256 rounds"),
        ("slab_blocks", 0, "slab_blocks is 0; it must be None or an int of at least 1"),
        ("slab_blocks", 2.0, r"slab_blocks is 2\.0"),
        ("robust", "no", "robust is 'no'; it must be True or False"),
        ("clip_votes", 5, "clip_votes is 5"),
        ("weight_decay", -1.0, r"weight decay -1\.0 means -1\.0; it must be finite and not negative"),
    ],
)
def test_arguments_of_another_type_or_out_of_range(make: Make, argument: str, value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DisTrO(make(), lr=0.01, **{argument: value})


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ([{"lr": 0.1}], "a parameter group has no \"params\", only 'lr'"),
        ([{"params": [], "topk": 8}], "topk is the same for all parameter groups; pass it to DisTrO itself"),
        ([("a", 3)], "a is of type int; a parameter must be a tensor"),
        (torch.nn.LazyLinear(4).named_parameters(), "weight has no values yet; materialize and load the model"),
        ([("a", torch.nn.Parameter(torch.zeros(3, device="meta")))], "a has no values yet"),
        ([("a", torch.nn.Parameter(torch.zeros(0, 3)))], r"'a' has shape \(0, 3\); .* \(leave it out\)"),
    ],
)
def test_parameters_that_are_none(parameters: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DisTrO(parameters, lr=0.01)


def test_a_sparse_gradient_is_named() -> None:
    model = torch.nn.Embedding(100, 70, sparse=True)
    optimizer = DisTrO(model.named_parameters(), lr=0.01, topk=8)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(LayoutError, match="the gradient of weight is sparse; make its layer with sparse=False"):
        optimizer.encode()
    assert not optimizer.travelling


def test_a_run_is_32_bytes(make: Make) -> None:
    optimizer = DisTrO(make(), lr=0.01, topk=8)
    for run in ("r" * 32, bytearray(32), b"run"):
        with pytest.raises(ValueError, match=re.escape(f"identified by 32 bytes, not by {run!r:.20}")):
            optimizer.encode(run=run)  # type: ignore[arg-type]


def test_weight_decay_is_a_number_of_32_bits_wherever_it_is_set(make: Make) -> None:
    """Members must take off the same share, whether it comes from the constructor or from a group."""
    prints = set()
    for first, then in ((0.1, 0.1), (0.0, 0.1), (0.0, float(np.float32(0.1)))):
        optimizer = DisTrO(make(), lr=0.7, topk=8, weight_decay=first)
        optimizer.param_groups[0]["weight_decay"] = then
        optimizer.step()
        prints.add(optimizer.fingerprint())
    assert len(prints) == 1


def test_the_update_at_fault_is_counted(make: Make) -> None:
    """Of many updates one is broken: in its header, in a block, or by being of another round."""
    members = [DisTrO(make(), lr=0.01, topk=9) for _ in range(4)]
    good = [member.encode(member=number) for number, member in enumerate(members)]
    late = DisTrO(make(), lr=0.01, topk=9).encode(round=1, member=2)
    for bad, text in (
        (good[2][:-1], "update 2: it has"),
        (b"x" + good[2][1:], "update 2: it begins with"),
        (good[2][:-1] + b"\xff", r"update 2: block \d+: the bits after the signs"),
        (good[2][:96] + bytes(len(good[2]) - 96), "update 2: block 0: its bitmap"),
        (late, "update 2 is of round 1 of run"),
    ):
        for engine in ("torch", "auto"):
            before = (receiver := DisTrO(make(), lr=0.01, topk=9, engine=engine)).fingerprint()
            with pytest.raises(MalformedUpdate, match=f"malformed update: {text}"):
                receiver.apply([*good[:2], bad, good[3]])
            assert receiver.fingerprint() == before


def test_updates_come_in_anything_that_lists_them(make: Make) -> None:
    blobs = [DisTrO(make(), lr=0.01, topk=9).encode(member=number) for number in range(3)]
    prints = set()
    for given in (blobs, tuple(blobs), iter(blobs), map(memoryview, blobs), set(blobs), map(bytearray, blobs)):
        receiver = DisTrO(make(), lr=0.01, topk=9)
        receiver.apply(given)
        prints.add(receiver.fingerprint())
    assert len(prints) == 1
