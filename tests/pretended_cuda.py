"""A CUDA device that is pretended: tensors say that they are on it, and are computed on the CPU.

So what would break on a GPU breaks here: tensors of two devices in one operation, ones made where they should not be,
numpy arrays of what is on the device. Autocast and autograd take the ways that they take for CUDA. Kernels and their
numbers, streams and graphs are not tried.

As plugins of pytest, ``-p tests.pretended_library -p tests.pretended_cuda``, every test runs so, those that are skipped
without a GPU too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from tests.pretended_library import LIBRARY

NAME = "NVIDIA H200"
FREE = 100 << 30
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
_BETWEEN = {"copy_", "_to_copy", "to"}
_BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
Arguments = tuple[Any, ...]


class OnCuda(torch.Tensor):
    """A tensor on the device, which ``held`` is on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnCuda:
        made: OnCuda = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=CUDA,
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Arguments = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, dict(kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl


def _computed(func: Any, args: Arguments, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.split("::")[1]
    there = any(isinstance(x, OnCuda) for x in tree_leaves((args, kwargs)))
    if there and name not in _BETWEEN:
        _require_one_device(func, (args[0], args[2:]) if name in _BY_INDEX else (args, kwargs))
    devices = [x for x in (*args, kwargs.get("device")) if isinstance(x, torch.device)]
    goes = devices[0].type == "cuda" if devices else there
    held = {**tree_map(_held, kwargs), **({"pin_memory": False} if kwargs.get("pin_memory") else {})}
    out = func(*tree_map(_held, args), **held)
    if not goes:
        return out
    made = tree_map(lambda x: OnCuda(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, made) if there and name not in ("to", "_to_copy") else made


def _held(value: Any) -> Any:
    if isinstance(value, OnCuda):
        return value.held
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


def _require_one_device(func: Any, values: Any) -> None:
    tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
    if apart := [x for x in tensors if not isinstance(x, OnCuda) and x.dim()]:
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {func} takes one of shape {tuple(apart[0].shape)} on "
            f"{apart[0].device}, and others on {CUDA}"
        )


class _Computes(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Arguments = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, dict(kwargs or {}))


class _Makes(TorchFunctionMode):
    """``torch.tensor`` fills the memory of a device without asking a mode."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Arguments = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.tensor and torch.device(given.get("device") or "cpu").type == "cuda":
            return func(*args, **{**given, "device": "cpu"}).to(given["device"])
        return func(*args, **given)


class _Generator(torch.Generator):
    """One for the device is one for the CPU."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


def _moving(plain: Callable[..., Any]) -> Callable[..., Any]:
    """``Module.to`` by new parameters: ones that are moved in place would lose what they hold."""

    def to(module: Any, *args: Any, **kwargs: Any) -> Any:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            return plain(module, *args, **kwargs)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)

    return to


@contextmanager
def pretended() -> Iterator[None]:
    """Within it there is a device."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in _OF_CUDA.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.nn.Module, "to", _moving(torch.nn.Module.to))
        stack.enter_context(_Makes())
        stack.enter_context(_Computes())
        yield


_OF_CUDA: Mapping[str, Callable[..., Any]] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda _: None,
    "get_device_name": lambda *_: NAME,
    "get_device_capability": lambda *_: (9, 0),
    "mem_get_info": lambda *_: (FREE, FREE),
    "memory_reserved": lambda *_: 0,
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
    "synchronize": lambda *_: None,
}

if LIBRARY in os.environ:
    torch.cuda.is_available = lambda: True  # when tests are collected, too

    @pytest.fixture(autouse=True)
    def _on_cuda() -> Iterator[None]:
        with pretended():
            yield
