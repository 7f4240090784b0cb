"""The engine over the compiled kernels: one pass over memory for each phase, slabs spread over PyTorch's threads.

Legend: N blocks of a slab, C = 4096 coefficients of a block, B bytes of a block's code.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer import native
from optimizer.engine import Bodies, Energy, Engine, PlainEngine, Rule, Sent, Step, Tensors
from optimizer.fingerprint import of_blocks, within_block
from optimizer.geometry import Geometry
from optimizer.layout import SIDE
from optimizer.rehearsal import differences

T = TypeVar("T")
_DTYPES = {torch.float32: native.FP32, torch.bfloat16: native.BF16}


def choose_engine(geometry: Geometry, device: torch.device, name: str = "auto") -> Engine:
    """By name: "torch", "triton", "compiled", or an instruction set of the compiled kernels.

    "auto" takes the compiled kernels on CPUs where they are built and pass their rehearsal, and torch operations
    elsewhere; the engine's name says why. Kernels in Triton have to be asked for, as long as nobody has measured them.
    Raises ValueError for an engine that is not to be had here.
    """
    if name == "triton":
        return _triton_engine(geometry, device)
    if name == "torch" or (name == "auto" and device.type != "cpu"):
        return PlainEngine(geometry, device)
    compiled = ("compiled", *native.isas())
    if name != "auto" and name not in compiled:
        raise ValueError(
            f"no engine is called {name!r} here; there are {', '.join(('auto', 'torch', *compiled, 'triton'))}"
        )
    isa = None if name in ("auto", "compiled") else name
    problem = trouble(isa) if device.type == "cpu" else "they are for the CPU"
    if not problem:
        return CompiledEngine(geometry, isa)
    if name != "auto":
        raise ValueError(f"compiled kernels cannot be used on {device}: {problem}")
    engine = PlainEngine(geometry, device)
    engine.name = f"torch ({problem})"
    return engine


def trouble(isa: str | None) -> str | None:
    """Why the compiled kernels cannot be used; None if a rehearsal makes the bits of the definition (0.2 s, once)."""
    return _rehearsed(isa) if native.available() else native.reason()


@cache
def _rehearsed(isa: str | None) -> str | None:
    here = torch.device("cpu")
    found = differences(lambda g: CompiledEngine(g, isa), lambda g: PlainEngine(g, here), here, topk=24)
    return f"they make other bits than torch in {', '.join(found)}; install psyche-node again" if found else None


def _triton_engine(geometry: Geometry, device: torch.device) -> Engine:
    try:
        from optimizer import triton_engine  # triton is imported where it is asked for, and nowhere else
    except ImportError as error:
        raise ValueError(f"kernels in Triton cannot be used: triton cannot be imported ({error})") from error
    if device.type == "cuda":
        trouble = triton_engine.trouble(device, geometry.layout.topk)
    else:
        trouble = None if triton_engine.interpreted() else "they are for CUDA devices"
    if trouble:
        raise ValueError(f"kernels in Triton cannot be used on {device}: {trouble}")
    return triton_engine.TritonEngine(geometry, device)


class CompiledEngine:
    """Same bits as PlainEngine; tensors are on the CPU."""

    def __init__(self, geometry: Geometry, isa: str | None = None) -> None:
        self._geometry, self._code = geometry, geometry.layout.code
        self._kernels = native.kernels(isa)
        self.name = f"compiled for {self._kernels.isa}"
        self._pieces = [slab.pieces() for slab in geometry.slabs]
        self._sources = [slab.sources(len(geometry.layout.placements)) for slab in geometry.slabs]
        self._within = within_block(geometry.layout)

    def encode(
        self, gradients: Tensors, exchanged: Tensor | None, momentum_NC: Tensor, sent: Sent, rule: Rule
    ) -> Energy:
        sources, held = _tensors([*gradients, exchanged])
        momentum, scale = momentum_NC.numpy(), sent.scale.numpy()

        def work(number: int) -> tuple[float, float]:
            rows = self._geometry.slabs[number].rows
            energy = self._kernels.encode(
                self._sources[number],
                sources,
                momentum[rows],
                decay=rule.decay,
                rate=rule.rate / SIDE,
                code=self._code,
                salt=rule.salt,
                body=sent.body[rows],
                scale=scale[rows],
            )
            return energy.total, energy.kept

        energies = self._spread(work)
        del held  # the tensors that `sources` points into
        return Energy(sum(total for total, _ in energies), sum(kept for _, kept in energies))

    def add(self, momentum_NC: Tensor, sent: Sent, factor: float) -> None:
        momentum, scale = momentum_NC.numpy(), sent.scale.numpy()

        def work(number: int) -> None:
            rows = self._geometry.slabs[number].rows
            self._kernels.add(momentum[rows], sent.body[rows], scale[rows], factor, self._code)

        self._spread(work)

    def ahead(
        self,
        trend_NC: Tensor,
        travelling: Sequence[Sent],
        weights: Sequence[Tensor],
        targets: Sequence[Tensor],
        step: Step,
    ) -> None:
        trend, rates = trend_NC.numpy(), np.array(step.rates, np.float32)
        coarse = {t: target for t, target in enumerate(targets) if target.dtype not in _DTYPES}
        written = [torch.empty_like(weights[t]) if t in coarse else target for t, target in enumerate(targets)]
        addresses, held = _addresses(weights)
        out, written_to = _tensors(written)

        def work(number: int) -> None:
            rows = self._geometry.slabs[number].rows
            self._kernels.preview(
                self._pieces[number],
                addresses,
                out,
                trend[rows],
                [sent.body[rows] for sent in travelling],
                code=self._code,
                window=step.window,
                rates=rates,
            )

        self._spread(work)
        del held, written_to
        for tensor, target in coarse.items():
            target.copy_(written[tensor])

    def check(self, bodies: Bodies) -> None:
        def work(number: int) -> bool:
            slab = self._geometry.slabs[number]
            return all(self._kernels.valid(rows, self._code) for rows in self._geometry.rows(bodies, slab))

        if not all(self._spread(work)):
            PlainEngine(self._geometry, torch.device("cpu")).check(bodies)  # finds the words

    def apply(self, trend_NC: Tensor, weights: Sequence[Tensor], bodies: Bodies, step: Step) -> None:
        addresses, held = _addresses(weights)
        trend, rates, shares = trend_NC.numpy(), np.array(step.rates, np.float32), np.array(step.shares, np.float32)

        def work(number: int) -> None:
            slab = self._geometry.slabs[number]
            self._kernels.apply(
                self._pieces[number],
                addresses,
                trend[slab.rows],
                self._geometry.rows(bodies, slab),
                code=self._code,
                limit=step.limit,
                window=step.window,
                rates=rates,
                shares=shares,
            )

        self._spread(work)
        del held

    def fingerprint(self, weights: Tensors) -> int:
        addresses, held = _addresses(weights)
        counted = addresses != 0

        def work(number: int) -> int:
            slab, pieces = self._geometry.slabs[number], self._pieces[number]
            factors = of_blocks(self._geometry.layout, self._geometry.blocks[slab.rows])
            return self._kernels.fingerprint(pieces[counted[pieces["tensor"]]], addresses, self._within, factors)

        total = sum(self._spread(work)) & ((1 << 64) - 1)
        del held
        return total

    def _spread(self, work: Callable[[int], T]) -> list[T]:
        """`work` on the number of every slab, by as many threads as PyTorch uses."""
        slabs, threads = len(self._geometry.slabs), torch.get_num_threads()
        if threads == 1 or slabs == 1:
            return [work(number) for number in range(slabs)]

        def share(first: int) -> list[T]:
            return [work(number) for number in range(first, slabs, threads)]

        futures = [_pool().submit(share, first) for first in range(min(threads, slabs))]
        try:
            shares = [future.result() for future in futures]
        finally:
            wait(futures)  # when one fails, too: none may go on writing to tensors that are about to be freed
        return [shares[number % threads][number // threads] for number in range(slabs)]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="optimizer")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _tensors(tensors: Tensors) -> tuple[native.Tensors, list[Tensor]]:
    """Addresses and types, and what must stay alive while they are used. Types unknown to the kernels become fp32."""
    known = [t if t is None or t.dtype in _DTYPES else t.float() for t in tensors]
    addresses, held = _addresses(known)
    dtypes = np.array([native.FP32 if t is None else _DTYPES[t.dtype] for t in known], np.uint8)
    return native.Tensors(addresses, dtypes), held


def _addresses(tensors: Iterable[Tensor | None]) -> tuple[NDArray[np.uintp], list[Tensor]]:
    listed = list(tensors)
    addresses = np.array([0 if t is None else t.data_ptr() for t in listed], np.uintp)
    return addresses, [t for t in listed if t is not None]
