"""This node's place in the run: it joins, says that it is ready, follows the list of members, comes back if dropped."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

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
from psyche_node.node.standing import (
    LATER,
    LIVE,
    Dropped,
    Ejected,
    JoinRefused,
    Left,
    RunFinished,
    admitted,
    why_dropped,
)
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
# How often it is looked whether the weights have caught up with the run.
_LOOK_SECONDS = 0.5

_IDLE = (Phase.WAITING_FOR_MEMBERS, Phase.PAUSED)
_TRAINING = (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS, Phase.COOLDOWN)


class Replica(Protocol):
    """This node's weights, which the round loop keeps in step with the run."""

    @property
    def applied(self) -> int:
        """Rounds whose result is in them."""

    async def root(self) -> bytes:
        """Return their model root."""


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
        self._before: MemberStatus | None = None
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
            if self._mine is not None and self._mine.status is not mine.status:
                self._before = self._mine.status
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
                    f"member {self.slot} is another wallet by now: this one was dropped, and the run is full; {LATER}"
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
                raise _desynced(number, "the fingerprint of these weights is not that of the majority")
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

    async def keep(self, replica: Replica) -> None:
        """Say that this node is ready as soon as it can be, and join again whenever it was dropped; until cancelled.

        Raises Dropped or Ejected when that does not help, Desynced when the weights are not the run's, and what chain
        and program raise.
        """
        while True:
            await first(self._get_ready(replica), self._dropped())
            if not await self._come_back(await self._dropped(), replica):
                return

    async def _get_ready(self, replica: Replica) -> None:
        """Meet the other members when the run warms up, or trains already, and report ready."""
        while True:
            run = (await self._view.until(lambda pulse: pulse.run.phase not in _IDLE)).run
            await self._record()
            await self._meeting().held(self._seconds_left(), alone=run.limits.min_members == 1)
            await self._caught_up(replica)
            run = self._view.pulse.run
            if TermsChanged.between(self._loaded, run):
                return  # the round loop ends this node
            # In a warm-up everybody shows what its weights are. While others train, the root is that of the epoch's
            # beginning, and the first fingerprint shows whether this node is in step.
            own = run.phase is Phase.WARMUP and replica.applied > self._loaded.model_round
            root = await replica.root() if own else run.checkpoint_root
            try:
                await self._view.read(lambda root=root: self._chain.ready(root))  # type: ignore[misc]
            except ProgramError as error:
                if error.code == ErrorCode.WRONG_PHASE:
                    await self._view.next()  # the warm-up is over, and the run waits for members again
                    continue
                if error.code == ErrorCode.WRONG_MODEL_ROOT:
                    now = (await self._view.next()).run
                    if own and now.phase is Phase.WARMUP and now.checkpoint_root != root:
                        theirs = now.checkpoint_root.hex()
                        what = f"the root of these weights is {root.hex()}, and that of the run's checkpoint {theirs}"
                        raise _desynced(now.round, what) from None
                    continue  # a new epoch has begun meanwhile
                # An earlier attempt or life of this node may have said so, and the run gone on with it since. A member
                # that is out for another reason learns it from the table.
                if error.code not in (ErrorCode.ALREADY_READY, ErrorCode.MEMBER_NOT_ACTIVE, ErrorCode.RUN_FINISHED):
                    raise
            return

    async def _caught_up(self, replica: Replica) -> None:
        """Wait until everything that is final is in this node's weights: until then they are not the others'."""
        while replica.applied < self._view.pulse.run.final_rounds:
            await asyncio.sleep(_LOOK_SECONDS)

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

    async def _come_back(self, mine: Member, replica: Replica) -> bool:
        """Join again, once this node has followed the run so far that its weights are those of the others. Return
        whether there was a run to join. Raises Dropped, Ejected or Desynced."""
        run = self._view.pulse.run
        if run.phase is Phase.FINISHED:
            return False
        await self._check_last_fingerprint()
        why = why_dropped(mine, self._before, run)
        self._returns = 1 if mine.updates_included > self._included else self._returns + 1
        self._included = mine.updates_included
        self._journal.write("dropped", round=run.round, reason=why)
        if self._returns > MOST_RETURNS:
            raise Dropped(
                f"the run has dropped member {mine.slot} {self._returns} times, and no update of it counted in "
                f"between: {why}. Mend that; {LATER}"
            )
        # At once, then after 1, 2, 4, 8 rounds: the others wait for whoever takes part.
        pause = 2 ** (self._returns - 2) if self._returns > 1 else 0
        when = f"after {pause} rounds" if pause else "as soon as it is in step"
        log.warning(
            "the run has dropped member %d: %s. It follows the run, and joins again %s (%d of %d times)",
            mine.slot,
            why,
            when,
            self._returns,
            MOST_RETURNS,
        )
        await self._view.until(lambda now: now.run.phase not in _TRAINING or now.run.round >= run.round + pause)
        await self._caught_up(replica)
        if not await self._join_again(mine):
            return False
        again = await self._record()
        if again is None or again.slot != self.slot:
            raise Dropped(f"the place of member {self.slot} has gone to another wallet; {LATER}")
        self._see(again)
        self._journal.write("joined", member=again.slot)
        log.info("member %d has joined again: it takes part from the round on that begins when it is ready", again.slot)
        return True

    async def _join_again(self, mine: Member) -> bool:
        """Return whether there was a run to join. Raises Dropped or Ejected where the run has no place for it."""
        share = self._share or mine.next_share
        share = min(share, self._view.pulse.run.limits.max_share or share)  # 0: no limit
        try:
            await self._view.read(lambda: self._chain.join(self._node_key.keypair, share, mine.grant))
        except ProgramError as error:
            if error.code == ErrorCode.RUN_FINISHED:
                return False
            if error.code == ErrorCode.BANNED:
                raise Ejected(f"member {mine.slot} was dropped, and cannot join again: {error}") from None
            if error.code in (ErrorCode.RUN_FULL, ErrorCode.GRANT_FULL):
                raise Dropped(f"member {mine.slot} was dropped, and its place is taken: {error}; {LATER}") from None
            if error.code != ErrorCode.ALREADY_A_MEMBER:  # said twice, and heard the first time
                raise
        return True

    async def _check_last_fingerprint(self) -> None:
        """Raise Desynced if the last fingerprint that this member has committed is not the majority's.

        The program counts that as a missed round, too, and drops who has missed too many, whatever the reason.
        """
        records = [one for one in await self._view.read(self._chain.rounds) if one.closed]
        mine = [one for one in records if self.slot in one.commitments]
        if not mine:
            return
        last = max(mine, key=lambda one: one.round)
        fingerprints = Counter(one.fingerprint for one in last.commitments.values())
        (most, votes), own = fingerprints.most_common(1)[0], last.commitments[self.slot or 0].fingerprint
        if own != most and 2 * votes > len(last.commitments):
            what = f"the fingerprint of these weights, {own:016x}, is not that of the majority, {most:016x}"
            raise _desynced(last.round, what)


def _membership(pulse: Pulse) -> tuple[object, ...]:
    gathering = pulse.run.phase in (Phase.WAITING_FOR_MEMBERS, Phase.WARMUP)
    return (pulse.run.phase if gathering else None, pulse.header.members, pulse.header.active)


def _desynced(number: int, what: str) -> Desynced:
    return Desynced(f"round {number}: {what}. This host's memory or GPU may be at fault: check both; {LATER}")
