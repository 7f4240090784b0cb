"""From nothing, or a user's file, to a tokenizer and a prepared folder, kept by content so that it is done once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from psyche_node.data.agreement import Rendering, rendering_of
from psyche_node.data.errors import DataError
from psyche_node.data.files import sha256_file, write_atomically
from psyche_node.data.locate import find_files
from psyche_node.data.manifest import Manifest
from psyche_node.data.prepare import prepare
from psyche_node.data.rendering import find_template
from psyche_node.data.skipping import Skips
from psyche_node.data.stdlib_chat import WALK, build_stdlib_chat
from psyche_node.data.tokenizer import SPECIAL, train_tokenizer
from psyche_node.folder_files import CONFIG, MANIFEST, TEMPLATE, TOKENIZER


@dataclass(frozen=True, slots=True)
class DataFolders:
    """Where a run's data is: the files of samples (none if prepared), tokenizer, packed folder and its manifest.

    ``rendering``: the template that the data was rendered with, and a warning if it is not that of ``tokenizer``.
    ``skipped``: the bad samples that were passed over, a line for each reason. ``notes``: what of a folder or
    data set was passed over, and the SHA-256 of what was fetched. ``warnings``: those of `prepare`.
    """

    files: tuple[Path, ...]
    tokenizer: Path
    packed: Path
    manifest: Manifest
    rendering: Rendering
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def build_data(
    cache: Path,
    *,
    source: str | None = None,
    tokenizer: Path | None = None,
    vocabulary: int = 2048,
    sequence_length: int = 256,
    heldout: float = 0.05,
    seed: int = 0,
    template: str | None = None,
    skip_bad: int | None = 0,
) -> DataFolders:
    """Return the data for a run, building what ``cache`` does not hold yet.

    ``source`` is what `find_files` takes, or a prepared folder; without it: the chat about the standard library.
    Without ``tokenizer``: one trained on the data. ``template`` is that of `Encoder`, and ``skip_bad`` the limit of
    `Skips`. What is built is kept under a hash of everything that it depends
    on, so nothing in ``cache`` is ever stale.

    Raises:
        DataError: see ``prepare``, ``train_tokenizer`` and ``build_stdlib_chat``.
    """
    if source is not None and (Path(source) / MANIFEST).is_file():
        return _prepared(Path(source), tokenizer, sequence_length, template)
    notes = list[str]()
    files = [_stdlib(cache)] if source is None else find_files(source, cache / "downloads", note=notes.append)
    code = _code_digest()
    content = [sha256_file(path) for path in files]
    chosen = None if template is None else find_template(template)
    if tokenizer is None:
        if chosen is not None and (missing := sorted(chosen.controls - set(SPECIAL))):
            raise DataError(
                f"{chosen.where} is made of {', '.join(missing)}, and the tokenizer that is trained on the data has "
                "no such tokens. Name a model folder whose tokenizer has them, or another template"
            )
        key = _key("tokenizer", code, content, vocabulary)
        tokenizer = _once(cache, key, CONFIG, lambda out: train_tokenizer(files, vocabulary, out, Skips(skip_bad)))
    parts = [sha256_file(tokenizer / n) for n in _TOKENIZER_FILES if (tokenizer / n).is_file()]
    source_of_template = None if chosen is None else chosen.source
    key = _key("packed", code, content, parts, sequence_length, heldout, seed, source_of_template, skip_bad)
    folder = tokenizer

    def build(out: Path) -> None:
        skips = Skips(skip_bad)
        said = list[str]()
        prepare(files, folder, out, sequence_length, heldout, seed, template=template, skips=skips, warn=said.append)
        found = {"skipped": [str(reason) for reason in skips.reasons], "warnings": said}
        write_atomically(out / _FOUND, json.dumps(found).encode())

    packed = _once(cache, key, MANIFEST, build)
    found = json.loads((packed / _FOUND).read_bytes())
    skipped, warnings = tuple(found["skipped"]), tuple(found["warnings"])
    manifest = Manifest.read(packed)
    return DataFolders(
        tuple(files), tokenizer, packed, manifest, Rendering(template, None), skipped, tuple(notes), warnings
    )


def _prepared(folder: Path, tokenizer: Path | None, sequence_length: int, template: str | None) -> DataFolders:
    manifest = Manifest.read(folder)
    if tokenizer is None:
        raise DataError(f"{folder} is prepared, for a tokenizer of its own. Name the model folder that has it")
    rendering = rendering_of(folder, manifest, tokenizer, template)
    if rendering is None:
        raise DataError(
            f"{folder} was prepared with another tokenizer than that of {tokenizer}, or with a chat template that is "
            "not beside its manifest. Name the model that it was prepared for"
        )
    if manifest.sequence_length != sequence_length:
        raise DataError(
            f"{folder} was prepared with sequences of {manifest.sequence_length} tokens, and the settings ask for "
            f"{sequence_length}. Leave `--sequence-length` away, and the folder's is taken; or prepare the data again, "
            f"with `psyche-node data prepare --sequence-length {sequence_length}`"
        )
    return DataFolders((), tokenizer, folder, manifest, rendering)


def cache_folder() -> Path:
    """Where built and fetched data is kept between runs, by content: XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "psyche-node"


_FOUND = "found.json"
_TOKENIZER_FILES = (TOKENIZER, CONFIG, TEMPLATE)


def _stdlib(cache: Path) -> Path:
    key = _key("chat", sha256_file(WALK), sys.version, sys.prefix, sys.base_prefix)
    folder = _once(cache, key, "stdlib.jsonl", lambda out: build_stdlib_chat(out / "stdlib.jsonl"))
    return folder / "stdlib.jsonl"


def _once(cache: Path, key: str, last: str, build: Callable[[Path], object]) -> Path:
    """Return ``cache/key``, building it in a folder beside it first; two processes may do so at the same time."""
    folder = cache / key
    if (folder / last).is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=cache))
    try:
        build(temporary)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not (folder / last).is_file():  # not a race that another process won
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _key(kind: str, *parts: object) -> str:
    return f"{kind}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}"


def _code_digest() -> str:
    """A digest of this package: a new version builds its own data."""
    state = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()
