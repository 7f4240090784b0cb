"""How many times less travels than in dense training: of updates, as it is at any moment, and of a whole run."""

from __future__ import annotations

from psyche_node.sim.result import RunResult


def dense_allreduce_bytes(parameters: int, members: int) -> int:
    """Bytes that each of ``members`` nodes sends when a gradient of fp32 values is averaged by a ring all-reduce.

    A reduce-scatter and an all-gather move (n - 1) / n of the gradient each (Patarasuk and Yuan 2009), which is the
    least any all-reduce can send.
    """
    return 2 * (members - 1) * 4 * parameters // members if members > 0 else 0


def update_reduction(parameters: int, update_bytes: int, members: int) -> float | None:
    """A node's part of a dense all-reduce over its update to every other node; None where there is no other.

    Unlike what was sent so far, it does not depend on how much of a round is over.
    """
    sent = (members - 1) * update_bytes
    return dense_allreduce_bytes(parameters, members) / sent if sent > 0 else None


def reduction(result: RunResult) -> float | None:
    """Of all that was sent, where the run is finished. Nodes that were stopped have counted a part of it only: what
    compares there are updates, as while they trained."""
    if result.outcome == "finished":
        return result.reduction
    return update_reduction(result.parameters, result.update_bytes, len(result.members))
