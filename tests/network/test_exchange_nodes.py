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
from exchange_nodes import ExchangeNode, Gate, held, in_trio, introduce, nodes, tree_of, until

from psyche_node.identity import NodeKey
from psyche_node.network.blobs import PIECE_BYTES, blob_digest
from psyche_node.network.download import Download, Tools, finish
from psyche_node.network.fanout import ARITY, Tree
from psyche_node.network.holdings import Partial
from psyche_node.network.messages import Fetched, FetchFailed, Kind
from psyche_node.network.wants import Want
from psyche_node.network.wire import node_pb2 as wire

pytestmark = pytest.mark.timeout(240)


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
