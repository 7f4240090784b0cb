"""What was committed to and what there is: lists of pieces, their pages, and digests with another length or author."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing
from exchange_nodes import Gate, held, in_trio, nodes, until

from psyche_node.network.blobs import PIECE_BYTES, Manifest, blob_digest, piece_count, piece_digest, write_list
from psyche_node.network.messages import Fetched, FetchFailed, Kind
from psyche_node.network.store import BlobStore

pytestmark = pytest.mark.timeout(240)


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
