"""Wanted blobs, until they are here or forgotten: which sources to read, when, and what becomes of it. Runs on trio.

Each want is a task. Whom to take next is ``wants``' choice; reading a source, and what follows when it fails, is
``attempts``' part, and the want goes on elsewhere. It ends without the blob when it is forgotten, or when a source
shows that there is none: the digest is that of a blob of another length.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import trio

from psyche_node.identity import node_id
from psyche_node.network.announcements import Announcements
from psyche_node.network.asking import Asking
from psyche_node.network.attempts import Attempts
from psyche_node.network.blobs import PIECE_BYTES, StoreError, piece_count
from psyche_node.network.bulk.lanes import Lanes
from psyche_node.network.directory import Directory
from psyche_node.network.download import Tools, finish, open_plan
from psyche_node.network.fanout import Tree
from psyche_node.network.holdings import Holdings
from psyche_node.network.links import Links
from psyche_node.network.messages import Fetched, Kind
from psyche_node.network.notices import EarlyOffers, Notices
from psyche_node.network.pieces import unpack
from psyche_node.network.quality import Quality
from psyche_node.network.reader import Reader
from psyche_node.network.reports import Reporter
from psyche_node.network.store import BlobStore
from psyche_node.network.threads import in_thread
from psyche_node.network.wants import Chooser, Want

log = logging.getLogger(__name__)
# A source that has sent nothing for so long, and two pieces' usual time, is given up.
STALL_SECONDS = 10.0
ASK_EVERY = 1.0


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
        self._store, self._reader, self._holdings = store, reader, holdings
        self._lanes, self._directory, self._quality, self._reporter = lanes, directory, quality, reporter
        self._wants: dict[tuple[int, bytes, int], Want] = {}
        self._early = EarlyOffers()
        self._notices = Notices(links, directory, quality)
        self._tools = Tools(store, reader, holdings, links, lanes, quality, self._begun_in_thread, self._hurry)
        self._attempts = Attempts(self._tools, directory, announcements, quality, reporter)
        self._chooser = Chooser(directory, quality, self._busy)
        self._asking = Asking(
            links,
            directory,
            announcements,
            self._chooser,
            self._wants.values(),
            self._backlog,
            take_announcement,
            self._offered,
        )
        self._looking = trio.CapacityLimiter(4)
        self.tree: type[Tree] = Tree
        """The shape in which updates are passed on; all nodes have the same."""
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._ask_now = trio.Event()

    async def run(self) -> None:
        """Work on wants until cancelled."""
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:
                await self._ask_now.wait()
                self._ask_now = trio.Event()
                # Sources usually say what they have within this time, and then there is nothing to ask.
                await trio.sleep(ASK_EVERY / 4)
                while self._wants:
                    self._asking.ask_around(nursery)
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
                    self._attempts.start(attempts, want, choice, found)
                if not want.running and not self._directory.sources(self._directory.others().values()):
                    self._attempts.tell(want, "no member that could serve it has an address yet")
                self._attempts.pass_on()
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

    def _busy(self, source: bytes, want: Want) -> int:
        """Return how many downloads from a peer are running, or wait for a slot, that are as urgent as this want."""
        urgency = self._attempts.rank(want)
        return sum(source in other.running and self._attempts.rank(other) <= urgency for other in self._wants.values())

    def _backlog(self) -> float:
        """Return how many seconds everything that is wanted should take, at the rate of the last seconds."""
        rate = max(self._quality.inflow(), self._quality.usual())
        return sum(want.bytes_left for want in self._wants.values()) / rate

    # Passing on ------------------------------------------------------------------------------------------------------

    def _hurry(self) -> bool:
        return any(want.kind is Kind.UPDATE and want.running for want in list(self._wants.values()))

    def _begun_in_thread(self, want: Want) -> None:
        assert self._token is not None
        self._token.run_sync_soon(self._begun, want)

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
