"""Copies and saved states: a copy goes on like the original, and what is no state of ours is refused in words."""

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from optimizer import DisTrO
from optimizer.errors import OptimizerError

Pair = tuple[torch.nn.Module, DisTrO]


def pair(dtype: torch.dtype = torch.float32, **settings: Any) -> Pair:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(70, 130), torch.nn.LayerNorm(130)).to(dtype)
    matrices, vectors = (
        [(n, p) for n, p in model.named_parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "lr": 0.02}]
    return model, DisTrO(groups, lr=0.01, topk=16, **settings)


def gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def play(pair: Pair, rounds: range) -> tuple[list[bytes], int]:
    """Every update is applied one round late; one is always travelling."""
    model, optimizer = pair
    updates = []
    for round in rounds:
        with optimizer.lookahead():
            gradients(model, round)
        updates.append(optimizer.encode(round=round))
        if round - 1 in optimizer.travelling:
            optimizer.apply([optimizer.travelling[round - 1]])
    return updates, optimizer.fingerprint()


def pickled(pair: Pair) -> Pair:
    return pickle.loads(pickle.dumps(pair))


def saved(pair: Pair) -> Pair:
    """By torch's own files, read without running code."""
    file = io.BytesIO()
    torch.save([one.state_dict() for one in pair], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    made = globals()["pair"](next(pair[0].parameters()).dtype)
    for one, state in zip(made, states, strict=True):
        one.load_state_dict(state)
    return made


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_goes_on_like_the_original(copied: Callable[[Pair], Pair], dtype: torch.dtype) -> None:
    original = pair(dtype)
    play(original, range(3))
    original[1].set_lr([0.005, 0.01])
    other = copied(original)
    assert other[1].travelling.keys() == {2}
    assert {id(p) for group in other[1].param_groups for p in group["params"]} == {id(p) for p in other[0].parameters()}
    assert play(other, range(3, 6)) == play(original, range(3, 6)), "and neither touches the other"


def test_a_copy_keeps_settings_and_refuses_to_be_made_inside_lookahead() -> None:
    model, optimizer = pair(window=0, clip_votes=False, robust=True, engine="torch", slab_blocks=3)
    model[0].weight.requires_grad_(False)  # frozen later on: it stays in the layout
    optimizer.decay = 0.5
    other = copy.deepcopy(optimizer)
    assert (other.layout, other.decay, repr(other)) == (optimizer.layout, 0.5, repr(optimizer))
    assert play((model, optimizer), range(2))[0]
    with optimizer.lookahead(), pytest.raises(OptimizerError, match="cannot be copied inside lookahead"):
        copy.deepcopy(optimizer)


def changed(state: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**state, **changes}


def in_update(state: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return changed(state, sent={1: {**state["sent"][1], **changes}})


def in_group(state: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    first, *others = state["param_groups"]
    return changed(state, param_groups=[{**first, **changes}, *others])


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (lambda state: 3, "a saved state is a dict"),
        (lambda state: changed(state, layout=None), "'layout' of the saved state is of type NoneType, not str"),
        (lambda state: changed(state, blocks=[0, 1]), "'blocks' of the saved state is of type list"),
        (lambda state: changed(state, momentum=state["momentum"].half()), r"'momentum' .* is not torch\.float32"),
        (lambda state: changed(state, trend=state["trend"].float()), r"'trend' .* is not torch\.int16"),
        (lambda state: changed(state, masters={**state["masters"], "0.bias": 1}), "'0.bias' .* is not torch.float32"),
        (lambda state: changed(state, next=-1), "the next round of the saved state is -1"),
        (lambda state: changed(state, param_groups=state["param_groups"][::-1]), "group 0 .* has other parameters"),
        (lambda state: in_group(state, lr=-1.0), r"group 0 .*learning rate -1\.0"),
        (lambda state: in_group(state, weight_decay="much"), "group 0 .* is broken"),
        (lambda state: changed(state, sent={1: {}}), "update of round 1 .* is broken"),
        (lambda state: in_update(state, run=b""), "update of round 1 .* identified by 32 bytes"),
        (lambda state: in_update(state, scale=torch.zeros(1)), "update of round 1 .*its scale is not"),
        (lambda state: in_update(state, body=torch.zeros(3, 3)), "update of round 1 .*its body is not"),
        (lambda state: in_update(state, body=state["sent"][1]["body"] | 255), "update of round 1 .* bitmap"),
    ],
)
def test_a_state_that_was_changed_is_refused_whole(broken: Callable[[dict[str, Any]], Any], text: str) -> None:
    giver, (model, receiver) = pair(torch.bfloat16), pair(torch.bfloat16)
    play(giver, range(2))
    before = play(copy.deepcopy((model, receiver)), range(3))
    with pytest.raises(ValueError, match=text):
        receiver.load_state_dict(broken(giver[1].state_dict()))
    assert play(copy.deepcopy((model, receiver)), range(3)) == before
    receiver.load_state_dict(in_group(giver[1].state_dict(), params=[0, 1]))
    assert isinstance(receiver.param_groups[0]["params"][0], torch.nn.Parameter), "numbers, as torch saves them"
