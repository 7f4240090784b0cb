"""Weights from a Hugging Face folder into a model that has no memory yet, slice by slice.

Every process reads what it holds, and no more: of a parameter that is a DTensor the slice that its placements leave
here. Files are opened one after the other, and values go from the mapped file to their place without a copy between, so
that beside the model a process needs one file at most, in pages that the system may drop again. Only where a family's
checkpoints keep apart what its modules hold as one tensor (`weight_names`) is that tensor made whole first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from optimizer.layout import LayoutError
from optimizer.sharding import is_sharded, local, spans
from psyche_node.training.errors import ModelError
from psyche_node.training.weight_files import Span, WeightFiles
from psyche_node.training.weight_names import computed_buffers, optional, resolve, twin

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@torch.no_grad()
def load_into(model: nn.Module, folder: Path, device: torch.device) -> None:
    """Put the weights of ``folder`` into ``model``, in the type that each parameter has, and the rest on ``device``.

    ``model`` was built on the meta device, and may be divided already: parameters are plain or DTensors with any
    contiguous placements over any mesh. Each gets memory, once for tied ones, and the slice of it that is held here;
    parameters that have memory are overwritten. Buffers that are not in checkpoints are computed. Talks to no other
    process.

    Raises:
        ModelError: tensors are missing, are too many, or have another shape; the message has the first one's name. A
            file is damaged, or its weights are quantised.
    """
    files, like = WeightFiles(folder), twin(model)
    targets = _targets(model)
    by_name = {name: target for target in targets for name in target.names}
    names = resolve(like, by_name, files.names)
    if names.unexpected:
        raise ModelError(
            f"{folder} has {len(names.unexpected)} tensors that its own config has no place for, the first being "
            f"{sorted(names.unexpected)[0]}. Fetch config.json and weights of the same model"
        )
    filled = _fill_directly(files, by_name, names.direct, device)
    for conversion in names.conversions.values():
        for name, value in conversion.made(files.whole, like).items():
            target = by_name.get(name)
            if target is None:
                raise ModelError(f"{name} is made of {conversion.sources[0][0]}, and has no place in the model")
            _check_shape(folder, name, tuple(value.shape), target)
            _check_kind(folder, name, value, target)
            extents = target.extents()
            target.fill(value[tuple(slice(*extent) for extent in extents)] if extents else value, device)
            filled.add(id(target))
    lacking = sorted(t.names[0] for t in targets if id(t) not in filled and not optional(like, t.names[0]))
    if lacking:
        raise ModelError(
            f"{folder} lacks {len(lacking)} tensors of its own config, the first being {lacking[0]}. Fetch the whole "
            "model"
        )
    if like is not None:
        _put_buffers(model, computed_buffers(like), device)
    _check_nothing_left(model, device)


@dataclass(slots=True, eq=False)
class _Target:
    """One tensor of the model, and everywhere it is: several places if it is tied."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def extents(self) -> list[Span]:
        """What is held here, (first, stop) of every dimension."""
        try:
            return spans(self.names[0], self.tensor)
        except LayoutError as error:
            raise ModelError(str(error)) from error

    def fill(self, values: Tensor, device: torch.device) -> None:
        """Take over what is held here."""
        held = local(self.tensor).detach()
        if held.is_meta:
            self._replace(torch.empty(held.shape, dtype=held.dtype, device=device))
            held = local(self.tensor).detach()
        held.copy_(values.reshape(held.shape))

    def _replace(self, memory: Tensor) -> None:
        old, new = self.tensor, memory
        if is_sharded(old):
            new = _like_sharded(old, memory)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for module, name in self.places:
            held = module._parameters if name in module._parameters else module._buffers
            cast(dict[str, Tensor | None], held)[name] = new
        self.tensor = new


def _like_sharded(old: DTensor, memory: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        memory, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
    )


def _targets(model: nn.Module) -> list[_Target]:
    """The tensors that checkpoints hold."""
    found: dict[int, _Target] = {}
    for path, name, module, tensor, persistent in _tensors(model):
        if persistent:
            target = found.setdefault(id(tensor), _Target(tensor))
            target.names.append(path)
            target.places.append((module, name))
    return list(found.values())


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, Tensor, bool]]:
    """(name, name in its module, module, tensor, whether it is in checkpoints) of parameters and buffers."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                persistent = name not in module._non_persistent_buffers_set
                yield f"{path}.{name}".removeprefix("."), name, module, tensor, persistent


def _fill_directly(
    files: WeightFiles, by_name: dict[str, _Target], direct: dict[str, str], device: torch.device
) -> set[int]:
    """Fill what is in the files as the model holds it; return the ids of the targets that were filled."""
    filled: set[int] = set()
    wanted = {source: target for target, source in direct.items()}
    for path, sources in files.by_file(wanted):
        with files.opened(path) as file:
            for source in sources:
                target = by_name[wanted[source]]
                _check_shape(path, wanted[source], file.shape(source), target)
                extents = target.extents()
                here = all(first < stop for first, stop in extents)
                values = file.read(source, extents) if here else torch.empty(0)
                _check_kind(path, source, values, target)
                if id(target) in filled:
                    _check_tied(path, source, values, target)
                else:
                    target.fill(values, device)
                filled.add(id(target))
    return filled


def _check_shape(path: Path, name: str, shape: tuple[int, ...], target: _Target) -> None:
    if shape != tuple(target.tensor.shape):
        raise ModelError(
            f"{name} in {path} has the shape {shape}, by the config it is {tuple(target.tensor.shape)}. Fetch "
            "config.json and weights of the same model"
        )


def _check_kind(path: Path, name: str, values: Tensor, target: _Target) -> None:
    if target.tensor.is_floating_point() and not values.is_floating_point():
        raise ModelError(
            f"{name} in {path} is {values.dtype}, whole numbers where the model has fractions: quantised weights "
            "cannot be trained. Use a folder in float32, bfloat16 or float16"
        )


def _check_tied(path: Path, source: str, values: Tensor, target: _Target) -> None:
    held = local(target.tensor)
    if not torch.equal(held, values.to(held.device, held.dtype).reshape(held.shape)):
        other = next((name for name in target.names if name != source), target.names[0])
        raise ModelError(
            f"{source} in {path} differs from {other}, with which the config ties it. Set "
            "tie_word_embeddings to false in config.json"
        )


def _put_buffers(model: nn.Module, computed: dict[str, Tensor], device: torch.device) -> None:
    for path, name, module, tensor, persistent in list(_tensors(model)):
        if not persistent and path in computed:
            module._buffers[name] = computed[path].to(device, tensor.dtype)


def _check_nothing_left(model: nn.Module, device: torch.device) -> None:
    for path, name, module, tensor, _ in list(_tensors(model)):
        if tensor.is_meta:
            raise ModelError(f"nothing says what is in {path} of {type(model).__name__} models")
        if name in module._buffers and tensor.device != device:
            module._buffers[name] = tensor.to(device)
