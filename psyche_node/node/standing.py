"""How a wallet stands in a run: whether it can still join, whom the network is for, and why somebody is out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coordinator.state import Member, MemberStatus, Phase, Run
from psyche_node.network.messages import MemberEntry

LIVE = (MemberStatus.PENDING, MemberStatus.ACTIVE, MemberStatus.DESYNCED)
# A node that starts anew cannot catch up with a run that has trained (``check_in_time``).
LATER = "a node that starts anew takes part in the owner's next run, or in this one when it gets a new model"


class JoinRefused(Exception):
    """The run does not take this node; the message says why and what to do."""


class RunFinished(Exception):
    """There is nothing to join any more."""


class Dropped(Exception):
    """The run goes on without this node, and joining again has not helped; the message says why and what to do."""


class Ejected(Exception):
    """The owner has put this node out of the run; the message says what to do."""


class Left(Exception):
    """The wallet's owner has taken this node out of the run."""


def check_in_time(run: Run, model: Path) -> None:
    """Raise JoinRefused or RunFinished if a node that has the run's initial ``model`` cannot take part any more."""
    if run.phase is Phase.FINISHED:
        raise RunFinished(
            f"the run was finished after {run.final_rounds} rounds; there is nothing to join. Its last checkpoint has "
            f"the model root {run.checkpoint_root.hex()}"
        )
    sets = (run.inclusion_set(number) for number in range(run.model_round, run.final_rounds))
    trained = any(one is None or not one.void for one in sets)  # one that is not kept: who knows
    if trained or run.checkpoint_root != run.terms.model_root:
        raise JoinRefused(
            f"this node comes too late: the run is in round {run.round} ({run.phase.name}), its members have trained "
            f"the model in {model} since round {run.model_round}, and this version cannot catch up with them. Nothing "
            "is wrong with this node. Start it again before the first round of the owner's next run, or when the owner "
            "gives this run a new model (`psyche-admin run show` tells)"
        )


def admitted(table: Sequence[Member]) -> list[MemberEntry]:
    """The members that the network is for: the live ones, and those dropped, which go on following.

    The program keeps a node key for one member only while that one is live: later another wallet may join with it, and
    the key is that member's.
    """
    by_key = {m.node_key: m for m in table if m.status is MemberStatus.DROPPED}
    by_key |= {m.node_key: m for m in table if m.status in LIVE}
    members = sorted(by_key.values(), key=lambda m: m.slot)
    return [MemberEntry(slot=m.slot, node_key=m.node_key.hex(), wallet=str(m.wallet)) for m in members]


def why_dropped(mine: Member, before: MemberStatus | None, run: Run) -> str:
    """Return why the program has dropped ``mine``, which had the status ``before``, as far as its counters tell."""
    most = run.limits.max_missed
    if before is MemberStatus.PENDING:
        return "it was not ready when the warm-up ended"
    if mine.missed >= most:
        return f"it has missed {mine.missed} rounds in a row (is the device or the link too slow?)"
    if mine.excluded >= most:
        return (
            f"{mine.excluded} times in a row two thirds of the witnesses did not hold its update, or its own word as a "
            "witness was missing (can others reach its ports?)"
        )
    return "it was not ready when the warm-up ended"
