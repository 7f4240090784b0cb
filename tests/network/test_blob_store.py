"""The blob store: its digests, and that no reader ever sees half a blob."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from psyche_node.network.assembly import EXTENDED_PIECES
from psyche_node.network.blobs import (
    PIECE_BYTES,
    Manifest,
    StoreError,
    blob_digest,
    blob_root,
    piece_count,
    piece_digest,
    piece_length,
)
from psyche_node.network.reader import CHECKED_SECONDS, Reader
from psyche_node.network.store import BlobStore

LARGE = bytes(index // 7 % 256 for index in range(3 * PIECE_BYTES + 17))


def manifest_of(data: bytes) -> Manifest:
    pieces = [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]
    return Manifest(len(data), tuple(blake3(piece).digest() for piece in pieces))


def piece(data: bytes, index: int) -> bytes:
    return data[index * PIECE_BYTES : (index + 1) * PIECE_BYTES]


def test_digest_known_answers() -> None:
    """These digests are on chain: they change with a new version of the protocol, or not at all."""
    assert blob_digest(b"").hex() == EMPTY
    assert blob_digest(b"psyche").hex() == SMALL
    assert blob_digest(bytes(PIECE_BYTES + 1)).hex() == TWO_PIECES


EMPTY = "a8aabb6689810e7633052b1fc846b95167f1e8f0b1168a330f715f7120551726"
SMALL = "60388eff7c87ee48cdf24226f78ec6eda331df388f89f802a8e4261ac6ce3031"
TWO_PIECES = "84c142ba2e6fa541eb5e455fcb96bdfabe7fccb52e3d8cd0135de9915e938924"


def test_the_digest_covers_the_length_and_the_order() -> None:
    a, b = bytes(PIECE_BYTES), bytes([1]) * PIECE_BYTES
    assert blob_digest(a + b) != blob_digest(b + a)
    manifest = manifest_of(a + b)
    assert blob_root(manifest.length - 1, manifest.pieces) != manifest.digest
    # A blob whose content is another blob's piece list is not that blob.
    assert blob_digest(b"".join(manifest.pieces)) != manifest.digest


@given(st.integers(0, 5 * PIECE_BYTES))
def test_pieces_tile_the_blob(length: int) -> None:
    assert sum(piece_length(length, index) for index in range(piece_count(length))) == length
    assert all(0 < piece_length(length, index) <= PIECE_BYTES for index in range(piece_count(length)))


def test_put_adopt_path_forget(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    digest, length = store.put(LARGE, 3)
    assert (digest, length) == (blob_digest(LARGE), len(LARGE))
    source = tmp_path / "out.bin"
    source.write_bytes(b"update")
    adopted, length = store.adopt(source, 4)
    assert not source.exists()
    assert (adopted, length) == (blob_digest(b"update"), 6)
    # Another process that looks at the same folder sees both.
    other = BlobStore(tmp_path / "blobs")
    for known, data in ((digest, LARGE), (adopted, b"update")):
        path = other.path(known)
        assert path is not None
        assert path.read_bytes() == data
    store.forget(4)
    assert other.path(digest) is None
    assert other.path(adopted) is not None
    with pytest.raises(StoreError):
        store.put(b"x", -1)


def test_adopt_from_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def cross_device(source: Path, target: Path) -> None:
        if Path(source).name == "out.bin":
            raise OSError(18, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", cross_device)
    store = BlobStore(tmp_path / "blobs")
    (tmp_path / "out.bin").write_bytes(b"update")
    digest, _ = store.adopt(tmp_path / "out.bin", 0)
    path = store.path(digest)
    assert path is not None
    assert path.read_bytes() == b"update"
    assert [entry.name for entry in path.parent.iterdir()] == [digest.hex()]
    assert not (tmp_path / "out.bin").exists()


@given(st.permutations(range(4)), st.data())
def test_an_assembly_takes_only_the_committed_pieces(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], data: st.DataObject
) -> None:
    store = BlobStore(tmp_path_factory.mktemp("store"))
    manifest = manifest_of(LARGE)
    assembly = store.begin(manifest, 1)
    for index in order:
        good = piece(LARGE, index)
        at = data.draw(st.integers(0, len(good) - 1))
        flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        assert not assembly.write(index, flipped)
        assert not assembly.write(index, good[:-1])
        assert not assembly.write(index, good + b"\0")
        assert not assembly.write((index + 1) % 4, good)
        assert store.path(manifest.digest) is None, "a blob is visible before it is complete"
        with pytest.raises(StoreError, match="not complete"):
            assembly.finish()
        assert assembly.write(index, good)
        assert assembly.write(index, good)
    assert not assembly.write(4, b"")
    assert not assembly.write(-1, piece(LARGE, 3))
    path = assembly.finish()
    assert assembly.finish() == path == store.path(manifest.digest)
    assert path.read_bytes() == LARGE
    assembly.abandon()
    assert [entry.name for entry in path.parent.iterdir()] == [manifest.digest.hex()]


def test_what_a_killed_process_brought_is_gone_on_with(tmp_path: Path) -> None:
    store, manifest = BlobStore(tmp_path), manifest_of(LARGE)
    assert store.unfinished(manifest.digest, manifest.length, 0) is None
    killed = store.resume(manifest, 0)
    for index in (3, 0, 1):
        killed.write(index, piece(LARGE, index))
    # The machine went down, too: one piece never reached the disk.
    with killed.part.open("r+b") as file:
        file.seek(PIECE_BYTES)
        file.write(bytes(100))
    assert store.sweep() == 0
    assert store.unfinished(manifest.digest, manifest.length + 1, 0) is None
    assert store.unfinished(manifest.digest, manifest.length, 1) is None
    found = BlobStore(tmp_path).unfinished(manifest.digest, manifest.length, 0)
    assert found == manifest
    assembly = BlobStore(tmp_path).resume(found, 0)
    assert assembly.missing() == [1, 2]
    for index in assembly.missing():
        assert assembly.write(index, piece(LARGE, index))
    assert assembly.finish().read_bytes() == LARGE
    assert [entry.name for entry in tmp_path.glob("*/*")] == [manifest.digest.hex()]


def test_a_file_that_grew_ahead_of_its_pieces_is_gone_on_with(tmp_path: Path) -> None:
    """It ends behind the last piece that is here; what is between them is not taken for pieces."""
    store, data = BlobStore(tmp_path), random.Random(5).randbytes((EXTENDED_PIECES + 3) * PIECE_BYTES + 7)
    manifest = manifest_of(data)
    pieces = [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]
    assembly = store.resume(manifest, 0)
    for index in (1, 4):
        assert assembly.write(index, pieces[index])
    size = assembly.part.stat().st_size
    assert 5 * PIECE_BYTES <= size < len(data)
    assert assembly.part.stat().st_blocks * 512 < 4 * PIECE_BYTES, "what has not come takes no room"
    assembly.abandon(keep=True)
    assembly = BlobStore(tmp_path).resume(manifest, 0)
    assert assembly.missing() == [index for index in range(len(pieces)) if index not in (1, 4)]
    for index in reversed(assembly.missing()):
        assert assembly.write(index, pieces[index])
    assert assembly.finish().read_bytes() == data


def test_a_list_that_does_not_lead_to_the_digest_is_not_used(tmp_path: Path) -> None:
    store, manifest = BlobStore(tmp_path), manifest_of(LARGE)
    store.resume(manifest, 0).abandon(keep=True)
    path = tmp_path / "0" / f"{manifest.digest.hex()}.list"
    good = path.read_bytes()
    for bad in (good[:-1], good[:8], b"", good[:20] + b"x" + good[21:]):
        path.write_bytes(bad)
        assert store.unfinished(manifest.digest, manifest.length, 0) is None
    path.write_bytes(good)
    assert store.unfinished(manifest.digest, manifest.length, 0) == manifest


def test_what_is_kept_of_unfinished_blobs_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(tmp_path)
    blobs = [bytes([number]) * (PIECE_BYTES + 1) for number in range(4)]
    for age, data in enumerate(blobs):
        assembly = store.resume(manifest_of(data), age)
        assembly.write(1, piece(data, 1))
        assembly.abandon(keep=True)
        os.utime(assembly.part, (1000 - age, 1000 - age))
    (tmp_path / "0" / f"{bytes(32).hex()}.list").write_bytes(b"of a blob that is gone")
    monkeypatch.setattr("psyche_node.network.store.MAX_KEPT", 3)
    monkeypatch.setattr("psyche_node.network.store.MAX_KEPT_BYTES", 2 * (PIECE_BYTES + 1))
    assert store.sweep() == 2
    kept = [manifest_of(data).digest.hex() for data in blobs[:2]]
    assert sorted(entry.name for entry in tmp_path.glob("*/*")) == sorted(
        f"{name}.{kind}" for name in kept for kind in ("part", "list")
    )
    store.forget(2)
    assert list(tmp_path.glob("*/*")) == []


def test_the_list_of_a_long_blob_is_kept_and_saves_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psyche_node.network.blobs.LONG_LIST", 3)
    store = BlobStore(tmp_path)
    digest, _ = store.put(LARGE, 0)
    assert Reader(store).manifest(digest) == manifest_of(LARGE)
    monkeypatch.setattr(Manifest, "of_file", None)
    assert Reader(store).manifest(digest) == manifest_of(LARGE)
    store.drop(digest)
    assert list(tmp_path.glob("*/*")) == []


def test_the_manifests_that_are_remembered_are_bounded_by_their_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psyche_node.network.reader._MAX_REMEMBERED_PIECES", 5)
    reader = Reader(BlobStore(tmp_path))
    for number in range(3):
        reader.remember(bytes([number]), Manifest(2 * PIECE_BYTES, (bytes(32), bytes(32))))
    assert list(reader._held) == [b"\1", b"\2"]
    reader.remember(b"\2", Manifest(PIECE_BYTES, (bytes(32),)))
    assert reader._pieces == 3


def test_two_sources_write_one_assembly(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    assembly = store.begin(manifest_of(LARGE), 0)

    def source(backwards: bool) -> None:
        while missing := assembly.missing():
            index = missing[-1 if backwards else 0]
            assert assembly.write(index, piece(LARGE, index))

    threads = [threading.Thread(target=source, args=(backwards,)) for backwards in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert assembly.finish().read_bytes() == LARGE


def test_an_abandoned_download_leaves_nothing_and_stays_abandoned(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    assembly = store.begin(manifest_of(LARGE), 0)
    assembly.write(0, piece(LARGE, 0))
    assembly.abandon()
    for index in range(4):
        assembly.write(index, piece(LARGE, index))
    with pytest.raises(StoreError):
        assembly.finish()
    assert list(tmp_path.glob("*/*")) == []


def test_sweep_removes_unfinished_files_only(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    digest, _ = store.put(b"whole", 2)
    assembly = store.begin(manifest_of(LARGE), 2)
    assert store.sweep() == 1
    assert [entry.name for entry in (tmp_path / "2").iterdir()] == [digest.hex()]
    assembly.abandon()


def test_sweep_leaves_alone_what_a_living_process_is_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor goes on putting blobs into the store while the network process starts anew."""
    store = BlobStore(tmp_path)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as writer:
        monkeypatch.setattr(os, "getpid", lambda: writer.pid)
        assembly = store.begin(manifest_of(b"one piece"), 2)
        monkeypatch.undo()
        assert store.sweep() == 0
        assert assembly.write(0, b"one piece")
        assert assembly.finish().read_bytes() == b"one piece"
        monkeypatch.setattr(os, "getpid", lambda: writer.pid)
        store.begin(manifest_of(LARGE), 2)
        monkeypatch.undo()
    # One that got its name, or went, after the folder was listed is no more there than what this leads to.
    (tmp_path / "2" / "gone.part").symlink_to("nowhere")
    assert store.sweep() == 1


def test_what_a_power_cut_broke_is_dropped_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(tmp_path)
    assert store.sweep() == 0
    whole, _ = store.put(LARGE, 2)
    broken, _ = store.put(LARGE[1:], 2)
    path = store.path(broken)
    assert path is not None
    path.write_bytes(bytes(len(LARGE) - 1))
    assert store.sweep() == 0, "the machine has not gone down since: what was written is there"
    assert store.path(broken) is not None
    monkeypatch.setattr("psyche_node.network.store._boot_id", lambda: "another start")
    assert store.sweep() == 1
    assert store.path(broken) is None
    assert store.path(whole) is not None
    assert store.sweep() == 0


def test_a_piece_that_was_checked_lately_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    hashed: list[int] = []

    def counted(piece: bytes) -> bytes:
        hashed.append(len(piece))
        return piece_digest(piece)

    store = BlobStore(tmp_path)
    reader = Reader(store, clock=lambda: now)
    digest, _ = store.put(LARGE, 0)
    assert reader.manifest(digest) is not None
    monkeypatch.setattr("psyche_node.network.reader.piece_digest", counted)
    for _ in range(2):
        assert list(reader.pieces(digest, range(4))) == [piece(LARGE, index) for index in range(4)]
    assert hashed == []
    now = CHECKED_SECONDS + 1
    for _ in range(2):
        assert list(reader.pieces(digest, [3])) == [piece(LARGE, 3)]
    assert hashed == [17], "once, and then it has been checked again"
    path = store.path(digest)
    assert path is not None
    path.write_bytes(LARGE)
    os.utime(path, (1, 1))
    assert list(reader.pieces(digest, [3])) == [piece(LARGE, 3)]
    assert hashed == [17, 17], "the file is another one"
    path.write_bytes(LARGE[:-1])
    with pytest.raises(StoreError, match="went bad"):
        list(reader.pieces(digest, [3]))


def test_what_rotted_on_disk_is_not_served(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    reader = Reader(store)
    digest, _ = store.put(LARGE, 0)
    assert list(reader.pieces(digest, [3, 0])) == [piece(LARGE, 3), piece(LARGE, 0)]
    path = store.path(digest)
    assert path is not None
    with path.open("r+b") as file:
        file.seek(PIECE_BYTES + 5)
        file.write(b"\xff")
    pieces = iter(reader.pieces(digest, [0, 1]))
    assert next(pieces) == piece(LARGE, 0)
    with pytest.raises(StoreError, match="went bad"):
        next(pieces)
    assert not reader.holds(digest)
    assert reader.manifest(digest) is None


def test_a_file_that_is_not_what_its_name_says_is_not_served(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    digest, _ = store.put(b"good", 0)
    path = store.path(digest)
    assert path is not None
    path.write_bytes(b"evil")
    with pytest.raises(StoreError, match="does not hold what its name says"):
        Reader(store).manifest(digest)
    assert store.path(digest) is None
