"""The safetensors of a Hugging Face folder: which tensor is in which file, and slices of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from psyche_node.training.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Span = tuple[int, int]


class WeightFiles:
    """What a folder holds. Nothing is read but names, until a file is opened.

    Raises ModelError if there are no weights as safetensors, or the index cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        single, index = folder / SINGLE, folder / INDEX
        if single.is_file():  # of a folder that has both, transformers takes this one
            with _opened(single) as file:
                self._file_of = dict.fromkeys(file.keys(), single)
        elif index.is_file():
            self._file_of = self._indexed(index)
        else:
            other = next(iter(sorted(folder.glob("*.bin"))), None)
            raise ModelError(
                f"{folder} cannot be loaded: it has no {SINGLE} and no {INDEX}"
                + (f". Save {other.name} as safetensors first" if other else ". Fetch the whole model")
            )

    @property
    def names(self) -> list[str]:
        """Names of the tensors, as in the files."""
        return list(self._file_of)

    def by_file(self, names: Iterable[str]) -> Iterator[tuple[Path, list[str]]]:
        """Group tensors by the file they are in, so that each file is opened once."""
        groups: dict[Path, list[str]] = {}
        for name in names:
            groups.setdefault(self._file_of[name], []).append(name)
        yield from sorted(groups.items())

    @contextmanager
    def opened(self, path: Path) -> Iterator[OpenFile]:
        """A file, mapped into memory. Raises ModelError if it is damaged."""
        with _opened(path) as file:
            yield OpenFile(path, file)

    def whole(self, name: str) -> Tensor:
        """All of one tensor, copied out of its file."""
        with self.opened(self._file_of[name]) as file:
            return file.read(name, None).clone()

    def _indexed(self, index: Path) -> dict[str, Path]:
        try:
            files = {str(name): str(file) for name, file in json.loads(index.read_bytes())["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read as an index of weights: {error}. Fetch it again") from error
        for name in set(files.values()):
            if Path(name).name != name or not (self._folder / name).is_file():
                raise ModelError(f"{index} names {name}, which is not in {self._folder}. Fetch the whole model")
        return {name: self._folder / file for name, file in files.items()}


class OpenFile:
    """One file of weights."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ModelError if the file lacks the tensor."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, spans: Sequence[Span] | None) -> Tensor:
        """A tensor, or what is between (first, stop) of every dimension: on the CPU, in the type of the file.

        It may point into the mapped file, whose pages are read when they are looked at. Raises ModelError.
        """
        found = self._slice(name)
        try:
            value: Tensor = found[tuple(slice(*span) for span in spans)] if spans else self._file.get_tensor(name)
        except (SafetensorError, IndexError) as error:
            raise ModelError(f"{name} cannot be read from {self._path}: {error}. Fetch the file again") from error
        if value.dtype not in _FLOATS and value.is_floating_point():
            raise ModelError(
                f"{name} in {self._path} is {value.dtype}: weights are read in float32, bfloat16 or float16, and "
                "quantised weights cannot be trained. Use a folder in one of these types"
            )
        return value

    def _slice(self, name: str) -> Any:
        try:
            return self._file.get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{self._path} has no tensor {name}: {error}. Fetch the file again") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be loaded: {error}. Fetch the file again") from error
    with file:
        yield file
