"""A whole training step beside the same model under fused AdamW: tokens/s, model-FLOP utilisation, and what this costs.

    python -m benchmarks.train                                   # 4M parameters on the CPU: a minute on two quiet cores
    python -m benchmarks.train --size 50M --tokens 4096
    python -m benchmarks.train --size 1B --tokens 16384 --device cuda

A step of the project is what a node does in a round: positions to gradient to update (`Session.train`), the update
written and hashed, the others' read and hashed, `Session.apply`, the fingerprint. A step of the baseline is forward,
backward, clipping and AdamW of the same model on the same tokens, by the same loss. Steps of both alternate; times are
medians. The goal is for 1B parameters and 16,384 tokens a step on a GPU: optimizer, hashing, fingerprint and exchange
cost less than 5% of a step.
Model FLOPs are six for each multiplied parameter and token, and attention's. Prints a table, writes JSON.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.optimizer import Help, random_updates
from coordinator.state import float_bits
from psyche_node.network.blobs import blob_digest
from psyche_node.network.store import BlobStore
from psyche_node.planning.gpus import GPUS
from psyche_node.planning.shape import ModelShape, shape_of
from psyche_node.training import Session, TrainingTerms
from psyche_node.training.baseline import BETAS, EPSILON, WEIGHT_DECAY
from psyche_node.training.gradient import accumulate
from psyche_node.training.preparing import prepare_model
from psyche_node.training.world import ONE_PROCESS

SIZES = {  # hidden size, layers, vocabulary, feed-forward size
    "4M": (256, 4, 4_096, 768),
    "50M": (512, 10, 32_000, 1_536),
    "150M": (768, 18, 32_000, 2_304),
    "1B": (2_048, 16, 128_256, 8_192),
}
GOAL = 0.05
RUN = bytes(32)
T = TypeVar("T")


@dataclass(frozen=True)
class Packed:
    tokens: np.ndarray
    trained: np.ndarray
    places: np.ndarray


class RandomTokens:
    """Documents of one sequence, of random tokens, all trained: what is timed does not depend on what they say."""

    unigram_entropy = 0.0
    digest = bytes(32)

    def __init__(self, length: int, vocabulary: int) -> None:
        self.sequence_length, self.vocabulary = length, vocabulary

    def __len__(self) -> int:
        return 1 << 20

    def batch(self, positions: Sequence[int], seed: bytes) -> Packed:
        shape = (len(positions), self.sequence_length)
        tokens = np.random.default_rng(positions[0]).integers(0, self.vocabulary, shape)
        places = np.broadcast_to(np.arange(self.sequence_length), shape).copy()
        return Packed(tokens, np.ones(shape, np.bool_), places)

    def heldout(self, limit: int | None = None) -> Packed:
        return self.batch(range(limit or 1), b"")


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds are medians of a step; ``phases`` of those that the baseline has not; ``mfu`` None: no peak is known."""

    size: str
    parameters: int
    tokens: int
    ours: float
    adamw: float
    adamw_optimizer: float
    phases: dict[str, float]
    added: float
    flops: float
    peak: float
    mfu_ours: float
    mfu_adamw: float


class Clock:
    """Seconds by phase and step, of work that a device has finished."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.steps: dict[str, list[float]] = defaultdict(list)

    def run(self, phase: str, work: Callable[[], T]) -> T:
        started = self._now()
        result = work()
        self.steps[phase].append(self._now() - started)
        return result

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def median(self, phase: str) -> float:
        return statistics.median(self.steps[phase][1:] or self.steps[phase])

    def watch(self, optimizer: Any) -> None:
        """Time what a step does beside the model's own passes."""
        for name in ("encode", "apply", "fingerprint"):
            setattr(optimizer, name, self._watched(name, getattr(optimizer, name)))
        plain = optimizer.lookahead

        @contextmanager
        def lookahead() -> Iterator[None]:
            context = plain()
            self.run("lookahead", context.__enter__)
            try:
                yield
            finally:
                self.run("lookahead", lambda: context.__exit__(None, None, None))

        optimizer.lookahead = lookahead

    def _watched(self, name: str, work: Callable[..., T]) -> Callable[..., T]:
        return lambda *args, **kwargs: self.run(name, lambda: work(*args, **kwargs))

    def per_step(self, phase: str, steps: int) -> float:
        """Median over the steps of the sum of a phase's calls, the first step left out."""
        calls = self.steps[phase]
        each = len(calls) // steps
        sums = [sum(calls[each * step : each * (step + 1)]) for step in range(steps)]
        return statistics.median(sums[1:] or sums)


def model_folder(size: str, length: int, folder: Path) -> ModelShape:
    """Write a Llama of that size with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, vocabulary, wide = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        intermediate_size=wide,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tensors = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
    return shape_of(size, config.to_dict(), tensors)


def peak_flops(device: torch.device) -> float:
    """Of a GPU its data sheet's; of other devices what a large product of matrices gets in this run."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).upper()
        known = [gpu for key, gpu in GPUS.items() if key.upper() in name.replace(" ", "")]
        if known:
            return max(known, key=lambda gpu: len(gpu.name)).flops
    dtype, size = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 2048)
    a, best = torch.randn(size, size, device=device, dtype=dtype), float("inf")
    for _ in range(5):
        started = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


class Exchange:
    """Updates between the processes of a node, by files as there: bytes and digests, and nothing of a line."""

    def __init__(self, folder: Path, others: Sequence[bytes]) -> None:
        self._store, self._folder = BlobStore(folder / "store"), folder
        self._others = [(self._store.path(self._store.put(blob, 0)[0]), blob_digest(blob)) for blob in others]

    def send(self, blob: bytes) -> None:
        path = self._folder / "update"
        path.write_bytes(blob)
        self._store.adopt(path, 0)

    def receive(self) -> list[bytes]:
        blobs = [path.read_bytes() for path, _ in self._others if path is not None]
        if [blob_digest(blob) for blob in blobs] != [digest for _, digest in self._others]:
            raise RuntimeError("an update on disk is not what was written")
        return blobs


def measure(size: str, args: argparse.Namespace, folder: Path) -> Figures:
    length = min(args.sequence, args.tokens)
    sequences = max(1, args.tokens // length)
    shape = model_folder(size, length, folder)
    data = RandomTokens(length, shape.vocabulary)
    bits = {name: float_bits(value) for name, value in (("peak_lr_bits", 1e-4), ("clip_norm_bits", 1.0))}
    terms = TrainingTerms(total_rounds=10_000, final_lr_bits=bits["peak_lr_bits"], topk=args.topk, **bits)
    session = Session(folder, data, terms, args.device, args.micro_batch, args.threads)
    device = session.device.torch
    clock, exchange = Clock(device), Exchange(folder, random_updates(session.optimizer.layout, args.members - 1))
    clock.watch(session.optimizer)

    # As much at a time as ours, whatever memory ours has left.
    ready = prepare_model(folder, data, args.device, session.device.micro_batch, args.threads)
    adamw = torch.optim.AdamW(
        ready.model.parameters(), lr=1e-4, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True
    )

    def ours() -> None:
        # The others' updates are of round 0: it is trained again and again.
        blob = session.train(0, range(sequences), run=RUN, member=args.members - 1).blob
        clock.run("exchange", lambda: exchange.send(blob))
        session.apply(0, [blob, *clock.run("exchange", exchange.receive)], included=True)
        session.fingerprint()

    def plain() -> None:
        adamw.zero_grad(set_to_none=True)
        accumulate(ready.loss, data.batch(range(sequences), b""), ready.device)
        ONE_PROCESS.clip(ready.model, 1.0)
        clock.run("adamw", adamw.step)

    for _ in range(args.steps + 1):
        clock.run("ours", ours)
        clock.run("plain", plain)
    phases = {
        name: clock.per_step(name, args.steps + 1)
        for name in ("lookahead", "encode", "apply", "fingerprint", "exchange")
    }
    total, baseline = clock.median("ours"), clock.median("plain")
    tokens = sequences * length
    flops, peak = shape.flops_per_token(length) * tokens, peak_flops(device)
    return Figures(
        size=size,
        parameters=shape.parameters,
        tokens=tokens,
        ours=total,
        adamw=baseline,
        adamw_optimizer=clock.median("adamw"),
        phases=phases,
        added=sum(phases.values()) / total,
        flops=flops,
        peak=peak,
        mfu_ours=flops / total / peak,
        mfu_adamw=flops / baseline / peak,
    )


def show(figures: Figures) -> None:
    print(f"{figures.size}: {figures.parameters:,} parameters, {figures.tokens:,} tokens a step")
    print(f"{'':24}{'ours':>10}{'AdamW':>10}")
    print(f"  {'seconds a step':22}{figures.ours:>10.3f}{figures.adamw:>10.3f}")
    print(f"  {'tokens/s':22}{figures.tokens / figures.ours:>10,.0f}{figures.tokens / figures.adamw:>10,.0f}")
    print(f"  {'model FLOPs of peak':22}{figures.mfu_ours:>10.1%}{figures.mfu_adamw:>10.1%}")
    print(f"  {'AdamW itself':22}{'':>10}{figures.adamw_optimizer / figures.adamw:>10.1%}")
    for phase, seconds in figures.phases.items():
        print(f"  {phase:22}{seconds / figures.ours:>10.1%}")
    print(f"  {'all of these':22}{figures.added:>10.1%}   (goal at 1B on a GPU: < {GOAL:.0%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--size", choices=SIZES, default="4M")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of this member in a step")
    parser.add_argument("--sequence", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--topk", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/train.json"), help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args.size, args, Path(folder))
    show(figures)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    report = {"machine": machine, "torch": torch.__version__, "settings": {k: str(v) for k, v in vars(args).items()}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report | asdict(figures), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
