"""This node's place in the run: it joins, says that it is ready, and comes back if it was dropped."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Protocol

from coordinator.client import CoordinatorClient, ProgramError
from coordinator.errors import ErrorCode
from coordinator.instructions import DEFAULT_SHARE
from coordinator.state import Member, Phase, Run
from psyche_node.identity import NodeKey, node_id
from psyche_node.ipc import Message
from psyche_node.network.messages import PeerDown, PeerUp
from psyche_node.node.changes import first
from psyche_node.node.journal import Journal
from psyche_node.node.meeting import Meeting
from psyche_node.node.roster import Roster, out_of_step
from psyche_node.node.roundloop import TermsChanged
from psyche_node.node.standing import LATER, Dropped, Ejected, JoinRefused, RunFinished, why_dropped
from psyche_node.node.view import ChainView

log = logging.getLogger(__name__)
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
    """One wallet's membership. Call ``join``; then ``keep`` runs beside the round loop.

    Args:
        share: of the batch, as set; 0 is measured later.
        loaded: the run as it was when this node's model and data were loaded.
    """

    def __init__(
        self,
        chain: CoordinatorClient,
        view: ChainView,
        roster: Roster,
        journal: Journal,
        node_key: NodeKey,
        share: int,
        loaded: Run,
    ) -> None:
        self._chain, self._view, self._roster, self._journal = chain, view, roster, journal
        self._node_key, self._share, self._loaded = node_key, share, loaded
        self._connected: set[int] = set()
        self._returns = 0
        self._included = 0

    # What others tell it ---------------------------------------------------------------------------------------------

    def on_event(self, message: Message) -> None:
        """Take an event of the network process."""
        if isinstance(message, PeerUp):
            self._connected.add(message.slot)
            self._roster.changes.fire()
        elif isinstance(message, PeerDown):
            self._connected.discard(message.slot)

    # Joining ---------------------------------------------------------------------------------------------------------

    async def join(self) -> int:
        """Become a member, or find that this wallet is one; return its slot. Raises JoinRefused, RunFinished."""
        mine = await self._roster.read()
        if mine is None:
            await self._chain.join(self._node_key.keypair, self._share or DEFAULT_SHARE)
            mine = await self._roster.read()
            if mine is None:
                raise JoinRefused(
                    "the join was confirmed, yet the member table does not list this wallet: start the node again"
                )
        elif mine.node_key != self._node_key.public:
            mine = await self._go_on_under_new_key(mine)
        self._roster.see(mine)
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
        again = await self._roster.read()
        if again is None or again.node_key != self._node_key.public:
            raise JoinRefused(
                f"the chain still lists another node key for member {mine.slot}. Does another node with this wallet "
                "run, too? Stop it, and start this one again"
            )
        return again

    # Being ready -----------------------------------------------------------------------------------------------------

    async def keep(self, replica: Replica) -> None:
        """Say that this node is ready as soon as it can be, and join again whenever it was dropped; until cancelled.

        Raises Dropped or Ejected when that does not help, Desynced when the weights are not the run's, and what chain
        and program raise.
        """
        while True:
            await first(self._get_ready(replica), self._roster.dropped())
            if not await self._come_back(await self._roster.dropped(), replica):
                return

    async def _get_ready(self, replica: Replica) -> None:
        """Meet the other members when the run warms up, or trains already, and report ready."""
        while True:
            run = (await self._view.until(lambda pulse: pulse.run.phase not in _IDLE)).run
            await self._roster.read()
            meeting = Meeting(self._roster.others, lambda: self._connected, self._roster.changes)
            await meeting.held(self._seconds_left(), alone=run.limits.min_members == 1)
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
                        raise out_of_step(now.round, what) from None
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

    def _seconds_left(self) -> float:
        """Until the program goes on without those who are not ready, less what saying so takes."""
        pulse = self._view.pulse
        whole = pulse.run.limits.warmup_time
        over = pulse.slot - pulse.run.phase_slot if pulse.run.phase is Phase.WARMUP else 0
        return max(0.0, whole * (1 - _MARGIN) - over) * self._chain.slot_seconds

    # Coming back -----------------------------------------------------------------------------------------------------

    async def _come_back(self, mine: Member, replica: Replica) -> bool:
        """Join again, once this node has followed the run so far that its weights are those of the others. Return
        whether there was a run to join. Raises Dropped, Ejected or Desynced."""
        run = self._view.pulse.run
        if run.phase is Phase.FINISHED:
            return False
        await self._check_last_fingerprint()
        why = why_dropped(mine, self._roster.before, run)
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
        again = await self._roster.read()
        if again is None or again.slot != self._roster.slot:
            raise Dropped(f"the place of member {self._roster.slot} has gone to another wallet; {LATER}")
        self._roster.see(again)
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
                raise Ejected(
                    f"member {mine.slot} was dropped, and cannot join again: {error}. Ask the run's owner why"
                ) from None
            if error.code in (ErrorCode.RUN_FULL, ErrorCode.GRANT_FULL):
                raise Dropped(f"member {mine.slot} was dropped, and its place is taken: {error}; {LATER}") from None
            if error.code != ErrorCode.ALREADY_A_MEMBER:  # said twice, and heard the first time
                raise
        return True

    async def _check_last_fingerprint(self) -> None:
        """Raise Desynced if the last fingerprint that this member has committed is not the majority's.

        The program counts that as a missed round, too, and drops who had missed too many before.
        """
        records = [one for one in await self._view.read(self._chain.rounds) if one.closed]
        mine = [one for one in records if self._roster.slot in one.commitments]
        if not mine:
            return
        last = max(mine, key=lambda one: one.round)
        fingerprints = Counter(one.fingerprint for one in last.commitments.values())
        (most, votes), own = fingerprints.most_common(1)[0], last.commitments[self._roster.slot or 0].fingerprint
        if own != most and 2 * votes > len(last.commitments):
            what = f"the fingerprint of these weights, {own:016x}, is not that of the majority, {most:016x}"
            raise out_of_step(last.round, what)
