"""The engine for CUDA devices, over kernels in Triton: the same bits, with one pass over memory for each phase.

Importing this module imports triton, which comes with PyTorch's CUDA builds; `compiled.choose_engine` does so on
demand. With TRITON_INTERPRET=1 in the environment, Triton runs the kernels on tensors of the CPU, slowly: for tests.

Legend: N blocks worked on by one launch, C = 4096 coefficients of a block, B bytes of a block's code, M members.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer import triton_kernels as kernels
from optimizer.engine import Bodies, Energy, PlainEngine, Rule, Sent, Step, Tensors
from optimizer.fingerprint import of_blocks, within_block
from optimizer.geometry import PIECE, Geometry
from optimizer.layout import SIDE
from optimizer.rehearsal import differences
from optimizer.votes import on_device

SCRATCH = 64 << 20
"""Bytes of device memory for what one launch reads or writes beside tensors; it decides how many blocks one takes.
Beyond that an engine holds 52 bytes a block (0.3% of the momentum) and, between `check` and `apply`, as much again."""

_KINDS = {torch.float32: kernels.FP32, torch.bfloat16: kernels.BF16, torch.float16: kernels.FP16}
_WARPS = 8  # a block's values are 16 to a thread: four strides of the butterflies need no exchange between threads
_PROGRAMS = 2  # at a time on each multiprocessor, where a program takes many blocks
_FEWER_REGISTERS = {"maxnreg": 80}  # than the compiler would take, by a spill of 8 bytes: three programs at a time
_REGISTERS = {"maxnreg": 128}  # two programs at a time


def interpreted() -> bool:
    """Whether Triton was imported to run kernels in Python, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def trouble(device: torch.device, topk: int) -> str | None:
    """Why the kernels cannot be used on a device; None if a rehearsal makes the bits of the definition there.

    Compiles the kernels for this `topk`, which takes some seconds the first time on a machine.
    """

    def build(geometry: Geometry) -> TritonEngine:
        return TritonEngine(geometry, device)

    try:
        found = differences(build, lambda geometry: PlainEngine(geometry, device), device, topk)
    except Exception as error:  # whatever a compiler, a driver or a device without support may raise
        return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0][:120]}"
    return f"other bits than torch in {', '.join(found)}" if found else None


class TritonEngine:
    """Same bits as PlainEngine; tensors are on one CUDA device. Slabs do not matter: launches are sized by SCRATCH."""

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        self.name = "triton (interpreted)" if interpreted() else "triton"
        self._geometry, self._code, self._device = geometry, geometry.layout.code, device
        self._blocks = len(geometry.blocks)
        self._pieces = _Table.of(geometry, [slab.pieces() for slab in geometry.slabs], device)
        self._sources = self._pieces
        if any(slab.border for slab in geometry.slabs):
            tensors = len(geometry.layout.placements)
            self._sources = _Table.of(geometry, [slab.sources(tensors) for slab in geometry.slabs], device)
        self._uploaded: tuple[list[NDArray[np.uint8]], Tensor] | None = None
        code = self._code
        self._sizes = {"TOPK": code.topk, "LOW": code.low, "BITMAP": code.bitmap}

    def encode(
        self, gradients: Tensors, exchanged: Tensor | None, momentum_NC: Tensor, sent: Sent, rule: Rule
    ) -> Energy:
        bases, held = self._bases([*gradients, exchanged])
        code, table = self._code, self._sources
        words = -(-code.bytes // 4)
        energy_2 = torch.zeros(2, dtype=torch.float64, device=self._device)
        for first, count in self._launches(2 * code.topk + 4 * words + code.bytes + 8):
            indices_NK = torch.empty(count, code.topk, dtype=torch.int16, device=self._device)
            words_NW = torch.zeros(count, words, dtype=torch.int32, device=self._device)
            energy_N2 = torch.empty(count, 2, device=self._device)
            self._launch(
                kernels.encode_kernel,
                count,
                *(*table.arrays, *bases, momentum_NC, rule.decay, rule.rate / SIDE, rule.salt & 1, first),
                *(indices_NK, words_NW, sent.scale, energy_N2),
                **(self._sizes | {"HALVINGS": (code.topk - 1).bit_length(), "WORDS": words}),
                WIDE=table.wide,
                **_FEWER_REGISTERS,
            )
            body_NB = words_NW.view(torch.uint8)[:, : code.bytes].contiguous()
            torch.from_numpy(sent.body[first : first + count]).copy_(body_NB)
            energy_2 += energy_N2.sum(dim=0, dtype=torch.float64)
        del held
        total, kept = energy_2.tolist()
        return Energy(total, kept)

    def add(self, momentum_NC: Tensor, sent: Sent, factor: float) -> None:
        for first, count in self._launches(self._code.bytes):
            rows_NB = on_device(sent.body[first : first + count], self._device)
            arguments = (rows_NB, sent.scale, momentum_NC, float(factor), first)
            self._launch(kernels.add_kernel, count, *arguments, **self._coded(), warps=1)

    def ahead(
        self,
        trend_NC: Tensor,
        travelling: Sequence[Sent],
        weights: Sequence[Tensor],
        targets: Sequence[Tensor],
        step: Step,
    ) -> None:
        written = [torch.empty_like(t, dtype=torch.float32) if t.dtype not in _KINDS else t for t in targets]
        bases = self._bases(weights)[0][0], *self._bases(written)[0], self._numbers(step.rates), trend_NC
        self._vote(kernels.ahead_kernel, bases, [sent.body for sent in travelling], 0, step.window)
        for target, made in zip(targets, written, strict=True):
            if made is not target:
                target.copy_(made)

    def check(self, bodies: Bodies) -> None:
        self._uploaded = None
        if not bodies:
            return
        good = True
        for first, count in self._launches(len(bodies) * (self._code.bytes + 4) + 1):
            rows_MNB = self._upload(bodies, first, count)
            wrong_MN = torch.empty(len(bodies) * count, dtype=torch.int32, device=self._device)
            self._launch(kernels.check_kernel, len(bodies) * count, rows_MNB, wrong_MN, **self._coded(), warps=1)
            good = good and not bool(wrong_MN.any())
            if count == self._blocks:
                self._uploaded = list(bodies), rows_MNB  # `apply` comes next
        if not good:
            self._uploaded = None
            PlainEngine(self._geometry, torch.device("cpu")).check(bodies)  # finds the words

    def apply(self, trend_NC: Tensor, weights: Sequence[Tensor], bodies: Bodies, step: Step) -> None:
        bases = self._bases(weights)[0][0], self._numbers(step.rates), self._numbers(step.shares), trend_NC
        self._vote(kernels.apply_kernel, bases, bodies, step.limit, step.window)
        self._uploaded = None

    def _vote(self, kernel: Any, bases: tuple[Tensor, ...], bodies: Bodies, limit: int, window: int) -> None:
        members, table = len(bodies), self._pieces
        # As many bits at once as four to a thread; a warp for each row where there are eight.
        together = 1 << (min(max(members, 1), _WARPS) - 1).bit_length()
        constants = self._coded(1024 // together) | {"ROWS": together, "WIDE": table.wide}
        programs = min(self._blocks, self._programs)
        tally = torch.zeros(programs, 2048, dtype=torch.int32, device=self._device)
        for first, count in self._launches(members * (self._code.bytes + 4) + 1):
            rows_MNB = self._checked(bodies) if count == self._blocks else None
            rows_MNB = self._upload(bodies, first, count) if rows_MNB is None else rows_MNB
            arguments = (*table.arrays, *bases, rows_MNB, tally, first, count, members, limit or members, window)
            self._launch(kernel, min(programs, count), *arguments, **constants, **_REGISTERS)

    def fingerprint(self, weights: Tensors) -> int:
        sums_N = torch.empty(self._blocks, dtype=torch.int64, device=self._device)
        arguments = (*self._pieces.arrays, self._bases(weights)[0][0], *self._factors, 0, sums_N)
        self._launch(kernels.fingerprint_kernel, self._blocks, *arguments, WIDE=self._pieces.wide)
        return int(sums_N.sum()) & ((1 << 64) - 1)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """R of the values within a block and K of this process's blocks, as int64."""
        layout = self._geometry.layout
        both = within_block(layout), of_blocks(layout, self._geometry.blocks)
        within_C, of_blocks_N = (torch.from_numpy(f.view(np.int64)).to(self._device) for f in both)
        return within_C, of_blocks_N

    @cached_property
    def _programs(self) -> int:
        if self._device.type != "cuda":
            return 2
        return _PROGRAMS * torch.cuda.get_device_properties(self._device).multi_processor_count

    def _coded(self, most: int = 256) -> dict[str, int]:
        """Sizes of the code, whose bitmaps are read at most `most` bits at a time."""
        chunk = min(most, max(16, 1 << (self._code.bitmap - 1).bit_length()))
        return self._sizes | {"BYTES": self._code.bytes, "CHUNK": chunk}

    def _launches(self, bytes: int) -> Iterator[tuple[int, int]]:
        """First block and number of blocks of each launch that needs `bytes` of scratch for a block."""
        most = max(1, SCRATCH // bytes)
        for first in range(0, self._blocks, most):
            yield first, min(most, self._blocks - first)

    def _launch(self, kernel: Any, programs: int, *arguments: Any, warps: int = _WARPS, **constants: Any) -> None:
        if not programs:
            return
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)

    def _bases(self, tensors: Tensors) -> tuple[tuple[Tensor, Tensor], list[Tensor | None]]:
        """Addresses (0 for None) and kinds on the device, and what must live until the kernels are launched.

        Types that the kernels do not know become fp32.
        """
        held = [t if t is None or t.dtype in _KINDS else t.float() for t in tensors]
        addresses = torch.tensor([0 if t is None else t.data_ptr() for t in held], dtype=torch.int64)
        kinds = torch.tensor([0 if t is None else _KINDS[t.dtype] for t in held], dtype=torch.int32)
        return (addresses.to(self._device), kinds.to(self._device)), held

    def _numbers(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32).to(self._device)

    def _checked(self, bodies: Bodies) -> Tensor | None:
        """Rows (M, N, B) of all blocks, if these bodies are among those that were checked last."""
        if self._uploaded is None:
            return None
        known = {id(body): number for number, body in enumerate(self._uploaded[0])}
        wanted = [known.get(id(body), -1) for body in bodies]
        if -1 in wanted:
            return None
        rows_MNB = self._uploaded[1]
        return rows_MNB if wanted == list(range(len(rows_MNB))) else rows_MNB[wanted].contiguous()

    def _upload(self, bodies: Bodies, first: int, count: int) -> Tensor:
        """This process's rows (M, N, B) of blocks from `first` on, by way of page-locked memory."""
        blocks, rows = self._geometry.blocks, slice(first, first + count)
        cuda = self._device.type == "cuda"
        staged_MNB = torch.empty(len(bodies), count, self._code.bytes, dtype=torch.uint8, pin_memory=cuda)
        to = staged_MNB.numpy()

        def copy(member: int) -> None:
            body = bodies[member]
            to[member] = body[rows] if len(blocks) == len(body) else body[blocks[rows]]

        if to.nbytes < 1 << 22:
            for member in range(len(bodies)):
                copy(member)
        else:
            with ThreadPoolExecutor(min(len(bodies), os.cpu_count() or 1)) as pool:
                list(pool.map(copy, range(len(bodies))))
        return staged_MNB.to(self._device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Table:
    """PIECE records of all blocks in device memory. `wide`: a place in a tile needs more than 31 bits."""

    arrays: tuple[Tensor, Tensor, Tensor]
    wide: bool

    @classmethod
    def of(cls, geometry: Geometry, of_slabs: Sequence[NDArray[np.void]], device: torch.device) -> "_Table":
        """From the records of each slab, whose blocks count from the slab's first."""
        for slab, records in zip(geometry.slabs, of_slabs, strict=True):
            records["block"] += slab.first
        records = np.concatenate([*of_slabs, np.empty(0, PIECE)])
        firsts = np.searchsorted(records["block"], np.arange(len(geometry.blocks) + 1)).astype(np.int32)
        furthest = (records["rows"] - 1) * records["stride"] + records["cols"]
        pieces = torch.from_numpy(records.view(np.int32)).to(device)
        arrays = pieces, pieces.view(torch.int64), torch.from_numpy(firsts).to(device)
        return cls(arrays, bool((furthest >= 1 << 31).any()))
