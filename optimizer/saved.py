"""The form in which an optimizer's state is saved, and whether a saved one fits."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from optimizer.codec import Header
from optimizer.engine import Sent
from optimizer.layout import Layout


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
    if missing := [key for key in own if key not in state]:
        return f"the saved state has no {missing[0]!r}: it is not one of this optimizer, or of an earlier version"
    if state["layout"] != own["layout"]:
        return (
            f"the saved state is of layout {state['layout'][:16]}…, this optimizer's is {own['layout'][:16]}…: model "
            "or topk differ; start from the same configuration"
        )
    blocks = len(own["blocks"])
    alike = np.array_equal(state["blocks"].cpu().numpy(), own["blocks"].numpy())
    alike &= all(state[key].shape == own[key].shape for key in ("momentum", "trend"))
    alike &= all(
        sent["body"].shape == (blocks, layout.code.bytes) and len(sent["scale"]) == blocks
        for sent in state["sent"].values()
    )
    masters, kept = ({name: m.shape for name, m in one["masters"].items()} for one in (state, own))
    if not alike or masters != kept:
        return (
            f"the saved state is of {len(state['blocks'])} blocks, this process works on {blocks} or on others: start "
            "as many processes, sharded alike, as saved it"
        )
    groups, needed = len(state["param_groups"]), len(own["param_groups"])
    return None if groups == needed else f"the saved state has {groups} parameter groups, not {needed}"
