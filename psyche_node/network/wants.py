"""A blob that this node wants, and from whom to take it next: the choice, and the reason that the log gives for it."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import trio

from psyche_node.network.blobs import PIECE_BYTES
from psyche_node.network.directory import Directory
from psyche_node.network.fanout import Tree
from psyche_node.network.holdings import Partial
from psyche_node.network.messages import Kind
from psyche_node.network.pieces import Plan
from psyche_node.network.quality import SLOW_SHARE, Quality

# After this long without a piece, on top of what two pieces usually take, another source is asked at the same time.
HEDGE_SECONDS = 2.0
# An update comes from one source, and from a second one when that is slow; other blobs come from several.
MAX_SOURCES = {Kind.UPDATE: 2, Kind.CHECKPOINT: 4, Kind.MODEL: 4}
# A step down the tree may take this long, before the next one up is asked without having said anything.
HOP_SECONDS = 0.5
MAX_BACKLOG_SECONDS = 15.0
# Downloads from one peer at a time, those counted that are at least as urgent.
MAX_DOWNLOADS_PER_PEER = {Kind.UPDATE: 3, Kind.CHECKPOINT: 1, Kind.MODEL: 1}


class Role(StrEnum):
    """Why a source may have the blob."""

    AUTHOR = "author"
    PARENT = "parent"
    HOLDER = "holder"
    ANCESTOR = "further up the tree"
    ANYBODY = "last resort"


class Running(Protocol):
    """A source being read."""

    @property
    def idle(self) -> float:
        """Seconds since the last piece; negative before it has started."""

    def slow(self, usual: float) -> bool:
        """Return whether a second source should be asked; ``usual`` is the bytes a second of a usual stream."""

    @property
    def rate(self) -> float:
        """Bytes a second so far."""

    @property
    def given_up(self) -> bool:
        """Whether it is ending because it is slow."""

    def cancel(self) -> None:
        """End it from outside."""

    def give_up(self, reason: str) -> None:
        """End it from outside, as a failure of the source."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A source and why it was chosen. ``held`` is one byte per piece for a partial holder; None is all."""

    source: bytes
    role: Role
    held: bytes | None = None


@dataclass(eq=False)
class Want:
    """One open want. On trio, but for ``lock`` and what it guards: ``asked``, ``partial`` and ``plan``."""

    round: int
    members: dict[int, Tree]
    """Who committed to it, in the order in which it was wanted, and each one's tree. Several if one copied a digest."""
    digest: bytes
    length: int
    kind: Kind
    opened: float
    offers: dict[bytes, bytes | None] = field(default_factory=dict)
    """Who says that it has the blob, and which pieces of it (one byte each); None is all of them."""
    invited: set[bytes] = field(default_factory=set)
    """Those of them who said it to this node because it is to take the blob from them."""
    retry_at: dict[bytes, float] = field(default_factory=dict)
    failures: dict[bytes, int] = field(default_factory=dict)
    empty: dict[bytes, int] = field(default_factory=dict)
    """How often in a row a source that has the blob, or receives it, had nothing to bring."""
    broken: set[bytes] = field(default_factory=set)
    """Sources that failed for another reason than that they do not have it, or are busy."""
    pushed_by: bytes | None = None
    """Who pushed it into the store, if that is how it came."""
    told: set[str] = field(default_factory=set)
    running: dict[bytes, Running] = field(default_factory=dict)
    news: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: bool = False
    """It is in the store, or nobody wants it any more: what there is of it is of no use."""
    passed_on: bool = False
    """Whether the children in the tree have been told that the first piece is here."""
    asked: bool = False
    """Whether a source has been asked for the first pieces, which can be done without a plan by one alone."""
    partial: Partial | None = None
    plan: Plan | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        return f"round {self.round}, member {', '.join(map(str, self.members))}, {self.digest.hex()[:16]}"

    @property
    def tree(self) -> Tree:
        """The tree in which this node waits for it; it may come by that of another member, too."""
        return next(iter(self.members.values()))

    @property
    def bytes_left(self) -> int:
        return self.length if self.plan is None else self.plan.left * PIECE_BYTES


class Chooser:
    """Chooses sources for wants from the member list, the offers, and what is known of each peer."""

    def __init__(self, directory: Directory, quality: Quality, busy: Callable[[bytes, Want], int]) -> None:
        """``busy`` says how many downloads from a peer are running that are at least as urgent as a want."""
        self._directory, self._quality, self._busy = directory, quality, busy

    def choose(self, want: Want, now: float, backlog: float) -> Choice | None:
        """Return the next source to ask for ``want``, or None while there is nobody to ask, or no need.

        ``backlog`` is the seconds that all open wants together should take. When as many run as may, it is one to take
        in the place of the slowest.
        """
        if not self._needs_more(want):
            return None
        full = self.full(want)
        # Beside a source that is slow, it is not this node's line that all wait for.
        patience = self.patience(want, 0.0 if want.running else backlog)
        for candidates in (
            self._holders(want),
            self._up_the_tree(want, now, patience),
            self._anybody(want, now, patience),
        ):
            free = [choice for choice in candidates if self._free(want, choice.source, now)]
            if full:
                # One that failed is no better. So each source gives up its place once at most.
                free = [choice for choice in free if not self._failed(want, choice.source)]
            if free:
                return min(free, key=lambda choice: self._cost(want, choice))
        return None

    @staticmethod
    def full(want: Want) -> bool:
        """Return whether as many sources are read as may be."""
        return len(want.running) >= MAX_SOURCES[want.kind]

    def patience(self, want: Want, backlog: float) -> float:
        """Return how many seconds to wait for the parent to say that it has something."""
        depth = len(want.tree.ancestors(self._directory.own_key))
        hop = (
            HOP_SECONDS + 4 * self._quality.usual_latency() + 2 * min(want.length, PIECE_BYTES) / self._quality.usual()
        )
        return depth * hop + min(backlog, MAX_BACKLOG_SECONDS)

    def impatient(self, want: Want, now: float, backlog: float) -> bool:
        """Return whether to ask around who has it: nobody said so in time, or who did does not deliver."""
        if want.kind is not Kind.UPDATE or want.failures or want.broken or self._directory.own_private():
            # A node behind NAT cannot be told, so it has to ask.
            return True
        if want.running:
            return self._all_slow(want)
        return now - want.opened >= self.patience(want, backlog)

    def parent(self, want: Want) -> list[bytes]:
        """Return from whom an update should come: one, or none when there is nobody to wait for."""
        return self._effective(want)[:1] if want.kind is Kind.UPDATE else []

    def next_at(self, want: Want, now: float) -> float:
        """Return when to look again, if nothing happens before."""
        due = min((at for at in want.retry_at.values() if at > now), default=now + 1.0)
        return min(max(due, now + 0.02), now + 1.0)

    def _needs_more(self, want: Want) -> bool:
        if not want.running:
            return True
        if self._all_slow(want):
            return not self.full(want) or not any(running.given_up for running in want.running.values())
        if self.full(want):
            return False
        # A source more, as long as there is something that nobody is bringing.
        return want.kind is not Kind.UPDATE and want.plan is not None and want.plan.untaken()

    def _all_slow(self, want: Want) -> bool:
        share = self._quality.share()
        return all(running.slow(share) for running in want.running.values())

    def _failed(self, want: Want, key: bytes) -> bool:
        return key in want.broken or self._quality.avoided(key)

    def _holders(self, want: Want) -> Iterable[Choice]:
        # Anybody can say that this node is to take it from there; whose part that is, the trees say.
        above = {key for tree in want.members.values() for key in tree.ancestors(self._directory.own_key)}
        parents = {*self.parent(want), *(want.invited & above)}
        root = want.tree.order[:1]
        for key, held in want.offers.items():
            # The author has enough to do with those that are to take it from there.
            if key not in root or key in parents or want.kind is not Kind.UPDATE:
                yield Choice(key, Role.PARENT if key in parents else Role.HOLDER, held)
        if root and (want.kind is not Kind.UPDATE or self.parent(want) == list(root)):
            yield Choice(root[0], Role.AUTHOR)

    def _up_the_tree(self, want: Want, now: float, patience: float) -> Iterable[Choice]:
        if want.kind is not Kind.UPDATE:
            return
        waited = now - want.opened
        for level, key in enumerate(self._effective(want)):
            # By steps, so that a slow branch does not fall on the author all at once.
            hurry = bool(want.running) and key != want.tree.order[0]
            if hurry or waited >= min(level + 1, 3) * patience:
                yield Choice(key, Role.ANCESTOR)

    def _anybody(self, want: Want, now: float, patience: float) -> Iterable[Choice]:
        if want.running or (self._effective(want) and now - want.opened < 4 * patience):
            return
        for key in want.tree.ancestors(self._directory.own_key):
            yield Choice(key, Role.ANYBODY)

    def _effective(self, want: Want) -> list[bytes]:
        """Return the ancestors that there is a point in waiting for, the nearest first."""
        return [
            key
            for key in self._directory.sources(want.tree.ancestors(self._directory.own_key))
            if not self._failed(want, key) and self._directory.reachable(key)
        ]

    def _free(self, want: Want, key: bytes, now: float) -> bool:
        return (
            bool(self._directory.sources([key]))
            and key not in want.running
            and want.retry_at.get(key, -math.inf) <= now
            and self._busy(key, want) < MAX_DOWNLOADS_PER_PEER[want.kind]
        )

    def _cost(self, want: Want, choice: Choice) -> tuple[bool, bool, float, float]:
        return (
            self._quality.avoided(choice.source),
            choice.role is not Role.PARENT and choice.role is not Role.AUTHOR and want.kind is Kind.UPDATE,
            # Coarsely, so that equals are chosen among by chance and share the work.
            round(self._quality.seconds_for(choice.source, min(want.length, 16 * PIECE_BYTES)), 1),
            random.random(),
        )


def is_slow(idle: float, elapsed: float, arrived: int, left: int, usual: float, piece: int = PIECE_BYTES) -> bool:
    """Return whether a source is slow: ``arrived`` bytes in ``elapsed`` seconds, and none in the last ``idle`` ones.

    ``left`` bytes are missing, in pieces of ``piece`` at most, and a usual stream brings ``usual`` bytes a second.
    """
    patience = HEDGE_SECONDS + 2 * piece / usual
    if idle > patience:
        return True
    rate = arrived / elapsed if elapsed > 0 else usual
    return elapsed > patience and rate < usual * SLOW_SHARE and left > HEDGE_SECONDS * rate
