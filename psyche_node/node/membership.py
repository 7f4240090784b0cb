"""This node's place in the run: it joins, says that it is ready, follows the list of members, comes back if dropped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from solders.pubkey import Pubkey

from coordinator.client import CoordinatorClient, ProgramError, Pulse
from coordinator.errors import ErrorCode
from coordinator.instructions import DEFAULT_SHARE
from coordinator.state import Member, MemberStatus, Phase, Run
from psyche_node.identity import NodeKey, node_id
from psyche_node.ipc import Caller, Message, Ok
from psyche_node.network.messages import MemberEntry, PeerDown, PeerUp, Rejected, SetMembers, Why
from psyche_node.node.changes import Changes, first
from psyche_node.node.journal import Journal
from psyche_node.node.meeting import Meeting
from psyche_node.node.roundloop import Desynced, TermsChanged
from psyche_node.node.view import ChainView

log = logging.getLogger(__name__)
# The member table is read again when a peer is refused that is not in it, but not sooner than after this pause; and
# after this time anyway.
MEMBERS_PAUSE_SECONDS = 2.0
MEMBERS_SECONDS = 120.0
# A warm-up ends without those who are not ready; what they send has to land before, with this share of it left.
_MARGIN = 0.2
# Dropped this often without an update that counted, a node has a fault that joining again does not cure.
MOST_RETURNS = 5

_IDLE = (Phase.WAITING_FOR_MEMBERS, Phase.PAUSED)
_TRAINING = (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS, Phase.COOLDOWN)
LIVE = (MemberStatus.PENDING, MemberStatus.ACTIVE, MemberStatus.DESYNCED)


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


class Membership:
    """One wallet's membership. Call ``join``; then ``follow`` and ``keep`` run beside the round loop.

    Args:
        share: of the batch, as set; 0 is measured later.
        loaded: the run as it was when this node's model and data were loaded.
    """

    def __init__(
        self,
        chain: CoordinatorClient,
        view: ChainView,
        network: Caller,
        journal: Journal,
        wallet: Pubkey,
        node_key: NodeKey,
        share: int,
        loaded: Run,
    ) -> None:
        self._chain, self._view, self._network, self._journal = chain, view, network, journal
        self._wallet, self._node_key, self._share, self._loaded = wallet, node_key, share, loaded
        self.slot: int | None = None
        self._table: Sequence[Member] = ()
        self._mine: Member | None = None
        self._connected: set[int] = set()
        self._changes = Changes()
        self._hint = asyncio.Event()
        self._returns = 0
        self._included = 0

    # What others tell it ---------------------------------------------------------------------------------------------

    def on_event(self, message: Message) -> None:
        """Take an event of the network process."""
        if isinstance(message, PeerUp):
            self._connected.add(message.slot)
            self._changes.fire()
        elif isinstance(message, PeerDown):
            self._connected.discard(message.slot)
            self._changes.fire()
        elif isinstance(message, Rejected) and message.why is Why.NOT_A_MEMBER:
            self._hint.set()

    def look(self) -> None:
        """Read the member table again: a round has begun without this member."""
        self._hint.set()

    # Joining ---------------------------------------------------------------------------------------------------------

    async def join(self) -> int:
        """Become a member, or find that this wallet is one; return its slot. Raises JoinRefused, RunFinished."""
        mine = await self._record()
        if mine is None:
            await self._chain.join(self._node_key.keypair, self._share or DEFAULT_SHARE)
            mine = await self._record()
            if mine is None:
                raise JoinRefused("the join was confirmed, yet the member table does not list this wallet")
        elif mine.node_key != self._node_key.public:
            mine = await self._go_on_under_new_key(mine)
        self.slot, self._included = mine.slot, mine.updates_included
        self._see(mine)
        log.info("member %d of run %s", mine.slot, self._view.pulse.run.run_id)
        self._journal.write("joined", member=mine.slot)
        return mine.slot

    async def _go_on_under_new_key(self, mine: Member) -> Member:
        """Join again: the program lets a member go on in its slot under another node key, until the run is finished."""
        old, new = node_id(mine.node_key), self._node_key.node_id
        if self._view.pulse.run.phase is Phase.FINISHED:
            raise RunFinished(
                f"this wallet is member {mine.slot} under the node key {old}, and a finished run takes no other key "
                f"({new}). Start the node with the node.key of that node"
            )
        log.warning("member %d of this wallet goes on under a new node key: %s instead of %s", mine.slot, new, old)
        await self._chain.join(self._node_key.keypair, self._share or mine.next_share, mine.grant)
        self._journal.write("rotated", member=mine.slot, old=old, new=new)
        again = await self._record()
        if again is None or again.node_key != self._node_key.public:
            raise JoinRefused(
                f"the chain still lists another node key for member {mine.slot}. Does another node with this wallet "
                "run, too? Stop it, and start this one again"
            )
        return again

    async def _record(self) -> Member | None:
        table = self._table = await self._view.read(self._chain.members)
        return next((m for m in table if m.wallet == self._wallet and m.status in LIVE), None)

    def _see(self, mine: Member) -> None:
        # Two tasks read the table: the older of two answers may come last.
        if self._mine is None or mine.status_slot >= self._mine.status_slot:
            self._mine = mine
            self._changes.fire()

    # The list of members ---------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Keep the network's list of members that of the chain, until cancelled.

        Raises JoinRefused when another host has taken over, and Desynced, Ejected or Left when this member is out.
        """
        known: list[MemberEntry] | None = None
        while True:
            seen = self._view.pulse
            self._hint.clear()
            table = self._table = await self._view.read(self._chain.members)
            mine = next((m for m in table if m.slot == self.slot and m.wallet == self._wallet), None)
            if mine is not None:
                self._check_place(mine, seen.run.round)
                self._see(mine)
            elif self.slot is not None:
                raise Dropped(
                    f"member {self.slot} is another wallet by now: this one was dropped, and the run is full. Start "
                    "this node again when a place is free (psyche-admin run show)"
                )
            self._changes.fire()
            members = admitted(table)
            if members != known:
                await self._network.call(SetMembers(members=members), Ok)
                known = members
            await self._may_have_changed(_membership(seen))

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
                raise Desynced(
                    f"round {number}: the fingerprint of these weights is not that of the majority. This host's memory "
                    "or GPU may be at fault: check both, and join again when the run next waits for members"
                )
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

    # Being ready -----------------------------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Say that this node is ready as soon as it can be, and join again whenever it was dropped; until cancelled.

        Raises Dropped when that does not help, and what chain and program raise.
        """
        while True:
            await first(self._get_ready(), self._dropped())
            if not await self._come_back(await self._dropped()):
                return

    async def _get_ready(self) -> None:
        """Meet the other members when the run warms up, or trains already, and report ready."""
        while True:
            run = (await self._view.until(lambda pulse: pulse.run.phase not in _IDLE)).run
            await self._meeting().held(self._seconds_left(), alone=run.limits.min_members == 1)
            if TermsChanged.between(self._loaded, self._view.pulse.run):
                return  # the round loop ends this node
            try:
                await self._view.read(lambda: self._chain.ready(self._view.pulse.run.checkpoint_root))
            except ProgramError as error:
                if error.code == ErrorCode.WRONG_PHASE:
                    await self._view.next()  # the warm-up is over, and the run waits for members again
                    continue
                # An earlier attempt or life of this node may have said so, and the run gone on with it since. A member
                # that is out for another reason learns it from the table.
                if error.code not in (ErrorCode.ALREADY_READY, ErrorCode.MEMBER_NOT_ACTIVE, ErrorCode.RUN_FINISHED):
                    raise
            return

    def _meeting(self) -> Meeting:
        def others() -> set[int]:
            here = (MemberStatus.PENDING, MemberStatus.ACTIVE)
            return {m.slot for m in self._table if m.status in here} - {self.slot}

        return Meeting(others, lambda: self._connected, self._changes)

    def _seconds_left(self) -> float:
        """Until the program goes on without those who are not ready, less what saying so takes."""
        pulse = self._view.pulse
        whole = pulse.run.limits.warmup_time
        over = pulse.slot - pulse.run.phase_slot if pulse.run.phase is Phase.WARMUP else 0
        return max(0.0, whole * (1 - _MARGIN) - over) * self._chain.slot_seconds

    # Coming back -----------------------------------------------------------------------------------------------------

    async def _dropped(self) -> Member:
        while self._mine is None or self._mine.status is not MemberStatus.DROPPED:
            await self._changes.beyond(self._changes.version)
        return self._mine

    async def _come_back(self, mine: Member) -> bool:
        """Join again: this node has followed the run meanwhile, so its weights are those of the others. Return whether
        there was a run to join. Raises Dropped."""
        run = self._view.pulse.run
        why = _why(mine, run)
        self._returns = 1 if mine.updates_included > self._included else self._returns + 1
        self._included = mine.updates_included
        self._journal.write("dropped", round=run.round, reason=why)
        if self._returns > MOST_RETURNS:
            raise Dropped(
                f"the run has dropped member {mine.slot} {self._returns} times, and no update of it counted in "
                f"between: {why}. Start this node again when that is mended and the run waits for members"
            )
        # At once, then after 1, 2, 4, 8 rounds: the others wait for whoever takes part.
        pause = 2 ** (self._returns - 2) if self._returns > 1 else 0
        when = f"after {pause} rounds" if pause else "now"
        log.warning(
            "the run has dropped member %d: %s. It follows the run, and joins again %s (%d of %d times)",
            mine.slot,
            why,
            when,
            self._returns,
            MOST_RETURNS,
        )
        await self._view.until(lambda now: now.run.phase not in _TRAINING or now.run.round >= run.round + pause)
        try:
            share = self._share or mine.next_share
            await self._view.read(lambda: self._chain.join(self._node_key.keypair, share, mine.grant))
        except ProgramError as error:
            if error.code == ErrorCode.RUN_FINISHED:
                return False
            if error.code != ErrorCode.ALREADY_A_MEMBER:  # said twice, and heard the first time
                raise
        again = await self._record()
        if again is None or again.slot != self.slot:
            raise Dropped(f"the place of member {self.slot} has gone to another wallet. Start this node again")
        self._see(again)
        self._journal.write("joined", member=again.slot)
        log.info("member %d has joined again: it takes part from the round on that begins when it is ready", again.slot)
        return True


def check_in_time(run: Run, model: Path) -> None:
    """Raise JoinRefused or RunFinished if a node that has the run's initial ``model`` cannot take part any more."""
    if run.phase is Phase.FINISHED:
        raise RunFinished(
            f"the run was finished after {run.final_rounds} rounds; there is nothing to join. Its last checkpoint has "
            f"the model root {run.checkpoint_root.hex()}"
        )
    sets = [run.inclusion_set(number) for number in range(run.model_round, run.final_rounds)]
    trained = any(one is None or not one.void for one in sets)  # one that is not kept: who knows
    if trained or run.checkpoint_root != run.terms.model_root:
        raise JoinRefused(
            f"the run is in {run.phase.name} of round {run.round}, and its members have trained the model in {model} "
            f"since round {run.model_round}. In this version a node takes part from there on or not at all: wait for "
            "the owner's next run, or for a new model in this one"
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


def _why(mine: Member, run: Run) -> str:
    most = run.limits.max_missed
    if mine.missed >= most:
        return f"it has missed {mine.missed} rounds in a row (is the device or the link too slow?)"
    if mine.excluded >= most:
        return (
            f"{mine.excluded} times in a row two thirds of the witnesses did not hold its update, or its own word as a "
            "witness was missing (can others reach its ports?)"
        )
    return "it was not ready when the warm-up ended"


def _membership(pulse: Pulse) -> tuple[object, ...]:
    gathering = pulse.run.phase in (Phase.WAITING_FOR_MEMBERS, Phase.WARMUP)
    return (pulse.run.phase if gathering else None, pulse.header.members, pulse.header.active)
