"""Tables of finished runs: best learning rate of each line, mean and spread over seeds, gap to AdamW."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any

_COLUMNS = ("method", "lr", "held-out", "spread", "seeds", "to AdamW", "train", "B/param", "left out")


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """One table per size of run; gaps are to the best AdamW of that size on the same seeds."""
    sizes: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        sizes[_size(record["trial"])].append(record)
    return "\n\n".join(_one(size, group) for size, group in sizes.items())


def _size(trial: Mapping[str, Any]) -> str:
    scale = trial["scale"]
    start = f", continuing {trial['after']} rounds of AdamW" if trial["after"] else ""
    return (
        f"hidden {scale['hidden']}, {scale['layers']} layers; {trial['rounds']} rounds of {trial['sequences']} x "
        f"{scale['length']} tokens, {trial['members']} members{start}"
    )


def _one(size: str, records: list[Mapping[str, Any]]) -> str:
    by_line: dict[tuple[str, float], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for record in records:
        by_line[record["label"], record["trial"]["recipe"]["lr"]][record["trial"]["seed"]] = record
    best: dict[str, tuple[float, dict[int, Mapping[str, Any]]]] = {}
    for (label, lr), seeds in by_line.items():
        loss = mean(record["heldout"] for record in seeds.values())
        shown = best.get(label)
        if shown is None or (-len(seeds), loss) < (-len(shown[1]), mean(r["heldout"] for r in shown[1].values())):
            best[label] = lr, seeds
    baselines = [
        seeds for _, seeds in best.values() if all(_undelayed_adamw(record["trial"]) for record in seeds.values())
    ]
    parameters = records[0]["parameters"]
    lines = [f"{parameters:,} parameters, {size}", f"{_COLUMNS[0]:<40}" + "".join(f"{c:>10}" for c in _COLUMNS[1:])]
    for label, (lr, seeds) in best.items():
        losses = [record["heldout"] for record in seeds.values()]
        cells = [
            f"{lr:g}",
            f"{mean(losses):.3f}",
            f"{(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else "",
            f"{len(losses)}",
            _gap(seeds, baselines),
            f"{mean(record['train'] for record in seeds.values()):.3f}",
            f"{next(iter(seeds.values()))['bytes_per_round'] / parameters:.4f}",
            f"{sum(record['left_out'] for record in seeds.values())}",
        ]
        lines.append(f"{label:<40}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def _undelayed_adamw(trial: Mapping[str, Any]) -> bool:
    return bool(trial["method"] == "adamw" and not trial["recipe"]["overlap"])


def _gap(seeds: Mapping[int, Mapping[str, Any]], baselines: list[dict[int, Mapping[str, Any]]]) -> str:
    """Percent above the best AdamW, on seeds that both have."""
    best = None
    for baseline in baselines:
        common = seeds.keys() & baseline.keys()
        if common:
            loss = mean(baseline[seed]["heldout"] for seed in common)
            gap = 100 * (mean(seeds[seed]["heldout"] for seed in common) / loss - 1)
            best = gap if best is None else max(best, gap)
    return "" if best is None else f"{best:+.1f}%"
