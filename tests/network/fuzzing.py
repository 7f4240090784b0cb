"""Hostile bytes for everything that reads the wire: in the tests some hundred, by `make nightly` a million.

python tests/network/fuzzing.py 1000000                every target in turn, random inputs
python tests/network/fuzzing.py 1000000 --coverage     the same, guided by coverage (needs atheris)

An input is bytes; a target builds a valid message from them, changes it in a few places, signs it with a known key (so
that what lies behind the signature is reached, too), and hands it over. Only the errors that a reader declares may come
out. An input that takes longer than SECONDS, or for which more than MEMORY bytes are allocated, is a failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import itertools
import random
import signal
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzzing_inputs import Input
from fuzzing_targets import Targets, targets

SECONDS = 20
MEMORY = 24 << 20


def _hangs(number: int, frame: object) -> None:
    raise AssertionError(f"an input took longer than {SECONDS} s")


def attempt(all_targets: Targets, name: str, data: bytes, watched: bool) -> bool:
    """Hand one input to one target within the bounds of time and, if ``watched``, of memory. Says what was wrong."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    if watched:
        tracemalloc.start()
    try:
        accepted = all_targets.all[name](Input(data))
        if watched:
            peak = tracemalloc.get_traced_memory()[1]
            assert peak <= MEMORY, f"{peak} bytes were allocated"
        return accepted
    except BaseException:
        print(f"target {name}, input {data.hex()}", file=sys.stderr)
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if watched:
            tracemalloc.stop()


def run(inputs: int, seed: int = 20261127) -> dict[str, float]:
    """Try so many random inputs, all targets in turn; return the share that each accepted.

    Raises AssertionError, or whatever should not have come out.
    """
    generator = random.Random(seed)
    began = time.monotonic()
    spent, accepted, tried = dict[str, float](), dict[str, int](), dict[str, int]()
    signal.signal(signal.SIGALRM, _hangs)
    with targets() as all_targets:
        names = itertools.cycle(all_targets.all)
        for number in range(inputs):
            name, data = next(names), generator.randbytes(generator.choice((8, 40, 120, 400)))
            started = time.perf_counter()
            # One input in a hundred: watching the memory costs several times the input.
            taken = attempt(all_targets, name, data, watched=number // len(all_targets.all) % 100 == 0)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
            accepted[name] = accepted.get(name, 0) + taken
            tried[name] = tried.get(name, 0) + 1
    seconds = time.monotonic() - began
    print(f"{inputs} inputs in {seconds:.1f} s, {inputs / seconds:.0f} a second: each accepted or refused")
    for name, count in tried.items():
        print(f"  {name:13} {count / spent[name]:7.0f} a second, {accepted[name] / count:6.1%} accepted")
    return {name: accepted[name] / count for name, count in tried.items()}


def _functions() -> Iterator[Any]:
    """The functions and methods of this project that read what comes from outside."""
    for name, module in list(sys.modules.items()):
        if name != "psyche_node.ipc" and (not name.startswith("psyche_node.network.") or ".wire" in name):
            continue
        own = [item for item in vars(module).values() if getattr(item, "__module__", None) == name]
        for item in own:
            for one in vars(item).values() if inspect.isclass(item) else [item]:
                plain = getattr(one, "__func__", one)
                if inspect.isfunction(plain):
                    yield plain


def guided(inputs: int, seed: int) -> None:
    """The same, guided by coverage of this project's network code. Ends the process."""
    import atheris  # type: ignore[import-not-found]

    for function in _functions():
        atheris.instrument_func(function)
    with targets() as all_targets, tempfile.TemporaryDirectory() as corpus:
        names = list(all_targets.all)
        generator = random.Random(seed)
        for number in range(40 * len(names)):
            (Path(corpus) / str(number)).write_bytes(bytes([number % len(names)]) + generator.randbytes(120))

        def one(data: bytes) -> None:
            if data:
                all_targets.all[names[data[0] % len(names)]](Input(data[1:]))

        options = [f"-atheris_runs={inputs}", f"-seed={seed}", "-max_len=400", f"-timeout={SECONDS}"]
        atheris.Setup([sys.argv[0], corpus, *options, "-rss_limit_mb=2048", "-print_final_stats=1"], one)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=int, nargs="?", default=10_000)
    parser.add_argument("--seed", type=int, default=20261127)
    parser.add_argument("--coverage", action="store_true", help="guided by coverage")
    arguments = parser.parse_args()
    if arguments.coverage and importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (it has wheels for Linux on x86-64): no run guided by coverage")
    elif arguments.coverage:
        guided(arguments.inputs, arguments.seed)
    else:
        run(arguments.inputs, arguments.seed)


if __name__ == "__main__":
    main()
