"""The blob store: its digests, and that no reader ever sees half a blob."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from psyche_node.network.store import (
    PIECE_BYTES,
    BlobStore,
    Manifest,
    Reader,
    StoreError,
    blob_digest,
    blob_root,
    piece_count,
    piece_length,
)

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


def test_missing_runs_from_both_ends(tmp_path: Path) -> None:
    assembly = BlobStore(tmp_path).begin(manifest_of(LARGE), 0)
    assert assembly.missing(16) == assembly.missing(16, last=True) == (0, 4)
    assert assembly.missing(3) == (0, 3)
    assert assembly.missing(3, last=True) == (1, 3)
    assembly.write(1, piece(LARGE, 1))
    assert assembly.missing(16) == (0, 1)
    assert assembly.missing(16, last=True) == (2, 2)
    assembly.abandon()
    assert list(tmp_path.glob("*/*")) == []


def test_two_sources_write_one_assembly(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    assembly = store.begin(manifest_of(LARGE), 0)

    def source(backwards: bool) -> None:
        while (run := assembly.missing(1, last=backwards))[1]:
            assert assembly.write(run[0], piece(LARGE, run[0]))

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
