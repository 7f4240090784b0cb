"""Prepared folders: what is in them, that they are what they say, and what becomes of every sample."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from psyche_node.data import ChatTemplate, DataError, DataMismatch, PackedDataset, prepare, read_samples
from psyche_node.data.manifest import Manifest, unigram_entropy

LENGTH = 96
SEED = b"order"


@pytest.fixture(scope="module")
def packed(chat: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    prepare(chat, tokenizer, out, LENGTH, heldout=0.1)
    return out


def documents(dataset: PackedDataset, *, heldout: bool) -> Counter[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """The documents of one pass (or of the held-out split), padding left out."""
    batch = dataset.heldout() if heldout else dataset.batch(range(len(dataset)), SEED)
    found: Counter[tuple[tuple[int, ...], tuple[bool, ...]]] = Counter()
    for tokens, trained, places in zip(batch.tokens, batch.trained, batch.places, strict=True):
        for ids, mask in zip(*(np.split(v, np.flatnonzero(places == 0)[1:]) for v in (tokens, trained)), strict=True):
            if mask.any():
                found[tuple(ids.tolist()), tuple(mask.tolist())] += 1
            else:
                assert set(ids.tolist()) == {dataset.manifest.pad}, "only padding is never trained on"
    return found


def test_every_sample_comes_once_on_one_side_with_its_mask(chat: Path, tokenizer: Path, packed: Path) -> None:
    dataset = PackedDataset(packed)
    encoded = ChatTemplate(tokenizer).encode(list(read_samples(chat)))
    fitting = Counter((tuple(i.tolist()), tuple(t.tolist())) for i, t in encoded if len(i) <= LENGTH)
    train, held = documents(dataset, heldout=False), documents(dataset, heldout=True)
    assert train + held == fitting
    counts = dataset.manifest.counts
    assert counts.samples == 200 == counts.train + counts.heldout + counts.too_long + counts.untrained
    assert (counts.train, counts.heldout) == (train.total(), held.total())
    assert 8 <= counts.heldout <= 35
    assert counts.too_long == 200 - fitting.total()
    assert dataset.manifest.tokens == sum(len(ids) * n for (ids, _), n in train.items())
    assert dataset.manifest.trained_tokens == sum(sum(mask) * n for (_, mask), n in train.items())


def test_entropy_of_the_trained_tokens(packed: Path) -> None:
    dataset = PackedDataset(packed)
    counts: Counter[int] = Counter()
    for (ids, mask), times in documents(dataset, heldout=False).items():
        counts.update(Counter(t for t, m in zip(ids, mask, strict=True) if m for _ in range(times)))
    total = counts.total()
    expected = -sum(c / total * math.log(c / total) for c in counts.values())
    assert dataset.manifest.unigram_entropy == pytest.approx(expected, abs=2e-9)
    assert unigram_entropy({3: 5, 4: 5}) == pytest.approx(math.log(2), abs=1e-9)
    assert unigram_entropy({3: 9}) == 0.0 == unigram_entropy({})


def test_each_pass_is_another_permutation(packed: Path) -> None:
    dataset = PackedDataset(packed)
    n = len(dataset)
    first, second = dataset.indices(range(n), SEED), dataset.indices(range(n, 2 * n), SEED)
    assert sorted(first) == sorted(second) == list(range(n))
    assert first != second
    assert first != dataset.indices(range(n), b"another order")
    one = dataset.sample(n + 3, SEED)
    assert np.array_equal(one.tokens, dataset.batch([0, n + 3], SEED).tokens[1:])
    with pytest.raises(ValueError, match="negative"):
        dataset.indices([-1], SEED)


def test_the_same_inputs_give_the_same_bytes(chat: Path, tokenizer: Path, packed: Path, tmp_path: Path) -> None:
    manifest = prepare(chat, tokenizer, tmp_path, LENGTH, heldout=0.1)
    assert manifest.digest == PackedDataset(packed).digest
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(packed))
    other = prepare(chat, tokenizer, tmp_path / "other", LENGTH, heldout=0.1, seed=1)
    assert other.digest != manifest.digest
    assert other.counts.heldout != 0


def test_adding_a_sample_moves_no_other_across_the_split(
    chat: Path, tokenizer: Path, packed: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more.jsonl"
    more.write_bytes(b'{"prompt": "new", "completion": "sample"}\n' + chat.read_bytes())
    prepare(more, tokenizer, tmp_path / "out", LENGTH, heldout=0.1)
    before = documents(PackedDataset(packed), heldout=True)
    after = documents(PackedDataset(tmp_path / "out"), heldout=True)
    assert not before - after
    assert (after - before).total() <= 1


def test_a_changed_file_is_named(chat: Path, tokenizer: Path, tmp_path: Path) -> None:
    manifest = prepare(chat, tokenizer, tmp_path, LENGTH)
    shard = tmp_path / manifest.heldout[0].file
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 2]))
    with pytest.raises(DataMismatch, match=manifest.heldout[0].file):
        PackedDataset(tmp_path)
    shard.write_bytes(good[:-1])
    with pytest.raises(DataMismatch, match=rf"{manifest.heldout[0].file} has \d+ bytes, not \d+"):
        PackedDataset(tmp_path)
    shard.unlink()
    with pytest.raises(DataMismatch, match=rf"{manifest.heldout[0].file} cannot be read"):
        PackedDataset(tmp_path)
    shard.write_bytes(good)
    PackedDataset(tmp_path, expect=manifest.digest)
    with pytest.raises(DataMismatch, match="but the run trains on 0000"):
        PackedDataset(tmp_path, expect=bytes(32))


@pytest.mark.parametrize("where", ["tokens", "flags", "shorter", "gone"])
def test_what_changes_while_it_is_used_is_named_before_it_is_trained_on(
    chat: Path, tokenizer: Path, tmp_path: Path, where: str
) -> None:
    manifest = prepare(chat, tokenizer, tmp_path, LENGTH)
    data = PackedDataset(tmp_path)
    whole = data.batch(range(len(data)), SEED)
    shard = tmp_path / manifest.train[0].file
    row = len(data) // 2
    with shard.open("r+b") as file:
        if where == "shorter":
            file.truncate(len(data) * LENGTH)
        else:
            at = row * LENGTH + 7 if where == "flags" else (row * LENGTH + 7) * manifest.token_bytes
            file.seek(at + (len(data) * LENGTH * manifest.token_bytes if where == "flags" else 0))
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
    if where == "gone":
        shard.unlink()
    others = [p for p in range(len(data)) if data.indices([p], SEED) != [row]]
    said = {"shorter": "bytes, not", "gone": "cannot be read"}.get(where, f"its sequence {row} is another one")
    with pytest.raises(DataMismatch, match=rf"{shard.name} .*{said}"):
        data.batch(range(len(data)), SEED)
    if where in ("tokens", "flags"):
        same = data.batch(others, SEED)
        assert np.array_equal(same.tokens, whole.tokens[others]), "what is sound is still read"
        assert np.array_equal(same.trained, whole.trained[others])


def test_an_edited_manifest_is_refused(chat: Path, tokenizer: Path, tmp_path: Path) -> None:
    manifest = prepare(chat, tokenizer, tmp_path, LENGTH)
    path = tmp_path / "manifest.json"
    values = json.loads(path.read_bytes())
    path.write_text(json.dumps(values))
    with pytest.raises(DataMismatch, match="edited"):
        Manifest.read(tmp_path)
    values["train"][0]["file"] = "../../etc/passwd"
    path.write_text(json.dumps(values))
    with pytest.raises(DataMismatch, match="not a manifest"):
        Manifest.read(tmp_path)
    path.write_bytes(manifest.to_bytes())
    assert Manifest.read(tmp_path) == manifest
    path.unlink()
    with pytest.raises(DataError, match=r"has no prepared data in it: there is no manifest\.json"):
        Manifest.read(tmp_path)


def test_what_is_no_folder_of_prepared_data_is_called_what_it_is(tmp_path: Path) -> None:
    chats, own = tmp_path / "chats.jsonl", tmp_path / "own"
    chats.touch()
    own.mkdir()
    (own / "config.json").touch()
    said = {
        chats: f"{chats} is a file, and no folder of prepared data.*psyche-node data prepare {chats} --tokenizer",
        own: f"{own} is a model's folder: there is no manifest",
        tmp_path / "nowhere": f"there is no folder {tmp_path / 'nowhere'}",
    }
    for folder, words in said.items():
        with pytest.raises(DataError, match=words):
            Manifest.read(folder)


def test_preparing_again_leaves_nothing_of_the_last_time(chat: Path, tokenizer: Path, tmp_path: Path) -> None:
    first = prepare(chat, tokenizer, tmp_path, LENGTH)
    (tmp_path / "notes.bin").write_bytes(b"not ours")
    second = prepare(chat, tokenizer, tmp_path, 2 * LENGTH)
    files = {shard.file for shard in (*second.train, *second.heldout)}
    assert set(os.listdir(tmp_path)) == {*files, "chat_template.jinja", "manifest.json", "notes.bin"}
    assert first.train[0].file not in files


def test_too_long_is_dropped_or_cut_and_counted(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    records = [{"prompt": "q", "completion": "alpha " * n} for n in (2, 60, 61)]
    records.append({"prompt": "alpha " * 60, "completion": "a"})
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    dropped = prepare(path, tokenizer, tmp_path / "d", 48, heldout=0).counts
    assert (dropped.train, dropped.too_long, dropped.cut, dropped.untrained) == (1, 3, 0, 0)
    cut = prepare(path, tokenizer, tmp_path / "c", 48, heldout=0, too_long="cut").counts
    assert (cut.train, cut.too_long, cut.cut, cut.untrained) == (3, 0, 2, 1), (
        "a prompt that leaves no answer trains nothing"
    )
    with pytest.raises(DataError, match="no sample can be trained on: of 4, 4 with more than"):
        prepare(path, tokenizer, tmp_path / "n", 4)
    with pytest.raises(DataError, match="not in"):
        prepare(path, tokenizer, tmp_path / "n", 48, heldout=1.0)


def test_a_small_set_still_holds_something_out(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q", "completion": w}) + "\n" for w in ("a", "b", "c")))
    counts = prepare(path, tokenizer, tmp_path / "out", 48, heldout=0.0001).counts
    assert (counts.train, counts.heldout) == (2, 1)


def test_what_a_small_set_holds_out_is_not_trained_on(tokenizer: Path, tmp_path: Path) -> None:
    """A sample goes across with its duplicates, whichever file they are in, and a group goes as a whole."""
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    lines = [json.dumps({"prompt": "q", "completion": w}) + "\n" for w in "abc"]
    first.write_text("".join(lines * 2))
    second.write_text("".join(lines))
    manifest = prepare([first, second], tokenizer, tmp_path / "out", 48, heldout=1e-9)
    assert [(one.counts.train, one.counts.heldout) for one in manifest.sources] == [(4, 2), (2, 1)]
    data = PackedDataset(tmp_path / "out")
    assert not documents(data, heldout=True).keys() & documents(data, heldout=False).keys()

    first.write_text(lines[0] * 3)
    counts = prepare(first, tokenizer, tmp_path / "same", 48, heldout=1e-9).counts
    assert (counts.train, counts.heldout) == (3, 0), "of duplicates alone nothing can be held out"


def test_samples_of_a_group_stay_together(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    lines = [{"prompt": f"{g} {i}", "completion": "a", "group": f"g{g}"} for g in range(40) for i in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = prepare(path, tokenizer, tmp_path / "out", 48, heldout=0.2).counts
    assert counts.heldout % 5 == 0 < counts.heldout < 200


GOLDEN_SHARD = "34b68be1cd3f0f2c65c2686e7e805eea712abe10c55fee62854ca5231d0c78ee.bin"


def test_known_bytes(tokenizer: Path, tmp_path: Path) -> None:
    """The format of a shard, and which sequence lies where, are part of what a run's data is."""
    path = tmp_path / "tokens.jsonl"
    lines = [{"input_ids": [(7 * n + i) % 300 for i in range(2 + n * n % 13)]} for n in range(30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = prepare(path, tokenizer, tmp_path / "out", 16, heldout=0)
    assert [shard.file for shard in manifest.train] == [GOLDEN_SHARD]
    assert (manifest.format, manifest.pad, manifest.token_bytes) == (4, 2, 2)


def test_sequences_lie_in_order_of_attention_cost(packed: Path) -> None:
    dataset = PackedDataset(packed)
    batch = dataset.batch(range(len(dataset)), SEED)
    number = np.cumsum(batch.places == 0, axis=1)
    padding = batch.tokens == dataset.manifest.pad
    lengths = [np.bincount(row[~pad]) for row, pad in zip(number, padding, strict=True)]
    costs = np.empty(len(dataset), dtype=np.int64)
    costs[dataset.indices(range(len(dataset)), SEED)] = [int((one**2).sum()) for one in lengths]
    assert (np.diff(costs) >= 0).all()


@pytest.mark.parametrize("threads", ["1", "5"])
def test_the_number_of_threads_changes_no_byte(
    threads: str, chat: Path, tokenizer: Path, packed: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "psyche_node.cli", "data", "prepare", str(chat), "--json", "--heldout", "0.1"]
    options = ["--tokenizer", str(tokenizer), "--out", str(tmp_path), "--sequence-length", str(LENGTH)]
    environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=500, env=environment)
    assert json.loads(done.stdout)["manifest"] == PackedDataset(packed).digest.hex(), done.stderr
