"""The network process across its lives: when it dies or falls silent, a new one is started and told what counts.

The node talks to it as to any child process, and need not know: what it asks for is remembered until it is forgotten,
and a new process is configured as the first one was (same key, same ports) and given the members, the open wants and
the node's own announcements again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

from psyche_node.endings import how_it_ended
from psyche_node.ipc import IpcError, Message, Ok, RemoteFailure
from psyche_node.network.messages import (
    Configure,
    Fetched,
    FetchFailed,
    Forget,
    GetStats,
    Kind,
    NetworkRestarted,
    PeerDown,
    PeerUp,
    Publish,
    Ready,
    RefusalCount,
    SetMembers,
    Stats,
    Want,
    WantEntry,
    Why,
)
from psyche_node.node.processes import Child

log = logging.getLogger(__name__)
MODULE = "psyche_node.network"
_PORTS = ("p2p_port", "grpc_port", "bulk_port")
PATIENCE = 120.0
# Asked this often whether it still answers, and given this long; a busy machine takes some seconds.
CHECK_EVERY = 15.0
SILENCE_SECONDS = 60.0
# A life shorter than this counts as a failure; this many in a row and the node ends, for then it is no accident.
STABLE_SECONDS = 60.0
MAX_FAILURES = 8
LONGEST_BACKOFF = 30.0
_EXITS = {1: "an error that was not foreseen", 2: "it was refused", 3: "a part of its libp2p had died"}
M = TypeVar("M", bound=Message)


class KeyChanged(IpcError):
    """The node key on the disk is not the one that this node began with."""

    def __init__(self, began: str, now: str) -> None:
        super().__init__(
            f"node.key is not the one that this node began with ({now} instead of {began}): it was rotated. Start the "
            "node again, so that it goes on under the new key"
        )


class Network:
    """The node's network process, whichever one is alive. ``call`` it like an endpoint."""

    def __init__(self, on_event: Callable[[Message], None]) -> None:
        self._tell = on_event
        self._child: Child | None = None
        self._up = asyncio.Event()
        self._gave_up: IpcError | None = None
        self._configure: Configure | None = None
        self._any_port: tuple[str, ...] = ()
        self._node_id: str | None = None
        self._members: SetMembers | None = None
        self._wants: dict[tuple[int, Kind], dict[tuple[str, int], WantEntry]] = {}
        self._published: dict[tuple[int, Kind, str], Publish] = {}
        self._connected: set[int] = set()
        self._stats = _nothing()
        self._earlier = _nothing()
        self.restarts = 0

    async def start(self, configure: Configure) -> Ready:
        """Start the first process and configure it. Raises RemoteFailure when it refuses, and IpcError."""
        self._configure = configure
        self._any_port = tuple(name for name in _PORTS if not getattr(configure, name))
        return await self._begin()

    async def keep(self) -> None:
        """Run until cancelled: replace the process whenever it ends.

        Raises IpcError when new ones end, too, and KeyChanged when a new one would be another node.
        """
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            reason = await self._until_dead()
            lived = loop.time() - started
            failures = failures + 1 if lived < STABLE_SECONDS else 1
            while True:
                if failures > MAX_FAILURES:
                    raise self._give_up(
                        IpcError(
                            f"the network process ended {failures} times in a row ({reason}); its own last lines are "
                            "in the log above. Start the node again"
                        )
                    )
                wait = 0.0 if failures == 1 else min(LONGEST_BACKOFF, 2.0 ** (failures - 2))
                log.error(
                    "the network process ended after %.0f s: %s; starting a new one in %.0f s (attempt %d of %d)",
                    lived,
                    reason,
                    wait,
                    failures,
                    MAX_FAILURES,
                )
                await asyncio.sleep(wait)
                try:
                    await self._begin()
                    break
                except KeyChanged as error:
                    raise self._give_up(error) from None
                except (IpcError, OSError) as error:
                    reason, lived = str(error), 0.0
                    failures += 1
                    await self._end()
            self.restarts += 1
            self._tell(NetworkRestarted(restarts=self.restarts, reason=reason))
            await self._say_again()

    async def call(self, message: Message, expect: type[M]) -> M:
        """Ask the process. Between two lives, what will be said again is done, and statistics are the last known.

        They are that, too, when it cannot say them. Otherwise raises RemoteFailure (it said no) or IpcError (there will
        be no new life).
        """
        remembered = self._remember(message)
        while True:
            if not self._up.is_set() and (known := self._answer(message, expect, remembered)) is not None:
                return known
            await self._up.wait()
            if self._gave_up is not None:
                raise self._gave_up
            assert self._child is not None
            child = self._child
            try:
                reply = await child.endpoint.call(message, expect)
            except RemoteFailure as error:
                if isinstance(message, GetStats) and isinstance(self._stats, expect):
                    # Nobody should end for want of statistics.
                    log.warning("%s; the last statistics known are used", error)
                    return self._total(self._stats)  # type: ignore[return-value]  # M is Stats
                raise
            except IpcError as error:
                self._lost(child, error)
                continue
            if isinstance(reply, Stats):
                self._stats = reply
                return self._total(reply)  # type: ignore[return-value]  # M is Stats
            return reply

    async def stop(self) -> None:
        """End the process."""
        await self._end()

    @property
    def process_id(self) -> int | None:
        """Return the process that is alive, None between two lives."""
        return self._child.process.pid if self._child is not None and self._up.is_set() else None

    # One life --------------------------------------------------------------------------------------------------------

    async def _begin(self) -> Ready:
        assert self._configure is not None
        self._child = child = await Child.start("network", MODULE, self._on_event, PATIENCE)
        try:
            ready = await child.endpoint.call(self._configure, Ready)
        except RemoteFailure:
            # The port may be somebody else's by now; the members hear of a new one.
            self._configure = self._configure.model_copy(update=dict.fromkeys(self._any_port, 0))
            raise
        if ready.node_id != (began := self._node_id or ready.node_id):
            raise KeyChanged(began, ready.node_id)
        self._node_id = ready.node_id
        self._configure = self._configure.model_copy(update={name: getattr(ready, name) for name in _PORTS})
        self._up.set()
        return ready

    async def _until_dead(self) -> str:
        """Return why the process is no more; one that does not answer is killed."""
        assert self._child is not None
        child = self._child
        silent = False
        while not child.endpoint.closed.is_set():
            try:
                async with asyncio.timeout(CHECK_EVERY):
                    await child.endpoint.closed.wait()
            except TimeoutError:
                try:
                    self._stats = await child.endpoint.call(GetStats(), Stats, SILENCE_SECONDS)
                except RemoteFailure as error:
                    log.warning("%s; it does answer, and goes on", error)
                except IpcError:
                    silent = not child.endpoint.closed.is_set()
                    break
        self._up.clear()
        if silent:
            child.process.kill()
        await self._end()
        for slot in sorted(self._connected):
            self._tell(PeerDown(slot=slot))
        self._connected.clear()
        self._earlier, self._stats = self._total(self._stats), _nothing()
        status = child.process.returncode
        return f"it had not answered for {SILENCE_SECONDS:.0f} s" if silent else how_it_ended(status, _EXITS)

    def _give_up(self, error: IpcError) -> IpcError:
        """There will be no new process: whoever waits for one is told why."""
        self._gave_up = error
        self._up.set()
        return error

    async def _end(self) -> None:
        self._up.clear()
        if self._child is not None:
            await self._child.stop()

    def _lost(self, child: Child, error: IpcError) -> None:
        if not child.endpoint.closed.is_set():
            log.warning("%s; killing it", error)
            child.process.kill()
        if child is self._child:
            self._up.clear()

    # What is said again ----------------------------------------------------------------------------------------------

    def _remember(self, message: Message) -> bool:
        match message:
            case SetMembers():
                self._members = message
            case Want():
                wants = self._wants.setdefault((message.round, message.kind), {})
                # Two members may have committed to the same bytes, and each is waited for.
                wants.update({(want.digest, want.member): want for want in message.wants})
            case Publish():
                self._published[message.round, message.kind, message.digest] = message
            case Forget():
                first = message.before_round
                self._wants = {key: wants for key, wants in self._wants.items() if key[0] >= first}
                self._published = {key: said for key, said in self._published.items() if key[0] >= first}
            case _:
                return False
        return True

    async def _say_again(self) -> None:
        """Bring a new process to where the last one was. What it cannot do is logged; one that dies or falls silent
        over it is lost, and the next is told everything."""
        assert self._child is not None
        child = self._child
        for message in self._said():
            try:
                await child.endpoint.call(message, Ok)
            except RemoteFailure as error:
                log.warning("%s was not said again to the new network process: %s", type(message).__name__, error)
            except IpcError as error:
                self._lost(child, error)
                return

    def _said(self) -> Iterator[Message]:
        # Each is looked up when its turn comes: meanwhile the node may have said something newer.
        if self._members is not None:
            yield self._members
        for key in sorted(self._published):
            if (said := self._published.get(key)) is not None:
                yield said
        for round_number, kind in sorted(self._wants):
            if wants := self._wants.get((round_number, kind)):
                yield Want(round=round_number, wants=list(wants.values()), kind=kind)

    def _answer(self, message: Message, expect: type[M], remembered: bool) -> M | None:
        answer: Message | None = None
        if remembered:
            answer = Ok()
        elif isinstance(message, GetStats):
            answer = self._total(self._stats.model_copy(update={"peers": 0, "connected": []}))
        return answer if isinstance(answer, expect) else None

    def _total(self, stats: Stats) -> Stats:
        """Add up the lives: the counts of a process begin at nothing."""
        counts: dict[str, object] = {name: getattr(stats, name) + getattr(self._earlier, name) for name in _COUNTS}
        refusals: Counter[tuple[str, Why]] = Counter()
        for one in (*self._earlier.refusals, *stats.refusals):
            refusals[one.what, one.why] += one.count
        counts["refusals"] = [RefusalCount(what=what, why=why, count=n) for (what, why), n in refusals.items()]
        return stats.model_copy(update=counts)

    def _on_event(self, message: Message) -> None:
        match message:
            case PeerUp():
                self._connected.add(message.slot)
            case PeerDown():
                self._connected.discard(message.slot)
            case Fetched() | FetchFailed(final=True):
                for kind in Kind:
                    self._wants.get((message.round, kind), {}).pop((message.digest, message.member), None)
            case _:
                pass
        self._tell(message)


_COUNTS = (
    "bytes_sent",
    "bytes_received",
    "blob_bytes_sent",
    "blob_bytes_received",
    "bulk_bytes_sent",
    "bulk_bytes_received",
)


def _nothing() -> Stats:
    return Stats(
        bytes_sent=0, bytes_received=0, blob_bytes_sent=0, blob_bytes_received=0, peers=0, connected=[], per_peer=[]
    )
