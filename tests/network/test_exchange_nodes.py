"""The exchange between real gRPC servers on loopback: who serves whom, and what dead, lying and slow nodes cost."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from exchange_nodes import ExchangeNode, in_trio, introduce, nodes, tree_of

from psyche_node.identity import NodeKey
from psyche_node.network.blobs import PIECE_BYTES, Manifest, blob_digest, piece_count, piece_digest, write_list
from psyche_node.network.download import Download, Tools, finish
from psyche_node.network.fanout import ARITY, Tree
from psyche_node.network.guard import MAX_STREAMS
from psyche_node.network.holdings import Holdings, Partial
from psyche_node.network.links import CallFailed, Cause
from psyche_node.network.messages import Fetched, FetchFailed, Kind
from psyche_node.network.reader import Reader
from psyche_node.network.store import BlobStore
from psyche_node.network.uploads import SLACK_BYTES
from psyche_node.network.wants import Want
from psyche_node.network.wire import node_pb2 as wire

pytestmark = pytest.mark.timeout(240)


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that no event tells of."""
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.01)


def held(node: ExchangeNode, digest: bytes) -> int:
    """Return how many pieces a node has of a blob that it is receiving."""
    partial = node.holdings.partial(digest)
    return 0 if partial is None else int.from_bytes(partial.bitmap(), "little").bit_count()


class Gate:
    """Lets a node serve the first ``count`` pieces of blobs, and makes it stop at any other until opened."""

    def __init__(self, holdings: Holdings, count: int) -> None:
        self._count = count
        self._opened = threading.Event()
        self._pieces = holdings.pieces
        holdings.pieces = self._gated  # type: ignore[method-assign]

    def _gated(self, digest: bytes, run: range) -> Iterator[bytes]:
        for index, piece in zip(run, self._pieces(digest, run), strict=False):
            if index >= self._count:
                self._opened.wait(60)
            yield piece

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let nodes wait for their parent in the tree, and for whoever brings something, as long as it takes.

    Otherwise a slow machine decides who asks another one as well, and how often a piece is sent.
    """

    def wait(*made: ExchangeNode) -> None:
        monkeypatch.setattr("psyche_node.network.wants.HEDGE_SECONDS", 1e9)
        for node in made:
            monkeypatch.setattr(node.fetcher._chooser, "patience", lambda want, backlog: 1e9)

    return wait


@in_trio
async def test_each_node_passes_an_update_on_to_two_at_most(tmp_path: Path, waiting: Callable[..., None]) -> None:
    data = os.urandom(2 * PIECE_BYTES + 77)
    async with nodes(tmp_path, 8) as made:
        waiting(*made)
        digest = made[0].put(data, 1)
        for node in made[1:]:
            node.fetcher.want(1, 0, digest, len(data))
        for node in made[1:]:
            await node.fetched(digest)
            assert node.store.path(digest).read_bytes() == data  # type: ignore[union-attr]
        tree = tree_of(made, 1)
        by_key = {node.key.public: node for node in made}
        assert {key: by_key[key].uploaded() for key in tree.order} == {
            key: len(tree.children(key)) * len(data) for key in tree.order
        }


@in_trio
async def test_a_dead_and_a_lying_node_in_the_tree_cost_two_copies_more_each(
    tmp_path: Path, waiting: Callable[..., None]
) -> None:
    """Both of the author's children are bad. Their children come to the author; everybody else is served as before."""
    data = os.urandom(PIECE_BYTES + 77)
    keys = [NodeKey.generate() for _ in range(8)]
    tree = Tree(1, keys[0].public, [key.public for key in keys])
    dead, liar = (next(n for n, key in enumerate(keys) if key.public == child) for child in tree.order[1:3])
    below = {*tree.children(keys[dead].public), *tree.children(keys[liar].public)}
    async with nodes(tmp_path, 8, {liar: ["tamper"]}, keys) as made:
        waiting(*(node for node in made if node.key.public not in below))
        made[dead].kill()
        for number, node in enumerate(made):
            if number not in (0, dead):
                node.fetcher.want(1, 0, blob_digest(data), len(data))
        digest = made[0].put(data, 1)
        for number, node in enumerate(made):
            if number not in (0, dead):
                await node.fetched(digest)
                assert node.store.path(digest).read_bytes() == data  # type: ignore[union-attr]
        for number, node in enumerate(made):
            if keys[number].public in tree.children(keys[liar].public):
                assert [event.peer for event in node.rejected()] == [keys[liar].node_id]
                assert node.directory.banned(keys[liar].public)
        assert made[0].uploaded() <= (1 + 2 * ARITY) * len(data)


@in_trio
async def test_a_blob_is_passed_on_while_it_arrives(tmp_path: Path, waiting: Callable[..., None]) -> None:
    data = os.urandom(8 * PIECE_BYTES)
    async with nodes(tmp_path, 4) as made:
        tree = tree_of(made, 1)
        by_key = {node.key.public: node for node in made}
        middle, last = by_key[tree.order[1]], by_key[tree.order[3]]
        waiting(middle, last)
        gate = Gate(made[0].holdings, 3)
        digest = made[0].put(data, 1)
        for node in (middle, last):
            node.fetcher.want(1, 0, digest, len(data))
        await until(lambda: held(last, digest) == 3)
        assert middle.holdings.partial(digest) is not None, "the one in the middle is not complete itself"
        assert middle.uploaded() == 3 * PIECE_BYTES
        gate.open()
        await last.fetched(digest)
        await middle.fetched(digest)
        assert last.store.path(digest).read_bytes() == data  # type: ignore[union-attr]
        assert middle.uploaded() >= 3 * PIECE_BYTES


@in_trio
async def test_a_parent_that_stops_in_the_middle_is_gone_around(tmp_path: Path) -> None:
    data = os.urandom(4 * PIECE_BYTES)
    async with nodes(tmp_path, 4) as made:
        tree = tree_of(made, 1)
        by_key = {node.key.public: node for node in made}
        parent, child = by_key[tree.order[1]], by_key[tree.order[3]]
        gate = Gate(parent.holdings, 1)
        digest = made[0].put(data, 1)
        parent.fetcher.want(1, 0, digest, len(data))
        child.fetcher.want(1, 0, digest, len(data))
        assert (await child.fetched(digest)).source != parent.key.node_id
        gate.open()


@in_trio
async def test_a_download_goes_on_after_kill_9(tmp_path: Path) -> None:
    """A process of its own brings half of a blob and is killed; the next one brings the other half and no more."""
    data = os.urandom(12 * PIECE_BYTES + 5)
    child = NodeKey.generate()
    script = Path(__file__).with_name("exchange_child.py")
    async with nodes(tmp_path, 1) as (author,):
        author.directory.set_members({0: author.key.public, 1: child.public})
        gate = Gate(author.holdings, 6)
        digest = author.put(data, 1, Kind.MODEL)
        address, leaf = author.record.grpc_address, author.leaf.der_hash.hex()
        command = [sys.executable, str(script), str(tmp_path / "child"), child.seed.hex(), author.key.public.hex()]
        command += [address, leaf, digest.hex(), str(len(data))]
        folder = tmp_path / "child" / "1"
        killed = await trio.lowlevel.open_process(command)
        part = folder / f"{digest.hex()}.part"
        # The file is longer than what is in it.
        await until(lambda: part.exists() and part.stat().st_blocks * 512 >= 6 * PIECE_BYTES)
        killed.kill()
        await killed.wait()
        gate.open()
        with trio.fail_after(60):
            again = await trio.run_process(command, capture_stdout=True)
        assert int(again.stdout) == len(data) - 6 * PIECE_BYTES
        assert (folder / digest.hex()).read_bytes() == data
        assert [path.name for path in folder.iterdir()] == [digest.hex()]


@in_trio
async def test_what_ends_in_order_is_kept_too_and_what_is_forgotten_is_not(tmp_path: Path) -> None:
    data = os.urandom(4 * PIECE_BYTES)
    async with nodes(tmp_path, 2) as made:
        gate = Gate(made[0].holdings, 2)
        digest = made[0].put(data, 1)
        for round in (1, 2):
            made[1].fetcher.want(round, 0, digest, len(data))
        await until(lambda: len(list((tmp_path / "1").glob("*/*.part"))) == 2)
        made[1].fetcher.forget(2)
        await until(lambda: not list((tmp_path / "1" / "1").glob("*")))
        gate.open()
        # Nothing is served any more, so that the second want stays open until the end.
        made[0].store.drop(digest)
        made[0].kill()
        complete = made[1].store.path(digest) is not None
    assert complete or len(list((tmp_path / "1" / "2").glob("*"))) == 2


@in_trio
async def test_a_model_comes_from_several_holders_at_once_each_a_different_part(tmp_path: Path) -> None:
    """No holder may finish before all three are at work: what each brings, it brings beside the others."""
    data = os.urandom(24 * PIECE_BYTES)
    async with nodes(tmp_path, 4) as made:
        together = threading.Barrier(3, timeout=60)
        for node in made[:3]:
            pieces, first = node.holdings.pieces, threading.Event()

            def gated(
                digest: bytes,
                run: range,
                pieces: Callable[[bytes, range], Iterator[bytes]] = pieces,
                first: threading.Event = first,
            ) -> Iterator[bytes]:
                for number, piece in enumerate(pieces(digest, run)):
                    # The first piece goes out at once: the others are asked when there is a list of pieces.
                    if number == 1 and not first.is_set():
                        first.set()
                        together.wait()
                    yield piece

            node.holdings.pieces = gated  # type: ignore[method-assign]
        digests = {node.put(data, 1, Kind.MODEL) for node in made[:3]}
        (digest,) = digests
        made[3].fetcher.want(1, 0, digest, len(data), Kind.MODEL)
        await made[3].fetched(digest)
        assert made[3].store.path(digest).read_bytes() == data  # type: ignore[union-attr]
        uploaded = [node.uploaded() for node in made[:3]]
        assert all(uploaded)
        # They look slow to each other while they wait, so some of the last pieces come twice, but not all.
        assert sum(uploaded) < 2 * len(data)


@in_trio
async def test_a_blob_is_here_when_it_has_its_name_and_not_when_its_last_piece_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two sources ends with a piece missing, and is looked at when the other one has brought it."""
    data = os.urandom(8 * PIECE_BYTES)
    ended, named = threading.Event(), threading.Event()

    def last(tools: Tools, want: Want, partial: Partial) -> None:
        assert named.wait(60)
        finish(tools, want, partial)

    async with nodes(tmp_path, 3) as made:
        late = made[1].key.public

        class Late(Download):
            def run(self) -> bool:
                if self._source != late or ended.is_set():
                    return super().run()
                while self._want.plan is None or self._want.plan.left:
                    time.sleep(0.001)
                ended.set()
                return False

        monkeypatch.setattr("psyche_node.network.attempts.Download", Late)
        monkeypatch.setattr("psyche_node.network.download.finish", last)
        digest = {node.put(data, 1, Kind.MODEL) for node in made[:2]}.pop()
        made[2].fetcher.want(1, 0, digest, len(data), Kind.MODEL)
        await until(ended.is_set)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert not [event for event in made[2].events if isinstance(event, Fetched)]
        named.set()
        await made[2].fetched(digest)
        assert made[2].store.path(digest) is not None


@in_trio
async def test_a_push_ends_a_download_that_stands_still_and_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psyche_node.network.fetcher.STALL_SECONDS", 1e9)
    data = os.urandom(4 * PIECE_BYTES)
    async with nodes(tmp_path, 2) as made:
        gate = Gate(made[0].holdings, 2)
        digest = made[0].put(data, 1)
        made[1].fetcher.want(1, 0, digest, len(data))
        await until(lambda: held(made[1], digest) == 2)
        made[1].store.put(data, 1)
        made[1].fetcher.arrived(digest, made[0].key.public)
        await made[1].fetched(digest)
        gate.open()
        await until(lambda: not made[1].fetcher._wants)
        assert [path.name for path in (tmp_path / "1" / "1").iterdir()] == [digest.hex()]


@in_trio
async def test_two_sources_that_stand_still_do_not_keep_a_third_from_bringing_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psyche_node.network.fetcher.STALL_SECONDS", 1e9)
    # More than one of them asks for ahead, so that both have something to bring.
    data = os.urandom(40 * PIECE_BYTES)
    async with nodes(tmp_path, 4) as made:
        for node in made[:2]:
            digest, _ = node.store.put(data, 1)
        gates = [Gate(node.holdings, 1) for node in made[:2]]
        for node in made[:2]:
            made[3].fetcher.invited(digest, node.key.public)
        made[3].fetcher.want(1, 0, digest, len(data))
        (want,) = made[3].fetcher._wants.values()
        await until(lambda: set(want.running) == {node.key.public for node in made[:2]})
        made[2].store.put(data, 1)
        # They stand still for longer than this.
        assert (await made[3].fetched(digest, 45.0)).source == made[2].key.node_id
        (given_up,) = [node for node in made if made[3].quality.avoided(node.key.public)]
        assert given_up in made[:2]
        for gate in gates:
            gate.open()


@in_trio
async def test_a_source_that_gets_the_blob_by_and_by_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends every stream after a piece or none, more often than it may have nothing in a row."""
    monkeypatch.setattr("psyche_node.network.attempts.MAX_EMPTY", 6)
    monkeypatch.setattr("psyche_node.network.attempts.EMPTY_SECONDS", 0.02)
    data = os.urandom(8 * PIECE_BYTES)
    async with nodes(tmp_path, 2) as made:
        # Over one way only, or how many calls come at a time would depend on when the other one is there.
        made[0].bulk_address = ""
        introduce(made)
        pieces, calls = made[0].holdings.pieces, itertools.count()

        def slowly(digest: bytes, run: range) -> Iterator[bytes]:
            return itertools.islice(pieces(digest, run), int(not next(calls) % 5))

        made[0].holdings.pieces = slowly  # type: ignore[method-assign]
        digest = made[0].put(data, 1)
        made[1].fetcher.want(1, 0, digest, len(data))
        await made[1].fetched(digest)
        assert not [event for event in made[1].events if isinstance(event, FetchFailed)]


@in_trio
async def test_who_says_again_that_it_has_a_blob_is_not_asked_the_sooner(tmp_path: Path) -> None:
    async with nodes(tmp_path, 3) as made:
        fetcher, peer, other = made[0].fetcher, made[1].key.public, made[2].key.public
        for node in made[1:]:
            node.kill()
        fetcher.want(1, 0, bytes(32), 1000)
        (want,) = fetcher._wants.values()
        later = want.retry_at[peer] = want.retry_at[other] = 1e9
        want.broken.add(other)
        fetcher.invited(bytes(32), peer)
        assert peer not in want.retry_at, "it did not have it before"
        want.retry_at[peer] = later
        for key in (peer, other):
            fetcher.invited(bytes(32), key)
            assert want.retry_at[key] == later


@in_trio
async def test_the_list_of_a_70_gb_model_comes_in_pages(tmp_path: Path) -> None:
    """The file is a hole, whose first pieces are served; its list leads to the digest, and is longer than a message."""
    length = 70_000 * PIECE_BYTES - 3
    hole = piece_digest(bytes(PIECE_BYTES))
    later = (piece_digest(number.to_bytes(8, "little")) for number in range(8, piece_count(length)))
    manifest = Manifest(length, (*[hole] * 8, *later))
    async with nodes(tmp_path, 2) as made:
        path = tmp_path / "0" / "1" / manifest.digest.hex()
        path.parent.mkdir()
        path.touch()
        os.truncate(path, length)
        write_list(path.with_name(f"{path.name}.list"), manifest)
        gate = Gate(made[0].holdings, 8)
        made[1].fetcher.want(1, 0, manifest.digest, length, Kind.MODEL)
        await until(lambda: held(made[1], manifest.digest) == 8)
        assert BlobStore(tmp_path / "1").unfinished(manifest.digest, length, 1) == manifest
        gate.open()


@in_trio
async def test_a_page_that_is_too_short_or_a_list_that_is_another_blobs_bans_its_sender(tmp_path: Path) -> None:
    data, other = os.urandom(3 * PIECE_BYTES), os.urandom(3 * PIECE_BYTES)
    for number, wrong in enumerate(
        (Manifest.of_file, lambda _: Manifest(len(data), (bytes(32),) * 2), lambda _: Manifest(1, (bytes(32),)))
    ):
        async with nodes(tmp_path / str(number), 2) as made:
            digest = made[0].put(data, 1)
            (tmp_path / "other").write_bytes(other)
            manifest = wrong(tmp_path / "other")
            made[0].holdings.manifest = lambda _, manifest=manifest: manifest  # type: ignore[method-assign,misc]
            made[1].fetcher.want(1, 0, digest, len(data))
            await until(made[1].rejected)
            (rejected,) = made[1].rejected()
            assert (rejected.what, rejected.peer) == ("manifest", made[0].key.node_id)


@in_trio
async def test_a_commitment_to_another_length_ends_the_want_and_bans_nobody(tmp_path: Path) -> None:
    """The author commits to a digest with a length that is not its blob's. Who holds that blob is honest."""
    cases = (
        (3 * PIECE_BYTES, 2 * PIECE_BYTES),
        (3 * PIECE_BYTES, 4 * PIECE_BYTES + 1),
        (3 * PIECE_BYTES, PIECE_BYTES),
        (3 * PIECE_BYTES, 500),
        (60_000, 59_993),
        (60_000, 3 * PIECE_BYTES),
    )
    async with nodes(tmp_path, 4) as made:
        for round, (length, committed) in enumerate(cases, 1):
            data = os.urandom(length)
            for node in made[1:3]:
                digest = node.put(data, round)
            made[3].fetcher.want(round, 0, digest, committed)
            failed = await made[3].event(
                lambda event, digest=digest: (
                    isinstance(event, FetchFailed) and event.digest == digest.hex() and event.final
                )  # type: ignore[misc]
            )
            assert f"{committed} bytes were committed to, and the digest is that of {length}" in failed.reason  # type: ignore[attr-defined]
            await until(lambda: not made[3].fetcher._wants)
        assert {(event.what, event.member) for event in made[3].rejected()} == {("commitment", 0)}
        assert not [node for node in made if made[3].directory.banned(node.key.public)]


@in_trio
async def test_an_update_that_another_member_committed_to_as_well_is_fetched_for_both(tmp_path: Path) -> None:
    """Member 1 copied the digest of member 0 from the chain, and its want comes first."""
    data = os.urandom(1000)
    async with nodes(tmp_path, 3) as made:
        digest = blob_digest(data)
        made[2].fetcher.want(1, 1, digest, len(data))
        made[2].fetcher.want(1, 0, digest, len(data))
        made[0].put(data, 1)
        await until(lambda: not made[2].fetcher._wants)
        await trio.testing.wait_all_tasks_blocked()
        assert {event.member for event in made[2].events if isinstance(event, Fetched)} == {0, 1}


@in_trio
async def test_an_invitation_before_the_want_is_remembered_and_a_false_one_does_little_harm(tmp_path: Path) -> None:
    data = os.urandom(60_000)
    async with nodes(tmp_path, 4) as made:
        digest = blob_digest(data)
        tree = tree_of(made, 1)
        by_key = {node.key.public: node for node in made}
        parent, child = by_key[tree.order[1]], by_key[tree.order[3]]
        liar = next(node for node in made[1:] if node not in (parent, child))
        made[0].put(data, 1)
        await trio.to_thread.run_sync(
            lambda: liar.links.call(child.key.public, "Have", wire.HaveRequest(digests=[digest]), wire.HaveReply, 60.0)
        )
        parent.fetcher.want(1, 0, digest, len(data))
        await parent.fetched(digest)
        child.fetcher.want(1, 0, digest, len(data))
        assert (await child.fetched(digest)).source in (parent.key.node_id, made[0].key.node_id)
        assert not liar.uploaded()
        assert not child.directory.banned(liar.key.public), "it may have lost it since"


@in_trio
async def test_a_source_that_takes_one_call_at_a_time_is_no_failure(tmp_path: Path) -> None:
    data = os.urandom(32 * PIECE_BYTES)
    async with nodes(tmp_path, 2) as made:
        made[0].service.pieces._uploads._streams._per_peer = 1
        digest = made[0].put(data, 1)
        made[1].fetcher.want(1, 0, digest, len(data))
        await made[1].fetched(digest)
        assert not [event for event in made[1].events if isinstance(event, FetchFailed)]
        assert made[0].uploaded() == len(data)


def take(node: ExchangeNode, source: ExchangeNode, digest: bytes, first: int, count: int) -> int:
    return sum(len(piece) for piece in node.links.fetch(source.key.public, digest, first, count, 60.0))


@in_trio
async def test_a_peer_that_fetches_the_same_again_and_again_is_stopped(
    tmp_path: Path,
) -> None:
    async with nodes(tmp_path, 3) as made:
        digest = made[0].put(os.urandom(16 * PIECE_BYTES), 1)
        taken, cause = 0, None
        while cause is None and taken < 1 << 28:
            try:
                taken += await trio.to_thread.run_sync(take, made[1], made[0], digest, 0, 16)
            except CallFailed as error:
                cause = error.cause
        assert cause is Cause.BUSY
        assert taken == 2 * 16 * PIECE_BYTES + SLACK_BYTES
        assert await trio.to_thread.run_sync(take, made[2], made[0], digest, 0, 16) == 16 * PIECE_BYTES


def test_every_upload_waits_for_pieces_that_are_about_to_come(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    data = os.urandom(3 * PIECE_BYTES)
    manifest = Manifest(
        len(data), tuple(piece_digest(data[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES))
    )
    holdings = Holdings(Reader(store))
    partial = holdings.begin(store.resume(manifest, 0))
    assert partial.write(0, data[:PIECE_BYTES])
    streams = [holdings.pieces(manifest.digest, range(3)) for _ in range(MAX_STREAMS)]
    assert {next(stream) for stream in streams} == {data[:PIECE_BYTES]}
    waiting = threading.Semaphore(0)
    holds = partial.holds

    def told(index: int, seconds: float = 0.0) -> bool:
        if seconds:
            waiting.release()
        return holds(index, 60.0 if seconds else 0.0)

    partial.holds = told  # type: ignore[method-assign]
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda stream=stream: results.append(sum(map(len, stream)))) for stream in streams
    ]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert waiting.acquire(timeout=60)
    for index in (1, 2):
        assert partial.write(index, data[index * PIECE_BYTES : (index + 1) * PIECE_BYTES])
    for thread in threads:
        thread.join(60)
    assert results == [2 * PIECE_BYTES] * MAX_STREAMS
    partial.finish()
    holdings.end(partial)
    assert list(holdings.pieces(manifest.digest, range(2, 3))) == [data[2 * PIECE_BYTES :]]


@in_trio
async def test_updates_that_wait_for_a_slot_go_by_round(tmp_path: Path) -> None:
    """One slot: the oldest round has it, since it was wanted first."""
    async with nodes(tmp_path, 2) as made:
        made[1].fetcher._attempts._slots._free = 1
        made[1].announcements.reached(5)
        gate = Gate(made[0].holdings, 0)
        digests = {}
        for round in (3, 4, 5):
            digests[round] = digest = made[0].put(os.urandom(1000), round)
            made[1].fetcher.want(round, 0, digest, 1000)
            await until(lambda digest=digest: made[1].fetcher._wanted(digest)[0].running)  # type: ignore[misc]
        gate.open()
        for digest in digests.values():
            await made[1].fetched(digest)
        order = [event.round for event in made[1].events if isinstance(event, Fetched)]
        assert order == [3, 5, 4]


@in_trio
async def test_an_update_does_not_wait_for_a_model(tmp_path: Path) -> None:
    async with nodes(tmp_path, 2) as made:
        made[1].fetcher._attempts._slots._free = made[1].fetcher._attempts._other_slots._free = 1
        gate = Gate(made[0].holdings, 1)
        model = made[0].put(os.urandom(2 * PIECE_BYTES), 1, Kind.MODEL)
        made[1].fetcher.want(1, 0, model, 2 * PIECE_BYTES, Kind.MODEL)
        await until(lambda: held(made[1], model) == 1)
        update = made[0].put(os.urandom(1000), 1)
        made[1].fetcher.want(1, 0, update, 1000)
        await made[1].fetched(update)
        assert held(made[1], model) == 1
        gate.open()
        await made[1].fetched(model)
