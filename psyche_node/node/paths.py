"""Whether the files and folders that were typed are there: what can be known at once, and without the chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from psyche_node.folder_files import MANIFEST, MODEL_CONFIG


def missing(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(setting, what is wrong with it) of every path among a node's settings that cannot be used.

    Values that are no paths are passed over: they are somebody else's to complain about.
    """
    found = []
    for name, look in _LOOKS.items():
        given = values.get(name)
        for one in given if isinstance(given, (tuple, list)) else (given,):
            if isinstance(one, (str, Path)):
                found += [(name, wrong) for wrong in look(Path(one))]
    return found


def _folder(path: Path) -> Iterator[str]:
    if path.exists() and not path.is_dir():
        yield f"{path} is a file; name the folder that this node keeps its keys and results in"


def _model(path: Path) -> Iterator[str]:
    yield from _holds(path, MODEL_CONFIG, "a Hugging Face model folder, as the run's owner has published it")


def _data(path: Path) -> Iterator[str]:
    yield from _holds(path, MANIFEST, "a folder that `psyche-node data prepare` has made, or a copy of the run's")


def _wallet(path: Path) -> Iterator[str]:
    if not path.exists():
        yield f"there is no file {path}; make a wallet there with: psyche-admin keys new {path}"


def _task(path: Path) -> Iterator[str]:
    if not path.is_file():
        yield f"there is no file {path}; name a task file, in TOML or JSON"


def _holds(path: Path, file: str, wanted: str) -> Iterator[str]:
    if not path.is_dir():
        yield f"{path} is {'no folder' if path.exists() else 'not there'}; name {wanted}"
    elif not (path / file).is_file():
        yield f"{path} has no {file}; name {wanted}"


_LOOKS: Final[dict[str, Callable[[Path], Iterator[str]]]] = {
    "folder": _folder,
    "model": _model,
    "data": _data,
    "wallet": _wallet,
    "tasks": _task,
}
