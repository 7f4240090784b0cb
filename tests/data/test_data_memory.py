"""Memory does not grow with the data: neither the loader's nor, but for lengths, that of a preparation."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from psyche_node.data import Manifest, shards
from psyche_node.data.manifest import Counts, Form, Shard, Source
from psyche_node.data.spill import Spill

LENGTH = 4096
SEQUENCES = 4096  # of one file: 48 MiB
MIB = 1 << 20


def sparse(folder: Path, files: int) -> Path:
    """A prepared folder of ``files`` files, all of which are one sparse file of zeros."""
    folder.mkdir()
    size = SEQUENCES * LENGTH * 3
    zeros, state = bytes(MIB), hashlib.sha256()
    for _ in range(size // MIB):
        state.update(zeros)
    name = f"{state.hexdigest()}.bin"
    with (folder / name).open("wb") as file:
        file.truncate(size)
    manifest = Manifest(
        sources=(Source(sha256="0" * 64, counts=Counts(train=1, samples=1)),),
        tokenizer="0" * 64, vocabulary=400, pad=0,
        sequence_length=LENGTH, token_bytes=2, seed=0, heldout_fraction=0, too_long="drop",
        train=(Shard(file=name, sequences=SEQUENCES),) * files, heldout=(), tokens=0, trained_tokens=0,
        heldout_trained_tokens=0, efficiency=0, unigram_entropy=0,
    )  # fmt: skip
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return folder


READ = """
import json, sys
from pathlib import Path
from psyche_node.data import PackedDataset

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

dataset = PackedDataset(Path(sys.argv[1]))
most = anonymous()
for start in range(0, len(dataset), len(dataset) // 16):
    batch = dataset.batch(range(start, start + 8), b"seed")
    most = max(most, anonymous())
print(json.dumps([len(dataset), most]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_the_loader_needs_as_much_memory_for_a_gigabyte_as_for_a_little(tmp_path: Path) -> None:
    found = []
    for files in (1, 24):
        folder = sparse(tmp_path / str(files), files)
        done = subprocess.run([sys.executable, "-c", READ, str(folder)], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    (few, small), (many, large) = found
    assert many == 24 * few == 24 * SEQUENCES
    assert abs(large - small) < 8 * 1024, f"{small} and {large} KiB"


def test_a_preparation_holds_one_file_and_the_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", MIB)
    rng = np.random.default_rng(0)
    lengths = rng.integers(200, 4000, 6000)
    with Spill(tmp_path) as spill:
        tracemalloc.start()
        try:
            for length in lengths.tolist():
                document = np.arange(length, dtype=np.uint32) % 400
                spill.append((document, document % 3 != 0), heldout=False)
            form = Form(LENGTH, 2, 0)
            written = shards.write_shards(tmp_path, spill.reader(), spill.numbers(heldout=False), form, 400)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert written.tokens == lengths.sum()
    assert spill.tokens * 4 > 48 * MIB, "what lay on disk"
    assert peak < 20 * MIB
    assert len(written.shards) > 30
