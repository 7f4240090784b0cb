"""Wanted blobs, until they are here or forgotten: which sources to read, when, and what becomes of it. Runs on trio.

Each want is a task. A source is read in a thread (``download``); whom to take next is ``wants``' choice. A source whose
bytes are wrong is banned, one that fails is avoided for a while, and the want goes on elsewhere. It ends without the
blob when it is forgotten, or when a source shows that there is none: the digest is that of a blob of another length.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from functools import partial

import trio

from psyche_node.identity import node_id
from psyche_node.network.announcements import Announcements
from psyche_node.network.blobs import PIECE_BYTES, StoreError, piece_count
from psyche_node.network.bulk.lanes import Lanes
from psyche_node.network.directory import Directory
from psyche_node.network.download import (
    CALL_SECONDS,
    BadBytes,
    Download,
    FalseCommitment,
    NothingYet,
    Tools,
    finish,
    open_plan,
)
from psyche_node.network.fanout import Tree
from psyche_node.network.holdings import Holdings
from psyche_node.network.links import CallFailed, Cause, Links
from psyche_node.network.messages import Fetched, FetchFailed, Kind, Why
from psyche_node.network.notices import EarlyOffers, Notices
from psyche_node.network.pieces import unpack
from psyche_node.network.quality import Quality
from psyche_node.network.reader import Reader
from psyche_node.network.reports import Reporter
from psyche_node.network.store import BlobStore
from psyche_node.network.threads import in_thread
from psyche_node.network.turns import Rank, Slots, rank
from psyche_node.network.wants import Choice, Chooser, Want
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
MAX_DOWNLOADS = 16
MAX_OTHER_DOWNLOADS = 4
# So many at least, and then as many as leave each this rate: on a slow line, many at once would all be too slow.
MIN_DOWNLOADS = 3
BYTES_PER_SECOND_EACH = 512 * 1024
# A source that has sent nothing for so long, and two pieces' usual time, is given up.
STALL_SECONDS = 10.0
# One that is still receiving the blob itself, and has nothing for this node, may say so this often, in such intervals.
MAX_EMPTY = 20
EMPTY_SECONDS = 0.25
ASK_EVERY = 1.0
ASK_PEERS = 3
MAX_ASKED = 8
_PEERS_FAULT = (Cause.UNREACHABLE, Cause.IDENTITY, Cause.SLOW, Cause.BROKEN)


class Fetcher:
    """The open wants of this node."""

    def __init__(
        self,
        store: BlobStore,
        reader: Reader,
        holdings: Holdings,
        links: Links,
        lanes: Lanes,
        directory: Directory,
        announcements: Announcements,
        quality: Quality,
        reporter: Reporter,
        take_announcement: Callable[[bytes, bytes], object],
    ) -> None:
        self._store, self._reader, self._holdings, self._links = store, reader, holdings, links
        self._lanes = lanes
        self._directory, self._announcements, self._quality = directory, announcements, quality
        self._reporter, self._take = reporter, take_announcement
        self._wants: dict[tuple[int, bytes, int], Want] = {}
        self._early = EarlyOffers()
        self._notices = Notices(links, directory, quality)
        self._slots = Slots(MAX_DOWNLOADS, lambda: max(MIN_DOWNLOADS, quality.inflow() / BYTES_PER_SECOND_EACH))
        # A model takes hours; updates do not wait for its slot.
        self._other_slots = Slots(MAX_OTHER_DOWNLOADS)
        # Cancelled downloads leave their slot before their thread has ended.
        self._threads = trio.CapacityLimiter(2 * (MAX_DOWNLOADS + MAX_OTHER_DOWNLOADS))
        self._looking = trio.CapacityLimiter(4)
        self._asking = trio.CapacityLimiter(2 * MAX_ASKED)
        self._chooser = Chooser(directory, quality, self._busy)
        self.tree: type[Tree] = Tree
        """The shape in which updates are passed on; all nodes have the same."""
        self._nursery: trio.Nursery | None = None
        self._ask_now = trio.Event()

    async def run(self) -> None:
        """Work on wants until cancelled."""
        token = trio.lowlevel.current_trio_token()

        def begun(want: Want) -> None:
            token.run_sync_soon(self._begun, want)

        def hurry() -> bool:
            return any(want.kind is Kind.UPDATE and want.running for want in list(self._wants.values()))

        self._tools = Tools(
            self._store, self._reader, self._holdings, self._links, self._lanes, self._quality, begun, hurry
        )
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:
                await self._ask_now.wait()
                self._ask_now = trio.Event()
                # Sources usually say what they have within this time, and then there is nothing to ask.
                await trio.sleep(ASK_EVERY / 4)
                while self._wants:
                    self._ask_around(nursery)
                    await trio.sleep(ASK_EVERY)

    def want(self, round: int, member: int, digest: bytes, length: int, kind: Kind = Kind.UPDATE) -> None:
        """Open a want. One of the same bytes that is open already is this member's as well, and else stays as it is."""
        if self._nursery is None:
            return
        tree = self._tree(round, member)
        if (want := self._wants.get((round, digest, length))) is not None:
            want.members.setdefault(member, tree)
            return
        self._holdings.know(digest, kind, round)
        want = Want(round, {member: tree}, digest, length, kind, trio.current_time())
        want.invited.update(self._early.take(digest))
        want.offers.update((holder, None) for holder in want.invited)
        self._wants[round, digest, length] = want
        for peer in self._chooser.parent(want):
            self._lanes.prepare(peer, length)
        self._nursery.start_soon(self._pursue, want)
        self._ask_now.set()

    def forget(self, before_round: int) -> None:
        for key, want in list(self._wants.items()):
            if want.round < before_round:
                del self._wants[key]
                want.ended = True
                want.scope.cancel()

    def announced(self, digest: bytes, author: bytes) -> None:
        """The author says that its blob is there."""
        for want in self._wanted(digest):
            want.retry_at.pop(author, None)
            want.news.set()

    def invited(self, digest: bytes, holder: bytes) -> None:
        """Somebody says that this node is to take a blob from there: it has all pieces, or receives them."""
        wants = self._wanted(digest)
        if not wants:
            self._early.add(digest, holder)
        for want in wants:
            # Said again it is no news: a source that fails would have itself asked again at once.
            if holder not in want.invited:
                want.invited.add(holder)
                self._offered(want, holder, None)

    def _wanted(self, digest: bytes) -> list[Want]:
        return [want for want in self._wants.values() if want.digest == digest]

    def _offered(self, want: Want, holder: bytes, held: bytes | None) -> None:
        # A bitmap as it was when it was asked for is no news of one that is said to get all of it.
        if holder not in want.invited or held is None:
            want.offers[holder] = None if held is None else unpack(held, piece_count(want.length))
        if holder not in want.running:
            if holder not in want.broken:
                want.retry_at.pop(holder, None)
            want.news.set()

    def wanted(self, round: int, digest: bytes) -> int | None:
        """Return the length in bytes of a blob with an open want, or None. Any thread."""
        open_wants = list(self._wants.values())
        return next((want.length for want in open_wants if (want.round, want.digest) == (round, digest)), None)

    def arrived(self, digest: bytes, sender: bytes) -> None:
        """A blob was pushed into the store."""
        for want in self._wants.values():
            if want.digest == digest:
                want.pushed_by = sender
                want.news.set()

    def reachable(self, peer: bytes) -> None:
        """There is a way to a peer that could not be reached."""
        for want in self._wants.values():
            want.retry_at.pop(peer, None)
            want.broken.discard(peer)
            want.news.set()

    def sources_changed(self) -> None:
        """Members or records changed."""
        for want in self._wants.values():
            want.members.update((member, self._tree(want.round, member)) for member in want.members)
            want.news.set()

    def published(self, digest: bytes, kind: Kind, round: int) -> None:
        """This node offers a blob of its own; an update goes to its children in the tree."""
        self._holdings.know(digest, kind, round)
        if kind is Kind.UPDATE and self._nursery is not None and (own := self._directory.own_slot) is not None:
            self._notices.tell(self._nursery, digest, self._tree(round, own))

    def spread_to(self, round: int) -> list[bytes]:
        """Return to whom to push this node's own update of a round, the best first: it goes on down the tree."""
        own = self._directory.own_slot
        return [] if own is None else self._directory.public(self._tree(round, own).order)

    def _tree(self, round: int, member: int) -> Tree:
        members = {**self._directory.others()}
        if (own := self._directory.own_slot) is not None:
            members[own] = self._directory.own_key
        return self.tree(round, self._directory.key(member), members.values(), self._directory.private())

    async def _pursue(self, want: Want) -> None:
        try:
            with want.scope:
                source = await self._find(want)
                want.ended = True
                for member in want.members:
                    self._reporter.emit(
                        Fetched(
                            round=want.round,
                            member=member,
                            digest=want.digest.hex(),
                            length=want.length,
                            source=node_id(source),
                        )
                    )
                self._tell_children(want)
        finally:
            for running in want.running.values():
                running.cancel()
            if want.partial is not None:
                # What is still wanted when this process ends is what the next one goes on with.
                self._holdings.end(want.partial, keep=not want.ended)
            key = (want.round, want.digest, want.length)
            if self._wants.get(key) is want:
                del self._wants[key]

    async def _find(self, want: Want) -> bytes:
        await self._go_on(want)
        found: list[bytes] = []
        async with trio.open_nursery() as attempts:
            while not found:
                if await self._is_here(want):
                    found.append(want.pushed_by or self._directory.own_key)
                    break
                want.news = trio.Event()
                now = trio.current_time()
                backlog = self._backlog()
                while (choice := self._chooser.choose(want, now, backlog)) is not None:
                    if self._chooser.full(want):
                        slowest = min(want.running.values(), key=lambda running: running.rate)
                        slowest.give_up("it is slow, and there is another source")
                        break
                    self._start(attempts, want, choice, found)
                if not want.running and not self._directory.sources(self._directory.others().values()):
                    self._tell(want, "no member that could serve it has an address yet")
                self._slots.pass_on()
                patience = STALL_SECONDS + 2 * PIECE_BYTES / self._quality.share()
                for running in want.running.values():
                    if running.idle > patience:
                        running.give_up(f"nothing came from it for {patience:.0f} s")
                with trio.move_on_at(self._chooser.next_at(want, now)):
                    await want.news.wait()
            attempts.cancel_scope.cancel()
        return found[0]

    async def _go_on(self, want: Want) -> None:
        """Take over what an earlier process brought of it."""
        manifest = await in_thread(partial(self._store.unfinished, want.digest, want.length, want.round), self._looking)
        if manifest is None:
            return
        try:
            plan, kept = await in_thread(partial(open_plan, self._tools, want, manifest), self._looking)
            log.info(
                "%s: going on with %d of %d pieces", want.name, len(manifest.pieces) - plan.left, len(manifest.pieces)
            )
            if not plan.left:
                await in_thread(partial(finish, self._tools, want, kept), self._looking)
        except (StoreError, OSError) as error:
            log.error("%s: what an earlier process left cannot be used: %s", want.name, error)

    async def _is_here(self, want: Want) -> bool:
        # The supervisor, or another want of the same bytes, may have put it into the store.
        looking = not want.running or want.pushed_by is not None
        return looking and await in_thread(partial(self._reader.holds, want.digest), self._looking)

    def _rank(self, want: Want) -> Rank:
        return rank(want.kind, want.round, self._announcements.current)

    def _busy(self, source: bytes, want: Want) -> int:
        """Return how many downloads from a peer are running, or wait for a slot, that are as urgent as this want."""
        urgency = self._rank(want)
        return sum(source in other.running and self._rank(other) <= urgency for other in self._wants.values())

    def _backlog(self) -> float:
        """Return how many seconds everything that is wanted should take, at the rate of the last seconds."""
        rate = max(self._quality.inflow(), self._quality.usual())
        return sum(want.bytes_left for want in self._wants.values()) / rate

    def _start(self, attempts: trio.Nursery, want: Want, choice: Choice, found: list[bytes]) -> None:
        log.debug(
            "%s: from %s (%s, %.1f MB/s)%s", want.name, node_id(choice.source), choice.role,
            self._quality.speed(choice.source) / 1e6, ", as another source" if want.running else "",
        )  # fmt: skip
        want.running[choice.source] = download = Download(self._tools, want, choice)
        attempts.start_soon(self._attempt, want, choice.source, download, found)

    async def _attempt(self, want: Want, source: bytes, download: Download, found: list[bytes]) -> None:
        try:
            slots = self._slots if want.kind is Kind.UPDATE else self._other_slots
            async with slots.slot(self._rank(want), min(1.0, want.length / PIECE_BYTES)):
                complete = await in_thread(download.run, self._threads)
            # Not by what is left: who brought the last piece may not have given the blob its name yet.
            if complete:
                found.append(source)
            elif not download.measured()[0]:
                # It had nothing that is missing and that nobody else is bringing.
                want.retry_at[source] = trio.current_time() + EMPTY_SECONDS
            self._quality.served(source, *download.measured())
        except BadBytes as error:
            self._ban(want, source, error)
        except FalseCommitment as error:
            self._give_up(want, error)
        except CallFailed as error:
            self._back_off(want, source, error)
        except NothingYet as error:
            if download.measured()[0]:
                # It comes by and by: what counts is how often in a row there was nothing at all.
                want.empty.pop(source, None)
            self._wait_for_more(want, source, error)
        except (StoreError, OSError) as error:
            log.error("%s could not be written: %s", want.name, error)
            self._tell(want, f"this node's store failed: {error}")
            want.retry_at[source] = trio.current_time() + 1.0
        finally:
            download.cancel()
            want.running.pop(source, None)
            want.news.set()

    def _ban(self, want: Want, source: bytes, error: BadBytes) -> None:
        reason = f"{error} ({want.name}); it is banned as a source of blobs for the rest of the run"
        self._directory.ban(source)
        want.broken.add(source)
        self._reporter.rejected(error.what, source, reason, Why.WRONG_BYTES, always=True)
        self._tell(want, f"{node_id(source)}: {error}")

    def _give_up(self, want: Want, error: FalseCommitment) -> None:
        """Nobody can have such a blob, and who told this node so is honest: who committed to it is not."""
        for author in filter(None, map(self._directory.key, want.members)):
            reason = f"{error} ({want.name})"
            self._reporter.rejected("commitment", author, reason, Why.CONTRADICTION, always=True)
        self._tell(want, str(error), final=True)
        want.ended = True
        want.scope.cancel()

    def _back_off(self, want: Want, source: bytes, error: CallFailed) -> None:
        failures = want.failures[source] = want.failures.get(source, 0) + 1
        longest = 0.5 if error.cause is Cause.BUSY else 5.0
        wait = min(longest, 0.2 * 2.0 ** min(failures - 1, 8)) * random.uniform(0.8, 1.2)
        want.retry_at[source] = trio.current_time() + wait
        if error.cause is not Cause.BUSY:
            want.offers.pop(source, None)
        if error.cause not in (Cause.BUSY, Cause.MISSING):
            want.broken.add(source)
        if error.cause in _PEERS_FAULT:
            self._quality.failed(source, f"{want.name}: {error}", absent=error.cause is Cause.UNREACHABLE)
        author = source in map(self._directory.key, want.members)
        # That somebody else does not hold it is no news.
        if author or error.cause is not Cause.MISSING:
            self._tell(want, f"{'its author' if author else 'another holder'} {node_id(source)}: {error}", error.cause)

    def _wait_for_more(self, want: Want, source: bytes, error: NothingYet) -> None:
        empty = want.empty[source] = want.empty.get(source, 0) + 1
        want.retry_at[source] = trio.current_time() + EMPTY_SECONDS
        if empty >= MAX_EMPTY:
            self._back_off(want, source, CallFailed(Cause.SLOW, f"{error}, {empty} times"))

    def _tell(self, want: Want, reason: str, cause: str | None = None, *, final: bool = False) -> None:
        if (cause or reason) not in want.told:
            want.told.add(cause or reason)
            for member in want.members:
                self._reporter.emit(
                    FetchFailed(round=want.round, member=member, digest=want.digest.hex(), reason=reason, final=final)
                )

    # Passing on ------------------------------------------------------------------------------------------------------

    def _begun(self, want: Want) -> None:
        """The first piece of several is here, so the children can begin, too."""
        want.news.set()
        if not want.passed_on and not want.ended:
            want.passed_on = True
            self._tell_children(want)

    def _tell_children(self, want: Want) -> None:
        if want.kind is Kind.UPDATE and self._nursery is not None:
            for tree in want.members.values():
                self._notices.tell(self._nursery, want.digest, tree)

    # Anti-entropy ----------------------------------------------------------------------------------------------------

    def _ask_around(self, nursery: trio.Nursery) -> None:
        """Ask a few random members, and parents that said nothing, what they know about the rounds with open wants."""
        others = self._directory.sources(self._directory.others().values())
        peers = [key for key in others if self._directory.reachable(key)]
        now, backlog = trio.current_time(), self._backlog()
        for round in {want.round for want in self._wants.values()}:
            asked = set(random.sample(peers, min(ASK_PEERS, len(peers))))
            for want in self._wants.values():
                if want.round == round and len(asked) < MAX_ASKED and self._chooser.impatient(want, now, backlog):
                    asked.update(self._chooser.parent(want))
            for peer in asked:
                nursery.start_soon(self._ask, peer, round)

    async def _ask(self, peer: bytes, round: int) -> None:
        if self._asking.available_tokens < 1:
            return
        now, backlog = trio.current_time(), self._backlog()
        open_wants = [want for want in self._wants.values() if want.round == round]
        wanted = {want.digest for want in open_wants if self._chooser.impatient(want, now, backlog)}
        request = wire.SinceRequest(round=round, have=self._announcements.bitmap(round), wanted=sorted(wanted)[:256])
        try:
            reply = await in_thread(
                partial(self._links.call, peer, "Since", request, wire.SinceReply, CALL_SECONDS), self._asking
            )
        except CallFailed as error:
            log.debug("asking %s about round %d failed: %s", node_id(peer), round, error)
            return
        for raw in reply.announcements:
            self._take(raw, peer)
        bitmaps: dict[bytes, bytes | None] = {holding.digest: holding.pieces for holding in reply.partial}
        bitmaps.update((digest, None) for digest in reply.held)
        for want in open_wants:
            if want.digest in wanted and want.digest in bitmaps:
                self._offered(want, peer, bitmaps[want.digest])
