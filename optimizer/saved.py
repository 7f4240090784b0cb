"""The form in which an optimizer's state is saved, and whether a saved one fits."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer.codec import Header, check_blocks, encode_header
from optimizer.engine import Sent
from optimizer.layout import Layout
from optimizer.rates import rate


def saved_updates(sent: Mapping[int, Sent]) -> dict[int, dict[str, Any]]:
    """Own updates without a known fate, by round, as a state holds them: they share memory with `sent`."""
    return {
        round: {
            "run": one.header.run,
            "member": one.header.member,
            "body": torch.from_numpy(one.body),
            "scale": one.scale,
            "factor": one.factor,
        }
        for round, one in sent.items()
    }


def loaded_updates(saved: Mapping[int, Mapping[str, Any]], device: torch.device) -> dict[int, Sent]:
    """Copies of what `saved_updates` made."""
    return {
        int(round): Sent(
            Header(bytes(one["run"]), int(round), int(one["member"])),
            one["body"].cpu().numpy().copy(),
            one["scale"].to(device, copy=True),
            float(one["factor"]),
        )
        for round, one in saved.items()
    }


def misfit(state: Mapping[str, Any], own: Mapping[str, Any], layout: Layout) -> str | None:
    """Why a saved state cannot be taken over by an optimizer whose state is `own`; None if it can."""
    return next(_misfits(state, own, layout), None)


def _misfits(state: Mapping[str, Any], own: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """What is wrong with it. Each check counts on those before it, so only the first finding is to be asked for."""
    if not isinstance(state, Mapping):
        yield f"a saved state is a dict, as of state_dict(), not {type(state).__name__}"
    for key, value in own.items():
        if key not in state:
            yield f"the saved state has no {key!r}: it is not one of this optimizer, or of an earlier version"
        if not isinstance(state[key], type(value)):
            yield f"{key!r} of the saved state is of type {type(state[key]).__name__}, not {type(value).__name__}"
    if state["layout"] != own["layout"]:
        yield (
            f"the saved state is of layout {state['layout'][:16]}…, this optimizer's is {own['layout'][:16]}…: model "
            "or topk differ; start from the same configuration"
        )
    if not torch.equal(state["blocks"].cpu(), own["blocks"]):
        yield (
            f"the saved state is of {len(state['blocks'])} blocks, this process works on {len(own['blocks'])} or on "
            "others: start as many processes, sharded alike, as saved it"
        )
    if state["masters"].keys() != own["masters"].keys():
        yield "the saved state has fp32 masters of other parameters: give these the types that they had"
    pairs = [(name, state["masters"][name], master) for name, master in own["masters"].items()]
    for name, saved, mine in [*pairs, *((key, state[key], own[key]) for key in ("momentum", "trend"))]:
        if not _alike(saved, mine.dtype, mine.shape):
            yield (
                f"{name!r} of the saved state is not {mine.dtype} of shape {tuple(mine.shape)}: load it as it was "
                "saved, and start as many processes, sharded alike"
            )
    if state["next"] < 0:
        yield f"the next round of the saved state is {state['next']}: it was changed"
    yield from _misfits_of_groups(state["param_groups"], own["param_groups"])
    for round, one in state["sent"].items():
        try:
            _require_update(round, one, own["blocks"].numpy(), layout)
        except (TypeError, KeyError, ValueError) as error:
            yield f"the update of round {round} in the saved state is broken ({error}): it was changed"


def _misfits_of_groups(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if len(saved) != len(own):
        yield f"the saved state has {len(saved)} parameter groups, not {len(own)}"
    for number, (theirs, mine) in enumerate(zip(saved, own, strict=True)):
        if not isinstance(theirs, Mapping) or theirs.get("param_names") != mine["param_names"]:
            yield f"parameter group {number} of the saved state has other parameters: group them as they were"
        try:
            rate(float(theirs["lr"]))
            rate(float(theirs["weight_decay"]), "weight decay")
        except (TypeError, KeyError, ValueError) as error:
            yield f"parameter group {number} of the saved state is broken ({error}): it was changed"


def _require_update(round: int, one: Mapping[str, Any], blocks: NDArray[np.int64], layout: Layout) -> None:
    """Raise TypeError, KeyError or ValueError unless `saved_updates` could have made it."""
    encode_header(Header(one["run"], round, one["member"]), layout)
    float(one["factor"])
    if not _alike(one["scale"], torch.float32, (len(blocks),)):
        raise ValueError(f"its scale is not torch.float32 of shape ({len(blocks)},)")
    if not _alike(one["body"], torch.uint8, (len(blocks), layout.code.bytes)):
        raise ValueError(f"its body is not torch.uint8 of shape ({len(blocks)}, {layout.code.bytes})")
    check_blocks(one["body"].cpu().numpy(), layout.code, blocks)


def _alike(saved: object, dtype: torch.dtype, shape: Sequence[int]) -> bool:
    return isinstance(saved, Tensor) and saved.dtype == dtype and tuple(saved.shape) == tuple(shape)
