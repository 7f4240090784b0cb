"""The member table as this node reads it: its own line there, and the network's list of members, which follows it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from solders.pubkey import Pubkey

from coordinator.client import CoordinatorClient, Pulse
from coordinator.state import Member, MemberStatus, Phase, Run
from psyche_node.identity import NodeKey, node_id
from psyche_node.ipc import Caller, Message, Ok
from psyche_node.network.messages import MemberEntry, Rejected, SetMembers, Why
from psyche_node.node.changes import Changes, first
from psyche_node.node.roundloop import Desynced
from psyche_node.node.standing import LATER, LIVE, Dropped, Ejected, JoinRefused, Left, admitted
from psyche_node.node.view import ChainView

log = logging.getLogger(__name__)
# The member table is read again when a peer is refused that is not in it, but not sooner than after this pause; and
# after this time anyway.
MEMBERS_PAUSE_SECONDS = 2.0
MEMBERS_SECONDS = 120.0


class Roster:
    """Who takes part, and how this wallet stands. ``follow`` runs beside everything else.

    ``changes`` fires when the table was read, or may have to be looked at again.
    """

    def __init__(
        self, chain: CoordinatorClient, view: ChainView, network: Caller, wallet: Pubkey, node_key: NodeKey
    ) -> None:
        self._chain, self._view, self._network, self._wallet, self._node_key = chain, view, network, wallet, node_key
        self._table: Sequence[Member] = ()
        self._mine: Member | None = None
        self._hint = asyncio.Event()
        self._waits = self._paused = False
        self.changes = Changes()
        self.before: MemberStatus | None = None
        """What this member's status was before the present one."""

    @property
    def slot(self) -> int | None:
        """This member's number; None before it has one."""
        return None if self._mine is None else self._mine.slot

    @property
    def place(self) -> int | None:
        """How many live members are before this one in the table; None while it is none of them."""
        live = sorted(m.slot for m in self._table if m.status in LIVE)
        return live.index(self.slot) if self.slot in live else None

    def others(self) -> set[int]:
        """Return the numbers of the other members that train, or are about to."""
        here = (MemberStatus.PENDING, MemberStatus.ACTIVE)
        return {m.slot for m in self._table if m.status in here} - {self.slot}

    def on_event(self, message: Message) -> None:
        """Take an event of the network process."""
        if isinstance(message, Rejected) and message.why is Why.NOT_A_MEMBER:
            self._hint.set()

    def look(self) -> None:
        """Read the member table again: a round has begun without this member."""
        self._hint.set()

    async def read(self) -> Member | None:
        """Read the table; return this wallet's live membership, if it has one."""
        table = self._table = await self._view.read(self._chain.members)
        return next((m for m in table if m.wallet == self._wallet and m.status in LIVE), None)

    def see(self, mine: Member) -> None:
        """Take note of this member's line. Two tasks read the table: the older of two answers may come last."""
        if self._mine is None or mine.status_slot >= self._mine.status_slot:
            if self._mine is not None and self._mine.status is not mine.status:
                self.before = self._mine.status
            self._mine = mine
            self.changes.fire()

    async def dropped(self) -> Member:
        """Wait until the run has dropped this member; return its line."""
        while self._mine is None or self._mine.status is not MemberStatus.DROPPED:
            await self.changes.beyond(self.changes.version)
        return self._mine

    async def follow(self) -> None:
        """Keep the network's list of members that of the chain, until cancelled.

        Raises JoinRefused when another host has taken over, and Desynced, Dropped, Ejected or Left when this member is
        out.
        """
        known: list[MemberEntry] | None = None
        while True:
            seen = self._view.pulse
            self._tell_of_waiting(seen)
            self._tell_of_pause(seen.run)
            self._hint.clear()
            table = self._table = await self._view.read(self._chain.members)
            mine = next((m for m in table if m.slot == self.slot and m.wallet == self._wallet), None)
            if mine is not None:
                self._check_place(mine, seen.run.round)
                self.see(mine)
            elif self.slot is not None:
                raise Dropped(
                    f"member {self.slot} is another wallet by now: this one was dropped, and the run is full; {LATER}"
                )
            members = admitted(table)
            if members != known:
                await self._network.call(SetMembers(members=members), Ok)
                known = members
            await self._may_have_changed(_membership(seen))

    def _tell_of_waiting(self, seen: Pulse) -> None:
        """Say once that a run which has begun to train has too few members left, and once that it goes on."""
        run, here = seen.run, seen.header.members
        needed = run.limits.init_min_members
        stopped = run.phase is Phase.WAITING_FOR_MEMBERS and run.round > run.model_round
        if stopped and here < needed and not self._waits:
            self._waits = True
            log.warning(
                "round %d: the run has stopped, for too few members are left: it has %d, and needs %d to go on. One "
                "that was dropped and still runs joins again by itself; a node that starts anew cannot catch up. If no "
                "more come, the run's owner can go on from a checkpoint",
                run.round,
                here,
                needed,
            )
        elif self._waits and run.phase in (Phase.WARMUP, Phase.ROUND_TRAIN, Phase.ROUND_WITNESS, Phase.COOLDOWN):
            self._waits = False
            log.info("round %d: the run goes on, with %d members", run.round, here)

    def _tell_of_pause(self, run: Run) -> None:
        """Say once that the owner has paused the run, and once that it goes on."""
        paused = run.phase is Phase.PAUSED
        if paused and not self._paused:
            log.info(
                "round %d: the owner has paused the run; this node waits, and goes on when the owner does", run.round
            )
        elif self._paused and not paused and run.phase is not Phase.FINISHED:
            log.info("round %d: the owner has resumed the run", run.round)
        self._paused = paused

    def _check_place(self, mine: Member, number: int) -> None:
        """Raise what ends this node."""
        if mine.node_key != self._node_key.public:
            raise JoinRefused(
                f"member {mine.slot} goes on under another node key, {node_id(mine.node_key)}: a node with this wallet "
                "was started elsewhere. The others refuse this one from now on; if that was not you, use `psyche-admin "
                "member leave`, and a new wallet"
            )
        match mine.status:
            case MemberStatus.DESYNCED:
                raise out_of_step(number, "the fingerprint of these weights is not that of the majority")
            case MemberStatus.EJECTED:
                raise Ejected(
                    f"round {number}: the run's owner has put this node out. Ask the owner why before joining again"
                )
            case MemberStatus.LEFT:
                raise Left(
                    f"round {number}: this wallet has left the run (psyche-admin member leave). What it has earned "
                    "stays its own: psyche-admin member claim"
                )

    async def _may_have_changed(self, seen: tuple[object, ...]) -> None:
        """Wait for a reason to read the member table again. That a member's node key changed shows in that table only:
        so it is read when somebody is refused for not being in it, and from time to time."""

        async def hinted() -> None:
            await asyncio.sleep(MEMBERS_PAUSE_SECONDS)
            await self._hint.wait()

        async def moved() -> None:
            await self._view.until(lambda pulse: _membership(pulse) != seen)

        await first(hinted(), moved(), asyncio.sleep(MEMBERS_SECONDS))


def out_of_step(number: int, what: str) -> Desynced:
    """Return the error of a node whose weights are not the run's, found in round ``number``."""
    return Desynced(f"round {number}: {what}. This host's memory or GPU may be at fault: check both; {LATER}")


def _membership(pulse: Pulse) -> tuple[object, ...]:
    gathering = pulse.run.phase in (Phase.WAITING_FOR_MEMBERS, Phase.WARMUP)
    return (pulse.run.phase if gathering else None, pulse.header.members, pulse.header.active)
