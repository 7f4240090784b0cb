"""A node with other data does not join, and says which file differs; `psyche-node data check` says so beforehand."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner
from web import served

from psyche_node.cli import app
from psyche_node.data import Manifest, PackedDataset, prepare, readers
from psyche_node.data.errors import BadSample
from psyche_node.data.skipping import Skips
from psyche_node.exits import Exit, exit_for
from psyche_node.ipc import Endpoint, RemoteFailure
from psyche_node.training import messages as m
from psyche_node.training.terms import TrainingTerms

LENGTH = 96


@pytest.fixture(scope="module")
def owners(chat: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("owners")
    prepare(chat, tokenizer, out, LENGTH)
    return out


@pytest.fixture
def mine(chat: Path, tokenizer: Path, tmp_path: Path) -> Path:
    """Prepared from a file with one word more."""
    (tmp_path / "chat.jsonl").write_text(chat.read_text().replace("Say 7:", "Say seven:"))
    prepare(tmp_path / "chat.jsonl", tokenizer, tmp_path / "mine", LENGTH)
    return tmp_path / "mine"


def refusal(folder: Path, expected: bytes, source: str) -> RemoteFailure:
    """What a node's training process answers when it is told to load ``folder``."""

    async def scenario() -> RemoteFailure:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "psyche_node.trainer", "--fd", str(theirs.fileno()), "--threads", "1"]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
        theirs.close()
        endpoint = await Endpoint.over("training", ours, lambda event: None)
        terms = TrainingTerms(total_rounds=1, peak_lr_bits=0, final_lr_bits=0)
        load = m.Load(model="none", data=str(folder), terms=terms, data_manifest=expected.hex(), data_source=source)
        try:
            with pytest.raises(RemoteFailure) as caught:
                await endpoint.call(load, m.Loaded)
        finally:
            await endpoint.close()
            await asyncio.to_thread(process.wait, timeout=90)
        return caught.value

    return asyncio.run(scenario())


def test_a_node_names_the_first_file_that_differs_from_the_published_data(owners: Path, mine: Path) -> None:
    published = {f"/data/{name}": (owners / name).read_bytes() for name in ("manifest.json",)}
    with served(published) as web:
        failure = refusal(mine, Manifest.read(owners).digest, f"{web.url}/data")
    ours, theirs = Manifest.read(mine), Manifest.read(owners)
    assert exit_for(failure) is Exit.DATA_MISMATCH
    text = str(failure)
    assert f"{mine} holds the data {ours.digest.hex()}, but the run trains on {theirs.digest.hex()}" in text
    first = f"The first file that differs is {mine / ours.train[0].file} (training file 1 of 1)"
    assert f"{first}; the run's is {theirs.train[0].file}" in text
    assert f"source file 1 of 1 has SHA-256 {ours.sources[0].sha256}, the run's {theirs.sources[0].sha256}" in text


def test_a_node_names_the_file_that_is_damaged(owners: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(owners, copy)
    manifest = Manifest.read(copy)
    victim = copy / manifest.train[0].file
    victim.write_bytes(b"\xff" + victim.read_bytes()[1:])
    failure = refusal(copy, manifest.digest, "")
    assert exit_for(failure) is Exit.DATA_MISMATCH
    assert f"{victim} does not hold the bytes that its name says" in str(failure)


def test_without_published_data_it_says_how_to_compare(owners: Path, mine: Path) -> None:
    with pytest.raises(Exception, match=r"get the run's manifest\.json from its owner: `psyche-node data check"):
        PackedDataset(mine, Manifest.read(owners).digest, published="a path of the owner's")
    with served({"/manifest.json": (mine / "manifest.json").read_bytes()}) as web:
        with pytest.raises(Exception, match="is not the run's either"):
            PackedDataset(mine, Manifest.read(owners).digest, published=web.url)
        with pytest.raises(Exception, match=r"could not be compared: .* answers 404"):
            PackedDataset(mine, Manifest.read(owners).digest, published=f"{web.url}/elsewhere")


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["data", *words])
    return done.exit_code, done.output


def test_check_compares_with_a_manifest_a_folder_or_a_digest(
    owners: Path, mine: Path, chat: Path, tokenizer: Path, tmp_path: Path
) -> None:
    digest = Manifest.read(owners).digest.hex()
    for good in (digest, str(owners), str(owners / "manifest.json")):
        code, output = run("check", str(owners), "--against", good, "--json")
        assert code == 0
        assert json.loads(output)["manifest"] == digest
    code, output = run("check", str(mine), "--against", digest)
    assert code == Exit.DATA_MISMATCH
    mistyped = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    code, output = run("check", str(owners), "--against", mistyped)
    assert code == Exit.DATA_MISMATCH
    assert f"holds the data {digest}, but the run trains on {mistyped}" in output
    code, output = run("check", str(mine), "--against", str(owners))
    assert code == Exit.DATA_MISMATCH
    assert f"The first file that differs is {mine / Manifest.read(mine).train[0].file}" in output
    other = tmp_path / "longer"
    prepare(chat, tokenizer, other, 2 * LENGTH)
    code, output = run("check", str(other), "--against", str(owners))
    assert code == Exit.DATA_MISMATCH
    assert f"the sequence length is {2 * LENGTH}, the other's {LENGTH}" in output
    (mine / Manifest.read(mine).heldout[0].file).unlink()
    code, output = run("check", str(mine))
    assert code == Exit.DATA_MISMATCH
    assert f"{mine / Manifest.read(mine).heldout[0].file} cannot be read" in output


@pytest.mark.parametrize("replace", [[], ["--replace"]])
def test_a_folder_of_something_else_is_not_written_into(
    chat: Path, tokenizer: Path, tmp_path: Path, replace: list[str]
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    words = ["prepare", str(chat), "--tokenizer", str(tokenizer), "--out", str(out), "--sequence-length", str(LENGTH)]
    (out / "config.json").write_text("{}")
    code, output = run(*words, *replace)
    assert (code, "is not empty, and holds no prepared data" in " ".join(output.split())) == (Exit.DATA, True)
    assert [path.name for path in out.iterdir()] == ["config.json"]
    (out / "config.json").rename(out / f"{'0' * 64}.bin")
    assert run(*words, *replace)[0] == 0, "what a preparation left that was stopped is no obstacle"


def test_prepare_says_what_became_of_every_sample(chat: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"text": "plain words"}\n' + json.dumps({"text": "alpha " * 400}) + "\n")
    words = ["prepare", str(chat), str(tmp_path / "more.jsonl"), "--tokenizer", str(tokenizer)]
    words += ["--sequence-length", str(LENGTH)]
    code, output = run(*words, "--out", str(tmp_path / "a"), "--json")
    assert code == 0, output
    values = json.loads(output.splitlines()[-1])
    assert [Path(one["file"]).name for one in values["sources"]] == ["chat.jsonl", "more.jsonl"]
    assert values["sources"][1]["counts"] == {
        "samples": 2, "train": 1, "heldout": 0, "too_long": 1, "untrained": 0, "bad": 0, "cut": 0, "closed": 0
    }  # fmt: skip
    assert values["manifest"] == Manifest.read(tmp_path / "a").digest.hex()
    code, output = run(*words, "--out", str(tmp_path / "b"), "--too-long", "cut")
    assert code == 0, output
    assert "more than 96 tokens: cut to fit" in output
    assert Manifest.read(tmp_path / "b").digest.hex() in output
    cut = Manifest.read(tmp_path / "b")
    code, output = run(*words, "--out", str(tmp_path / "b"))
    assert (code, "b holds prepared data already" in output, "--replace" in output) == (Exit.DATA, True, True)
    assert Manifest.read(tmp_path / "b") == cut
    assert run(*words, "--out", str(tmp_path / "b"), "--replace")[0] == 0
    assert Manifest.read(tmp_path / "b") == Manifest.read(tmp_path / "a")
    code, output = run("prepare", str(tmp_path / "none"), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "c"))
    assert code == Exit.DATA
    assert "there is no such file or folder" in output


def test_bad_samples_are_passed_over_up_to_a_number(
    seed_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind: no JSON, too long a line, no sample, refused by the template, beyond the vocabulary."""
    monkeypatch.setattr(readers, "MAX_LINE", 300)
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
                        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")  # fmt: skip
    good = [json.dumps({"prompt": "q", "completion": f"answer {n}"}) for n in range(8)]
    refused = {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}
    bad = ["{", json.dumps({"text": "x" * 700}), '{"no": 1}', json.dumps(refused), '{"input_ids": [1, 99999]}']
    (tmp_path / "bad.jsonl").write_text("\n".join([*good[:3], *bad, *good[3:]]))
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    words = ["prepare", "--tokenizer", str(seed_tokenizer), "--sequence-length", "64", "--template", str(template)]

    def prepared(name: str, *more: str) -> tuple[int, str]:
        return run(*words, str(tmp_path / f"{name}.jsonl"), "--out", str(tmp_path / "".join([name, *more])), *more)

    code, output = prepared("bad")
    assert (code, "bad.jsonl:4: this is not JSON" in output, "--skip-bad N" in output) == (Exit.DATA, True, True)
    code, output = prepared("bad", "--skip-bad", "4")
    assert (code, "Passed over before it: 4 bad samples;" in output) == (Exit.DATA, True)
    assert prepared("bad", "--skip-bad", "most")[0] == Exit.USAGE

    code, output = prepared("bad", "--skip-bad", "all", "--json")
    values = json.loads(output.splitlines()[-1])
    assert (code, values["counts"]["samples"], values["counts"]["bad"]) == (0, 13, 5)
    places = [where.rpartition(":")[2] for one in values["bad"] for where in one["places"]]
    assert sorted(places) == ["4", "5", "6", "7", "8"]
    code, output = prepared("bad", "--skip-bad", "5")
    assert (code, "bad.jsonl:7)" in output, "no tools" in output) == (0, True, True)
    assert Manifest.read(tmp_path / "bad--skip-bad5").digest.hex() == values["manifest"], "the bound changes nothing"
    assert prepared("good")[0] == 0
    mine, other = (Manifest.read(tmp_path / name) for name in ("bad--skip-bad5", "good"))
    assert (mine.train, mine.heldout) == (other.train, other.heldout)
    (tmp_path / "none.jsonl").write_text("\n".join(bad[:3:2]))
    code, output = prepared("none", "--skip-bad", "all")
    assert (code, "no good sample in it; the first record is bad: " in output) == (Exit.DATA, True)
    assert "none.jsonl:1: this is not JSON" in output


def test_bad_samples_are_told_by_reason_with_a_few_places_each() -> None:
    skips = Skips(None)
    for line in range(1, 8):
        skips(BadSample(f"a.jsonl:{line}", f"this is not JSON from column {line} on", "Mend it"))
    skips(BadSample("a.jsonl:9", "`messages` is empty", "Add one"))
    skips(BadSample("b.jsonl:2", "`messages` is empty", "Add one"))
    assert [str(reason) for reason in skips.reasons] == [
        "7: this is not JSON from column 1 on (a.jsonl:1, 2, 3 and 4 more). Mend it",
        "2: `messages` is empty (a.jsonl:9, b.jsonl:2). Add one",
    ]
    assert skips.count == 9


@given(st.lists(st.tuples(st.text(max_size=4), st.integers(1, 9)), max_size=60))
def test_every_bad_sample_is_counted_in_one_of_few_reasons(found: list[tuple[str, int]]) -> None:
    skips = Skips(None)
    for what, line in found:
        skips(BadSample(f"f:{line}", what, "Mend it"))
    assert sum(reason.count for reason in skips.reasons) == skips.count == len(found)
    assert len(skips.reasons) <= 21
    assert all(1 <= len(reason.places) <= 3 for reason in skips.reasons)


def test_tokens_are_the_same_wherever_they_are_told(tmp_path: Path, tokenizer: Path) -> None:
    """Those of the training sequences without padding, while it is prepared and when it is checked or shown."""
    lines = [json.dumps({"prompt": f"question {n}", "completion": f"answer {n}"}) for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    words = ["prepare", str(tmp_path / "chats.jsonl"), "--tokenizer", str(tokenizer), "--out", str(out)]
    code, output = run(*words, "--sequence-length", "256", "--heldout", "0.3")
    assert code == 0, output
    manifest = Manifest.read(out)
    assert f"{manifest.tokens:,} tokens for training, " in output
    assert "M tokens/s" not in output
    said = f"{manifest.tokens:,} tokens, of which {manifest.trained_tokens:,} ("
    assert said in output
    assert said in run("check", str(out))[1]
    shown = [json.loads(run("show", str(out), str(n), "--json")[1]) for n in range(manifest.sequences)]
    assert sum(one["tokens"] for one in shown) == manifest.tokens
    assert sum(one["trained"] for one in shown) == manifest.trained_tokens


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["prepare", "{chat}", "--tokenizer", "{tokenizer}", "--out", "{new}", "--sequence-length", "99999999999"],
         Exit.DATA, "Use at most 16,777,216"),
        (["prepare", "{chat}", "--tokenizer", "{tokenizer}", "--out", "{chat}"], Exit.DATA, "is a file. Name a new"),
        (["prepare", "{chat}", "--tokenizer", "{tokenizer}", "--out", "/proc/none"], Exit.FILES, "/proc/none: No such"),
        (["prepare", "", "--tokenizer", "{tokenizer}", "--out", "{new}"], Exit.DATA, "name of a data file is empty"),
        (["prepare", "{chat}", "--tokenizer", "{tokenizer}", "--out", "{new}", "--sequence-length", "2"],
         Exit.DATA, "Use a longer `--sequence-length`"),
        (["prepare", "{chat}", "--tokenizer", "{tokenizer}", "--out", "{new}", "--template", "{chat}"],
         Exit.DATA, "is no chat template: it does not use `messages`"),
        (["prepare", "{chat}", "--tokenizer", "owner/name", "--out", "{new}"],
         Exit.DATA, "To get it from the Hub: hf download owner/name --local-dir FOLDER"),
        (["show", "{new}", "--tokenizer", "{tokenizer}"], Exit.DATA, "there is no such file or folder"),
        (["show", "{tokenizer}", "--tokenizer", "{tokenizer}"], Exit.DATA, "is a folder. Name one of the files"),
    ],
)  # fmt: skip
def test_what_cannot_be_prepared_or_shown_is_told(
    words: list[str], code: int, said: str, chat: Path, tokenizer: Path, tmp_path: Path
) -> None:
    done, output = run(*(word.format(chat=chat, tokenizer=tokenizer, new=tmp_path / "new") for word in words))
    assert (done, said in output, "Errno" in output) == (code, True, False), output
    assert not (tmp_path / "new").exists(), "a folder that was made for nothing is taken away again"
