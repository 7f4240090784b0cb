"""Attempts to get a wanted blob from one source each, and what follows from how they end. Runs on trio.

A source is read in a thread (``download``). One whose bytes are wrong is banned, one that fails is avoided for a while.
"""

from __future__ import annotations

import logging
import random

import trio

from psyche_node.identity import node_id
from psyche_node.network.announcements import Announcements
from psyche_node.network.blobs import PIECE_BYTES, StoreError
from psyche_node.network.directory import Directory
from psyche_node.network.download import BadBytes, Download, FalseCommitment, NothingYet, Tools
from psyche_node.network.links import CallFailed, Cause
from psyche_node.network.messages import FetchFailed, Kind, Why
from psyche_node.network.quality import Quality
from psyche_node.network.reports import Reporter
from psyche_node.network.threads import in_thread
from psyche_node.network.turns import Rank, Slots, rank
from psyche_node.network.wants import Choice, Want

log = logging.getLogger(__name__)
MAX_DOWNLOADS = 16
MAX_OTHER_DOWNLOADS = 4
# So many at least, and then as many as leave each this rate: on a slow line, many at once would all be too slow.
MIN_DOWNLOADS = 3
BYTES_PER_SECOND_EACH = 512 * 1024
# One that is still receiving the blob itself, and has nothing for this node, may say so this often, in such intervals.
MAX_EMPTY = 20
EMPTY_SECONDS = 0.25
_PEERS_FAULT = (Cause.UNREACHABLE, Cause.IDENTITY, Cause.SLOW, Cause.BROKEN)


class Attempts:
    """The sources that are being read, or wait for a slot."""

    def __init__(
        self, tools: Tools, directory: Directory, announcements: Announcements, quality: Quality, reporter: Reporter
    ) -> None:
        self._tools, self._directory, self._announcements = tools, directory, announcements
        self._quality, self._reporter = quality, reporter
        self._slots = Slots(MAX_DOWNLOADS, lambda: max(MIN_DOWNLOADS, quality.inflow() / BYTES_PER_SECOND_EACH))
        # A model takes hours; updates do not wait for its slot.
        self._other_slots = Slots(MAX_OTHER_DOWNLOADS)
        # Cancelled downloads leave their slot before their thread has ended.
        self._threads = trio.CapacityLimiter(2 * (MAX_DOWNLOADS + MAX_OTHER_DOWNLOADS))

    def rank(self, want: Want) -> Rank:
        """Return how urgent a want is."""
        return rank(want.kind, want.round, self._announcements.current)

    def pass_on(self) -> None:
        """Give slots that have become free to those who wait: the line may allow more than a moment ago."""
        self._slots.pass_on()

    def start(self, nursery: trio.Nursery, want: Want, choice: Choice, found: list[bytes]) -> None:
        """Read a source in a task of ``nursery``; it is appended to ``found`` when the blob is complete."""
        log.debug(
            "%s: from %s (%s, %.1f MB/s)%s", want.name, node_id(choice.source), choice.role,
            self._quality.speed(choice.source) / 1e6, ", as another source" if want.running else "",
        )  # fmt: skip
        want.running[choice.source] = download = Download(self._tools, want, choice)
        nursery.start_soon(self._attempt, want, choice.source, download, found)

    async def _attempt(self, want: Want, source: bytes, download: Download, found: list[bytes]) -> None:
        try:
            slots = self._slots if want.kind is Kind.UPDATE else self._other_slots
            async with slots.slot(self.rank(want), min(1.0, want.length / PIECE_BYTES)):
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
            self.tell(want, f"this node's store failed: {error}")
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
        self.tell(want, f"{node_id(source)}: {error}")

    def _give_up(self, want: Want, error: FalseCommitment) -> None:
        """Nobody can have such a blob, and who told this node so is honest: who committed to it is not."""
        for author in filter(None, map(self._directory.key, want.members)):
            reason = f"{error} ({want.name})"
            self._reporter.rejected("commitment", author, reason, Why.CONTRADICTION, always=True)
        self.tell(want, str(error), final=True)
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
            self.tell(want, f"{'its author' if author else 'another holder'} {node_id(source)}: {error}", error.cause)

    def _wait_for_more(self, want: Want, source: bytes, error: NothingYet) -> None:
        empty = want.empty[source] = want.empty.get(source, 0) + 1
        want.retry_at[source] = trio.current_time() + EMPTY_SECONDS
        if empty >= MAX_EMPTY:
            self._back_off(want, source, CallFailed(Cause.SLOW, f"{error}, {empty} times"))

    def tell(self, want: Want, reason: str, cause: str | None = None, *, final: bool = False) -> None:
        """Report what is in the way of a blob, once per cause."""
        if (cause or reason) not in want.told:
            want.told.add(cause or reason)
            for member in want.members:
                self._reporter.emit(
                    FetchFailed(round=want.round, member=member, digest=want.digest.hex(), reason=reason, final=final)
                )
