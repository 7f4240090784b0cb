"""The optimizer's kernels for CPUs, compiled at installation: same bits as the torch path, many times faster.

They are optional. Without a C compiler the package installs all the same, `available()` is False, `reason()` says why,
and callers use torch and numpy. Calls release the interpreter lock and keep no state, so threads may work on different
slabs at once. What each one computes, to the bit, is defined in kernels.h. numpy only.

Legend: a slab is N consecutive blocks; K coefficients of 4096 are sent per block, in B bytes; T tensors, by number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from optimizer.geometry import PIECE
from optimizer.layout import BLOCK, BlockCode

# PSYCHE_ABI of kernels.h.
_ABI = 3
_ISAS = ("baseline", "avx2", "avx512")

FP32, BF16 = 0, 1


class StaleKernels(RuntimeError):
    """The compiled library is of another version than these sources."""


class Energy(NamedTuple):
    """Sums of squares over a slab's momentum: all of it, and the coefficients that were kept."""

    total: float
    kept: float


@dataclass(frozen=True, slots=True)
class Tensors:
    """Where tensors are: `addresses` (T,) of their storage, 0 for a missing one, and `dtypes` (T,), FP32 or BF16."""

    addresses: NDArray[np.uintp]
    dtypes: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if len(self.addresses) != len(self.dtypes):
            raise ValueError(f"there are {len(self.addresses)} addresses and {len(self.dtypes)} dtypes")
        if not np.isin(self.dtypes, (FP32, BF16)).all():
            raise ValueError("the kernels work on float32 and bfloat16 tensors")


class _Slab(ctypes.Structure):
    _fields_ = [
        (name, kind)
        for name, kind in (
            ("pieces", ctypes.c_void_p),
            ("n", ctypes.c_int64),
            ("count", ctypes.c_int64),
            ("tensors", ctypes.c_int64),
        )
    ]


class _Code(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("topk", "low", "bitmap", "bytes")]


class _Message(ctypes.Structure):
    _fields_ = [("body", ctypes.c_void_p), ("scale", ctypes.c_void_p)]


_P, _I32, _I64, _U32, _F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_float
# struct psyche_kernels of kernels.h, in its order.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "encode": (_P, _P, _P, _P, _F, _F, _P, _U32, _P, _P, _P),
    "add": (_I64, _P, _P, _F, _P),
    "apply": (_P, _P, _P, _P, _I64, _P, _I32, _I32, _P, _P),
    "preview": (_P, _P, _P, _P, _P, _P, _I64, _P, _I32, _P),
    "inverse": (_I64, _P, _I64, _P, _I32, _P),
    "decode": (_I64, _P, _P, _P, _P),
    "validate": (_I64, _P, _P),
    "encode_blocks": (_I64, _P, _P, _P, _P),
    "fingerprint": (_P, _P, _P, _P, _P),
}
_DONE, _MALFORMED = 0, 5
_PROBLEMS = {
    1: "a piece leaves its block, its slab or the list of tensors, or its tensor is missing",
    2: "the sizes of the block code are not those of a layout",
    3: "the number of messages must be between 1 and 32767, the limit on votes not negative",
    4: "the window of the trend must be between 0 and 15",
    5: "indices of a block must be strictly ascending and below 4096",
}


class Kernels:
    """The kernels compiled for one instruction set; get them from `kernels()`. All arrays must be C-contiguous.

    Outputs are written in place. Every method raises ValueError for arrays of another dtype or shape than stated and
    for pieces outside their block. Addresses are trusted.
    """

    def __init__(self, isa: str, table: int) -> None:
        self.isa = isa
        entries = (ctypes.c_void_p * len(_SIGNATURES)).from_address(table)
        self._call = {
            name: ctypes.CFUNCTYPE(ctypes.c_int32, *arguments)(entry)
            for (name, arguments), entry in zip(_SIGNATURES.items(), entries, strict=True)
        }

    def encode(
        self,
        pieces: NDArray[np.void],
        gradients: Tensors,
        momentum: NDArray[np.float32],
        *,
        decay: float,
        rate: float,
        code: BlockCode,
        salt: int,
        body: NDArray[np.uint8],
        scale: NDArray[np.float32],
    ) -> Energy:
        """Update `momentum` (N, 4096) with the gradient, choose a message and take it out: `body` (N, B), `scale` (N,).

        `rate` is the learning rate / 64. A missing gradient counts as zeros.
        """
        count, energy = len(momentum), np.zeros(2)
        self._run(
            "encode",
            _slab(pieces, count, len(gradients.addresses)),
            _at(gradients.addresses, np.uintp),
            _at(gradients.dtypes, np.uint8),
            _into(momentum, np.float32, count, BLOCK),
            decay,
            rate,
            _code(code),
            salt & 0xFFFFFFFF,
            _into(body, np.uint8, count, code.bytes),
            _into(scale, np.float32, count),
            _at(energy, np.float64),
        )
        return Energy(float(energy[0]), float(energy[1]))

    def add(
        self,
        momentum: NDArray[np.float32],
        body: NDArray[np.uint8],
        scale: NDArray[np.float32],
        factor: float,
        code: BlockCode,
    ) -> None:
        """Add a message (N, B) times `scale` (N,) times `factor` to `momentum` (N, 4096)."""
        count = len(momentum)
        message = _message(body, scale, count, code)
        self._run("add", count, _into(momentum, np.float32, count, BLOCK), _ref(message), factor, _code(code))

    def apply(
        self,
        pieces: NDArray[np.void],
        weights: NDArray[np.uintp],
        trend: NDArray[np.int16],
        bodies: Sequence[NDArray[np.uint8]],
        *,
        code: BlockCode,
        limit: int,
        window: int,
        rates: NDArray[np.float32],
        shares: NDArray[np.float32],
    ) -> None:
        """T = T - T / 2^window + 8 U, then w = w * share - rate sign(T), w fp32 at the addresses `weights` (T,).

        `trend` (N, 4096) is T; U the integer transform of the votes in `bodies` (N, B), one or more, which must have
        been validated; any bytes are safe. Votes for one coefficient are limited to `limit` either way; 0 is no limit.
        `rates` and `shares` (T,) are the tensors'.
        """
        count = _count(bodies)
        self._run(
            "apply",
            _slab(pieces, count, len(weights)),
            _at(weights, np.uintp, len(weights)),
            _into(trend, np.int16, count, BLOCK),
            *_bodies(bodies, count, code),
            _code(code),
            limit,
            window,
            _at(rates, np.float32, len(weights)),
            _at(shares, np.float32, len(weights)),
        )

    def preview(
        self,
        pieces: NDArray[np.void],
        weights: NDArray[np.uintp],
        out: Tensors,
        trend: NDArray[np.int16],
        bodies: Sequence[NDArray[np.uint8]],
        *,
        code: BlockCode,
        window: int,
        rates: NDArray[np.float32],
    ) -> None:
        """Write to `out` what `apply` without weight decay would make of the weights; the trend stays as it is.

        `bodies` may be empty: the trend then only leaks.
        """
        count = len(trend)
        self._run(
            "preview",
            _slab(pieces, count, len(weights)),
            _at(weights, np.uintp, len(weights)),
            _at(out.addresses, np.uintp, len(weights)),
            _at(out.dtypes, np.uint8, len(weights)),
            _at(trend, np.int16, count, BLOCK),
            *_bodies(bodies, count, code),
            _code(code),
            window,
            _at(rates, np.float32, len(weights)),
        )

    def inverse(self, bodies: Sequence[NDArray[np.uint8]], code: BlockCode, limit: int, out: NDArray[np.int32]) -> None:
        """U alone, to `out` (N, 4096), for whoever wants to check it: `python -m optimizer` does."""
        count = _count(bodies)
        to = _into(out, np.int32, count, BLOCK)
        self._run("inverse", count, *_bodies(bodies, count, code), _code(code), limit, to)

    def decode(self, body: NDArray[np.uint8], code: BlockCode) -> tuple[NDArray[np.uint16], NDArray[np.bool_]] | None:
        """Indices and signs (N, K) of `body` (N, B); None if it is not what `encode_blocks` makes."""
        count = len(body)
        indices = np.empty((count, code.topk), np.uint16)
        signs = np.empty((count, code.topk), np.bool_)
        at = _at(body, np.uint8, count, code.bytes)
        done = self._is_done("decode", count, at, _code(code), _at(indices, np.uint16), _at(signs, np.bool_))
        return (indices, signs) if done else None

    def valid(self, body: NDArray[np.uint8], code: BlockCode) -> bool:
        """Whether `decode` would return something."""
        return self._is_done("validate", len(body), _at(body, np.uint8, len(body), code.bytes), _code(code))

    def encode_blocks(
        self, indices: NDArray[np.uint16], signs: NDArray[np.bool_], code: BlockCode
    ) -> NDArray[np.uint8]:
        """Code (N, B) of indices and signs (N, K). Raises ValueError unless indices are ascending and below 4096."""
        count = len(indices)
        body = np.empty((count, code.bytes), np.uint8)
        self._run(
            "encode_blocks",
            count,
            _at(indices, np.uint16, count, code.topk),
            _at(signs, np.bool_, count, code.topk),
            _code(code),
            _at(body, np.uint8),
        )
        return body

    def fingerprint(
        self,
        pieces: NDArray[np.void],
        weights: NDArray[np.uintp],
        within: NDArray[np.uint64],
        of_blocks: NDArray[np.uint64],
    ) -> int:
        """Sum of of_blocks[b] * within[j] * bits of value j of block b, modulo 2^64; fp32 at addresses `weights`."""
        total = ctypes.c_uint64()
        self._run(
            "fingerprint",
            _slab(pieces, len(of_blocks), len(weights)),
            _at(weights, np.uintp, len(weights)),
            _at(within, np.uint64, BLOCK),
            _at(of_blocks, np.uint64, len(of_blocks)),
            _ref(total),
        )
        return total.value

    def _run(self, name: str, *arguments: Any) -> None:
        status = self._call[name](*arguments)
        if status != _DONE:
            raise ValueError(f"{name}: {_PROBLEMS[status]}")

    def _is_done(self, name: str, *arguments: Any) -> bool:
        status = self._call[name](*arguments)
        if status not in (_DONE, _MALFORMED):
            raise ValueError(f"{name}: {_PROBLEMS[status]}")
        return bool(status == _DONE)


def available() -> bool:
    """Whether the kernels are compiled and can be called. Raises StaleKernels if they are of another version."""
    return not reason()


@cache
def reason() -> str:
    """Why the kernels are not available; empty if they are. Raises StaleKernels."""
    library = _library()
    return library if isinstance(library, str) else ""


@cache
def isas() -> tuple[str, ...]:
    """Instruction sets that the kernels are compiled for and this machine has, the fastest last."""
    library = _library()
    return () if isinstance(library, str) else tuple(isa for isa in _ISAS if library.psyche_isa(isa.encode()))


@cache
def kernels(isa: str | None = None) -> Kernels:
    """The kernels for one instruction set, by default the fastest. Raises RuntimeError if there are none."""
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    name = isa or isas()[-1]
    if name not in isas():
        raise RuntimeError(f"there are no kernels for {name} on this machine, only for {', '.join(isas())}")
    return Kernels(name, library.psyche_isa(name.encode()))


@cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    here = Path(__file__).parent
    path = next((found for suffix in EXTENSION_SUFFIXES if (found := here / f"_kernels{suffix}").exists()), None)
    if path is None:
        return "the CPU kernels are not compiled: install a C compiler, then psyche-node again"
    try:
        library = ctypes.CDLL(str(path))
        library.psyche_isa.restype, library.psyche_isa.argtypes = ctypes.c_void_p, (ctypes.c_char_p,)
        abi = library.psyche_abi()
    except (OSError, AttributeError) as error:
        return f"the CPU kernels in {path.name} cannot be loaded ({error}): install psyche-node again"
    if abi != _ABI:
        raise StaleKernels(
            f"{path.name} has version {abi} of the kernels' interface, the sources have {_ABI}: install psyche-node "
            "again (pip install -e . in a checkout)"
        )
    return library


def _at(array: NDArray[Any], kind: Any, *shape: int) -> int:
    """Address of an array, which must be of this dtype, contiguous and, where given, of this shape."""
    contiguous = array.flags.c_contiguous
    if array.dtype != kind or not contiguous or (shape and array.shape != shape):
        given = f"{array.dtype} of shape {array.shape}" + ("" if contiguous else ", not contiguous")
        wanted = f"{np.dtype(kind)}" + (f" of shape {shape}" if shape else "")
        raise ValueError(f"an array is {given}; it must be contiguous {wanted}")
    return int(array.__array_interface__["data"][0])


def _into(array: NDArray[Any], kind: Any, *shape: int) -> int:
    """The same of an array that is written."""
    if not array.flags.writeable:
        raise ValueError(f"an array of shape {array.shape} is read-only; it is written here")
    return _at(array, kind, *shape)


def _ref(structure: Any) -> Any:
    return ctypes.byref(structure)


def _slab(pieces: NDArray[np.void], count: int, tensors: int) -> Any:
    return _ref(_Slab(_at(pieces, PIECE, len(pieces)), len(pieces), count, tensors))


def _code(code: BlockCode) -> Any:
    return _ref(_Code(code.topk, code.low, code.bitmap, code.bytes))


def _message(body: NDArray[np.uint8], scale: NDArray[np.float32], count: int, code: BlockCode) -> _Message:
    return _Message(_at(body, np.uint8, count, code.bytes), _at(scale, np.float32, count))


def _count(bodies: Sequence[NDArray[np.uint8]]) -> int:
    if not bodies:
        raise ValueError(_PROBLEMS[3])
    return len(bodies[0])


def _bodies(bodies: Sequence[NDArray[np.uint8]], count: int, code: BlockCode) -> tuple[Any, int]:
    addresses = (ctypes.c_void_p * len(bodies))(*(_at(body, np.uint8, count, code.bytes) for body in bodies))
    return addresses, len(bodies)
