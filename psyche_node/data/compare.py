"""What differs between two prepared folders, told from their manifests: the first file, and the setting behind it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

from psyche_node.data.errors import DataError, DataMismatch
from psyche_node.data.files import is_url
from psyche_node.data.manifest import MAX_BYTES, Manifest, Shard
from psyche_node.data.shards import check_bytes, check_size
from psyche_node.folder_files import MANIFEST

_SETTINGS = {
    "tokenizer": "tokenizer or chat template (SHA-256)",
    "vocabulary": "vocabulary",
    "pad": "padding token",
    "sequence_length": "sequence length",
    "seed": "seed of the held-out split",
    "heldout_fraction": "held-out fraction",
    "too_long": "treatment of samples that are too long",
    "length_control": "budget for reasoning",
}


def verify(
    folder: Path, against: str | None = None, progress: Callable[[int, int], None] = lambda done, files: None
) -> Manifest:
    """Read every file of ``folder`` and return its manifest. ``progress`` hears how many of the files are done.

    ``against`` is what it should be: the SHA-256 of a manifest in hexadecimal, or a manifest (path, folder or URL).

    Raises:
        DataError: there is no manifest, or none to compare with.
        DataMismatch: names the first file that is missing or differs.
    """
    mine = Manifest.read(folder)
    shards = (*mine.train, *mine.heldout)
    for done, shard in enumerate(shards):
        progress(done, len(shards))
        check_size(folder / shard.file, shard.sequences, mine.form)
        check_bytes(folder / shard.file, shard.sequences, mine.form)
    if against is None:
        return mine
    if re.fullmatch(r"[0-9a-fA-F]{64}", against):
        if (wanted := bytes.fromhex(against)) != mine.digest:
            raise DataMismatch(difference(folder, mine, wanted, ""))
        return mine
    raw, where = read_manifest(against)
    theirs = Manifest.parse(raw, where)
    if theirs.digest != mine.digest:
        told = first_difference(folder, mine, theirs, "the other's")
        raise DataMismatch(f"{folder} is not the data of {where}. {told}")
    return mine


def difference(folder: Path, mine: Manifest, wanted: bytes, published: str) -> str:
    """Return why ``folder``, with the manifest ``mine``, is not the data whose manifest has the SHA-256 ``wanted``.

    ``published`` is what the run says of where its data is. If that is a URL, the owner's manifest is fetched from
    there, which its hash vouches for, and compared.
    """
    head = (
        f"{folder} holds the data {mine.digest.hex()}, but the run trains on {wanted.hex()} (SHA-256 of {MANIFEST}). "
    )
    by_hand = (
        f"To see which file differs, get the run's {MANIFEST} from its owner: `psyche-node data check {folder} "
        f"--against {MANIFEST}`"
    )
    if not is_url(published):
        return head + by_hand
    try:
        raw, where = read_manifest(published)
        if hashlib.sha256(raw).digest() != wanted:
            return f"{head}What is published at {where} is not the run's either. {by_hand}"
        return head + first_difference(folder, mine, Manifest.parse(raw, where))
    except DataError as error:
        return f"{head}The published one could not be compared: {error}. {by_hand}"


def read_manifest(place: str) -> tuple[bytes, str]:
    """Return the bytes of a manifest, and where they are: at a URL or path, of the file or of its folder.

    Raises:
        DataError: they cannot be had.
    """
    if is_url(place):
        from psyche_node.data.download import fetch  # late: seldom needed, and it brings an HTTP client

        url = place if place.endswith(f"/{MANIFEST}") else f"{place.rstrip('/')}/{MANIFEST}"
        return fetch(url, MAX_BYTES), url
    path = Path(place)
    path = path / MANIFEST if path.is_dir() else path
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES), str(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Name a {MANIFEST}, its folder or URL, or its whole SHA-256"
        ) from error


def first_difference(folder: Path, mine: Manifest, theirs: Manifest, whose: str = "the run's") -> str:
    """Return which file of ``folder`` is the first that is not in the other manifest, and what made it so."""
    found = "The files are the same; what is said about them differs"
    for kind, ours, others in (("training", mine.train, theirs.train), ("held-out", mine.heldout, theirs.heldout)):
        at = next((i for i, pair in enumerate(zip_longest(ours, others)) if pair[0] != pair[1]), None)
        if at is not None:
            found = f"The first file that differs is {_named(folder, kind, at, ours, others, whose)}"
            break
    return f"{found}; {_reason(mine, theirs, whose)}. Fetch {whose} folder, or prepare the same files in the same way"


def _named(folder: Path, kind: str, at: int, mine: tuple[Shard, ...], theirs: tuple[Shard, ...], whose: str) -> str:
    place = f"{kind} file {at + 1} of {len(mine)}"
    if at >= len(mine):
        counts = f"there are {len(mine)} {kind} files, {whose} are {len(theirs)}"
        return f"{folder / theirs[at].file}, which is missing: {counts}"
    if at >= len(theirs):
        return f"{folder / mine[at].file} ({place}); {whose} are {len(theirs)}"
    return f"{folder / mine[at].file} ({place}); {whose} is {theirs[at].file}"


def _reason(mine: Manifest, theirs: Manifest, whose: str) -> str:
    for name, words in _SETTINGS.items():
        ours, others = getattr(mine, name), getattr(theirs, name)
        if ours != others:
            return f"the {words} is {ours}, {whose} {others}"
    for at, (ours, others) in enumerate(zip_longest(mine.sources, theirs.sources), start=1):
        if ours is None or others is None:
            return f"it was made from {len(mine.sources)} files, {whose} from {len(theirs.sources)}"
        if ours.sha256 != others.sha256:
            return f"source file {at} of {len(mine.sources)} has SHA-256 {ours.sha256}, {whose} {others.sha256}"
    return "settings and source files are the same, so another version of the software or of a library made it"
