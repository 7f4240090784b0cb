"""Time and memory of a step: the optimizer beside a straightforward DeMo step and fused AdamW, in one run.

    python -m benchmarks.optimizer                      # 10M, 50M and 150M parameters on one thread: about 4 minutes
    python -m benchmarks.optimizer --sizes 10M --threads 2
    python -m benchmarks.optimizer --device cuda --sizes 150M 1B 8B --engine triton

A step is encode + apply of the updates of `--members` members. Times are minima over `--repeats` interleaved rounds,
after one that is not counted. The limit beside them is what the device's memory allows: the bytes that a step cannot
avoid to move, over the bandwidth of a copy measured in the same run. Prints tables, writes JSON.
"""

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo_baseline import DeMoStep
from optimizer import DisTrO, Layout
from optimizer.codec import Header, encode_blocks, encode_header, validate
from optimizer.layout import BLOCK

MODELS = {  # hidden size, layers, vocabulary, feed-forward size
    "10M": (256, 6, 16_384, 768),
    "50M": (512, 10, 32_000, 1_536),
    "150M": (768, 18, 32_000, 2_304),
    "1B": (2_048, 16, 128_256, 8_192),
    "8B": (4_096, 32, 128_256, 14_336),
}
ENCODE_BYTES = 12  # a gradient read, a momentum read and written, per parameter
APPLY_BYTES = 12  # a weight and the trend, 4 and 2 bytes, read and written
RUN = bytes(32)


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter set. Times in ns per parameter and step, memory in bytes above parameters, gradients, momentum."""

    size: str
    parameters: int
    demo: float
    adamw: float
    ours: float
    encode: float
    apply: float
    check: float
    lookahead: float
    fingerprint: float
    limit: float
    demo_memory: int
    our_memory: int
    engine: str


@dataclass(frozen=True, slots=True)
class Scaling:
    """Apply at one number of members, in ns per parameter, with its check of the bytes; indices decoded per second."""

    members: int
    apply: float
    check: float


def shapes(size: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes like those of a Llama with tied embeddings and grouped queries."""
    hidden, layers, vocabulary, wide = MODELS[size]
    listed: list[tuple[str, tuple[int, ...]]] = [("embedding", (vocabulary, hidden)), ("norm", (hidden,))]
    for layer in range(layers):
        for name, shape in (
            ("q", (hidden, hidden)),
            ("k", (hidden // 4, hidden)),
            ("v", (hidden // 4, hidden)),
            ("o", (hidden, hidden)),
            ("gate", (wide, hidden)),
            ("up", (wide, hidden)),
            ("down", (hidden, wide)),
            ("attention_norm", (hidden,)),
            ("mlp_norm", (hidden,)),
        ):
            listed.append((f"layers.{layer}.{name}", shape))
    return listed


def random_updates(layout: Layout, members: int) -> list[bytes]:
    """Valid updates; the indices of a block lie one in each of topk equal ranges."""
    generator, topk = np.random.default_rng(0), layout.topk
    edges = np.arange(topk + 1) * BLOCK // topk
    made = []
    for member in range(members):
        parts = [encode_header(Header(RUN, 0, member), layout)]
        for start in range(0, layout.blocks, 4096):
            count = min(4096, layout.blocks - start)
            indices = generator.integers(edges[:-1], edges[1:], (count, topk)).astype(np.uint16)
            parts.append(encode_blocks(indices, generator.random((count, topk)) < 0.5, layout.code).tobytes())
        made.append(b"".join(parts))
    return made


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it is, and every default."""


class Machine:
    """The device: waiting for it, its memory, its bandwidth."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def peak_memory(self, work: Callable[[], object]) -> int:
        """Bytes that `work` needs at its peak above what is in use before it."""
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            work()
            return torch.cuda.max_memory_allocated(self.device) - before
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present size
        before = _status("VmRSS")
        work()
        return max(0, _status("VmHWM") - before)

    def copy_bandwidth(self) -> float:
        """Bytes read and written per second by a copy of 256 MB."""
        source = torch.ones(64 << 20, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        return 2 * source.nbytes / min(self.seconds(lambda: target.copy_(source)) for _ in range(7))

    @property
    def name(self) -> str:
        if self.cuda:
            return torch.cuda.get_device_name(self.device)
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
        )


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def parameters(size: str, machine: Machine) -> dict[str, Tensor]:
    generator = torch.Generator(machine.device).manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator, device=machine.device) * 0.02)
        for name, shape in shapes(size)
    }


def give_gradients(named: dict[str, Tensor], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(named.values(), gradients, strict=True):
        parameter.grad = gradient


def measure(size: str, machine: Machine, args: argparse.Namespace, bandwidth: float) -> tuple[Row, list[Scaling]]:
    named = parameters(size, machine)
    numel = sum(p.numel() for p in named.values())
    gradients = [torch.randn_like(p) for p in named.values()]
    adamw = torch.optim.AdamW(list(named.values()), lr=1e-3, fused=True)
    ours = DisTrO(named.items(), lr=1e-3, topk=args.topk, engine=args.engine)
    demo = DeMoStep(list(named.values()), lr=1e-3, topk=args.topk, members=args.members)
    blobs = random_updates(ours.layout, args.members)

    def step_adamw() -> None:
        give_gradients(named, gradients)
        adamw.step()

    def step_demo() -> None:
        give_gradients(named, gradients)
        demo.step()

    def encode() -> None:
        give_gradients(named, gradients)
        blobs[0] = ours.encode(round=0, member=0)

    def step_ours() -> None:
        encode()
        ours.apply(blobs)

    def look() -> None:
        with ours.lookahead():
            pass

    times: dict[str, list[float]] = {name: [] for name in ("adamw", "demo", "lookahead", "fingerprint")}
    phases: dict[str, list[float]] = {name: [] for name in ("ours", "encode", "apply", "check")}
    for repeat in range(args.repeats + 1):
        for name, work in (
            ("adamw", step_adamw),
            ("demo", step_demo),
            ("lookahead", look),
            ("fingerprint", ours.fingerprint),
        ):
            taken = machine.seconds(work)
            if repeat:
                times[name].append(taken)
        encoded = machine.seconds(encode)
        applied, checked = apply_seconds(ours, blobs, machine)
        if repeat:
            for name, taken in zip(phases, (encoded + applied + checked, encoded, applied, checked), strict=True):
                phases[name].append(taken)
    ns = {name: min(taken) / numel * 1e9 for name, taken in (times | phases).items()}
    adamw.state.clear()
    row = Row(
        size=size,
        parameters=numel,
        limit=(ENCODE_BYTES + APPLY_BYTES) / bandwidth * 1e9,
        demo_memory=machine.peak_memory(step_demo),
        our_memory=machine.peak_memory(step_ours),
        engine=ours._engine.name,
        **ns,
    )
    return row, list(scale(ours, machine, args, numel))


def apply_seconds(ours: DisTrO, blobs: list[bytes], machine: Machine) -> tuple[float, float]:
    """Seconds to apply updates, without and of the check of their bytes, which ends when the device has answered."""
    ours.report()
    whole = machine.seconds(lambda: ours.apply(blobs))
    checked = ours.report().seconds["check"]
    return whole - checked, checked


def scale(ours: DisTrO, machine: Machine, args: argparse.Namespace, numel: int) -> Iterator[Scaling]:
    blobs = random_updates(ours.layout, max(args.scaling, default=0))
    for members in args.scaling:
        taken = [apply_seconds(ours, blobs[:members], machine) for _ in range(args.repeats)]
        yield Scaling(members, *(min(ones) / numel * 1e9 for ones in zip(*taken, strict=True)))


def decode_speed(machine: Machine, topk: int, repeats: int) -> float:
    """Indices of a peer's update validated per second by one thread, as the network process does it (numpy arrays)."""
    layout = Layout.build([("w", (64 * 512, 64 * 16))], topk)
    blob = random_updates(layout, 1)[0]
    return layout.blocks * topk / min(machine.seconds(lambda: validate(blob, layout)) for _ in range(repeats + 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--sizes", nargs="+", choices=MODELS, default=["10M", "50M", "150M"])
    parser.add_argument("--topk", type=int, default=32)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--scaling", type=int, nargs="*", default=[4, 16, 64], help="numbers of members to apply")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", default="auto", help="of DisTrO: auto, torch, compiled, or triton on a GPU")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/optimizer.json"), help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = Machine(args.device)
    bandwidth = machine.copy_bandwidth()
    speed = decode_speed(machine, args.topk, args.repeats)
    print(f"{machine.name}, {args.threads} thread(s), PyTorch {torch.__version__}")
    print(f"copy {bandwidth / 1e9:.1f} GB/s; topk {args.topk}, {args.members} members; ns per parameter and step\n")
    head = (
        "size",
        "DeMo",
        "ours",
        "ratio",
        "limit",
        "encode",
        "check",
        "apply",
        "AdamW",
        "ahead",
        "print",
        "MB DeMo",
        "MB ours",
    )
    print("".join(f"{word:>9}" for word in head))
    rows, scalings = [], {}
    for size in args.sizes:
        row, scaling = measure(size, machine, args, bandwidth)
        rows.append(row)
        scalings[size] = scaling
        figures = (row.demo, row.ours, row.demo / row.ours, row.limit, row.encode, row.check, row.apply, row.adamw)
        figures = (*figures, row.lookahead, row.fingerprint)
        memory = f"{row.demo_memory / 1e6:>9.0f}{row.our_memory / 1e6:>9.0f}"
        print(f"{row.size:>9}" + "".join(f"{figure:>9.2f}" for figure in figures) + memory, flush=True)
    print("\nratio: DeMo / ours; ahead: lookahead; print: fingerprint; MB: above what is in use before a step")
    print(f"engine: {rows[0].engine}; limit: {ENCODE_BYTES + APPLY_BYTES} bytes per parameter at the speed of a copy")
    print(f"updates validated: {speed / 1e6:.0f} million indices/s by one thread")
    for size, scaling in scalings.items():
        told = ", ".join(f"{s.members} members {s.apply:.2f} + {s.check:.2f}" for s in scaling)
        print(f"{size}: apply + check in ns per parameter: {told}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine.name,
        "torch": torch.__version__,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "copy_bytes_per_second": bandwidth,
        "indices_per_second": speed,
        "rows": [asdict(row) for row in rows],
        "scaling": {size: [asdict(s) for s in scaling] for size, scaling in scalings.items()},
    }
    args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
