"""Loss against bytes: DisTrO with simulated members beside AdamW, same model, same data, same tokens per round.

    python benchmarks/convergence.py                      # about two minutes on one core
    python benchmarks/convergence.py --rounds 150 --sequences 80 --methods adamw distro-128

One process plays all members in turn: they share one copy of the weights (replicas are identical) and each has its own
momentum. The data is the standard library's documentation as a chat. Writes JSON, prints a table.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import SeedOssConfig, SeedOssForCausalLM

from optimizer import DisTrO
from psyche_node.data import Batch, PackedDataset, build_stdlib_chat, prepare, train_tokenizer

SEED = b"convergence benchmark".ljust(32, b"\0")


@dataclass(frozen=True, slots=True)
class Setting:
    """One column of the comparison: what is trained how. `topk` 0 is AdamW."""

    name: str
    lr: float
    topk: int = 0
    decay: float = 0.95
    overlap: bool = True
    lookahead: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    lr: float
    heldout: list[tuple[int, float]]
    train: list[float]
    bytes_per_round: int
    seconds: float


METHODS = {
    setting.name: setting
    for setting in (
        Setting("adamw", lr=2.5e-3),
        Setting("distro-32", lr=2.5e-3, topk=32),
        Setting("distro-128", lr=2.5e-3, topk=128),
        Setting("distro-256", lr=2.5e-3, topk=256),
        Setting("distro-128-waiting", lr=2.5e-3, topk=128, overlap=False),
        Setting("distro-128-blind", lr=2.5e-3, topk=128, lookahead=False),
    )
}


def make_model(vocabulary: int, hidden: int, layers: int, std: float, seed: int) -> SeedOssForCausalLM:
    torch.manual_seed(seed)
    return SeedOssForCausalLM(
        SeedOssConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden // 4,
            initializer_range=std,
            tie_word_embeddings=True,
            attention_dropout=0.0,
            residual_dropout=0.0,
            attention_bias=False,
            use_cache=False,
        )
    )


def loss_sum(model: SeedOssForCausalLM, batch: Batch, rows: slice) -> tuple[torch.Tensor, int]:
    """Summed loss over the trained tokens of some sequences; logits are computed only where there is a target."""
    tokens = torch.from_numpy(batch.tokens[rows])
    trained = torch.from_numpy(batch.trained[rows])[:, 1:]
    places = torch.from_numpy(batch.places[rows])
    hidden = model.model(input_ids=tokens, position_ids=places, use_cache=False).last_hidden_state[:, :-1]
    targets = tokens[:, 1:][trained]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[trained]), targets, reduction="sum"), len(targets)


def backward(model: SeedOssForCausalLM, batch: Batch, micro_batch: int = 8) -> float:
    """Clipped gradient of the mean loss over a batch; returns the loss."""
    total, tokens = 0.0, int(batch.trained[:, 1:].sum())
    for start in range(0, len(batch.tokens), micro_batch):
        loss = loss_sum(model, batch, slice(start, start + micro_batch))[0] / tokens
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def evaluate(model: SeedOssForCausalLM, batch: Batch, micro_batch: int = 8) -> float:
    parts = [loss_sum(model, batch, slice(i, i + micro_batch)) for i in range(0, len(batch.tokens), micro_batch)]
    return float(sum(loss.item() for loss, _ in parts) / sum(count for _, count in parts))


def schedule(args: argparse.Namespace, peak: float) -> Callable[[int], float]:
    """Linear warm-up, then linear decay to `--final` of the peak."""

    def at(round: int) -> float:
        if round < args.warmup:
            return peak * (round + 1) / args.warmup
        done = (round - args.warmup) / max(1, args.rounds - args.warmup)
        return float(peak * (1 - (1 - args.final) * done))

    return at


def run(setting: Setting, data: PackedDataset, args: argparse.Namespace) -> Result:
    started = time.monotonic()
    model = make_model(data.manifest.vocabulary, args.hidden, args.layers, args.std, args.seed)
    heldout, rate = data.heldout(args.heldout), schedule(args, setting.lr)
    step = _adamw(model, data, setting, args, rate) if not setting.topk else _distro(model, data, setting, args, rate)
    sizes, losses, curve = 0, [], []
    for round in range(args.rounds):
        loss, sizes = step(round)
        losses.append(loss)
        if (round + 1) % args.every == 0 or round + 1 == args.rounds:
            curve.append((round + 1, evaluate(model, heldout)))
            print(f"  {setting.name}: round {round + 1}, held-out loss {curve[-1][1]:.3f}", flush=True)
    return Result(setting.name, setting.lr, curve, losses, sizes, time.monotonic() - started)


Step = Callable[[int], tuple[float, int]]


def _adamw(
    model: SeedOssForCausalLM,
    data: PackedDataset,
    setting: Setting,
    args: argparse.Namespace,
    rate: Callable[[int], float],
) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, betas=(0.9, 0.95), weight_decay=0.0)
    dense = sum(p.numel() for p in model.parameters()) * 4

    def step(round: int) -> tuple[float, int]:
        optimizer.param_groups[0]["lr"] = rate(round)
        first = round * args.sequences
        loss = backward(model, data.batch(range(first, first + args.sequences), SEED))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss, dense

    return step


def _distro(
    model: SeedOssForCausalLM,
    data: PackedDataset,
    setting: Setting,
    args: argparse.Namespace,
    rate: Callable[[int], float],
) -> Step:
    members = [
        DisTrO(
            model.named_parameters(),
            lr=setting.lr,
            decay=setting.decay,
            topk=setting.topk,
            overlap=setting.overlap,
            lookahead=setting.lookahead,
        )
        for _ in range(args.members)
    ]
    travelling: dict[int, list[bytes]] = {}
    share = args.sequences // args.members

    def step(round: int) -> tuple[float, int]:
        blobs, total = [], 0.0
        for member, optimizer in enumerate(members):
            optimizer.set_lr(rate(round))
            first = round * args.sequences + member * share
            with optimizer.lookahead():
                total += backward(model, data.batch(range(first, first + share), SEED))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            blobs.append(optimizer.encode(run=SEED, round=round, member=member))
        travelling[round] = blobs
        last = round + 1 == args.rounds
        for due in sorted(travelling):
            if due < round or not setting.overlap or last:
                members[0].apply(travelling.pop(due), lr=rate(due))
                for optimizer in members:
                    optimizer.settle(due)
        return total / args.members, len(blobs[0])

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["adamw", "distro-32", "distro-128"])
    parser.add_argument("--lr", type=float, nargs="*", default=[], help="peak learning rates to try with every method")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--sequences", type=int, default=16, help="per round, of all members together")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--std", type=float, default=0.06, help="of the initial weights; counts for more than topk")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--final", type=float, default=0.05, help="last learning rate, as a fraction of the peak")
    parser.add_argument("--heldout", type=int, default=64, help="held-out sequences")
    parser.add_argument("--every", type=int, default=20, help="rounds between evaluations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/convergence.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build_stdlib_chat(root / "chat.jsonl")
        train_tokenizer(root / "chat.jsonl", args.vocabulary, root / "tokenizer")
        prepare(root / "chat.jsonl", root / "tokenizer", root / "data", args.length)
        data = PackedDataset(root / "data")
        chosen = [METHODS[name] for name in args.methods]
        settings = [replace(s, lr=lr) for s in chosen for lr in args.lr] if args.lr else chosen
        results = [run(setting, data, args) for setting in settings]
        entropy = data.manifest.unigram_entropy
    best = min((r for r in results if r.name == "adamw"), key=lambda r: r.heldout[-1][1], default=results[0])
    print(f"\n{args.rounds} rounds, {args.members} members, {args.sequences} x {args.length} tokens per round")
    print(f"entropy of single tokens: {entropy:.3f} nats\n")
    print(f"{'method':<20} {'peak lr':>8} {'held-out':>9} {'to ' + best.name:>9} {'bytes/round':>12} {'seconds':>8}")
    for result in results:
        final = result.heldout[-1][1]
        more = 100 * (final / best.heldout[-1][1] - 1)
        sent, seconds = f"{result.bytes_per_round:,}", result.seconds
        print(f"{result.name:<20} {result.lr:>8.4f} {final:>9.3f} {more:>+8.1f}% {sent:>12} {seconds:>8.0f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings_used = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    report = {"settings": settings_used, "unigram_entropy": entropy, "results": [asdict(r) for r in results]}
    args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
