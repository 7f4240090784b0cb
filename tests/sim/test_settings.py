from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from coordinator.state import float_bits
from psyche_node.exits import Exit
from psyche_node.faults import Fault
from psyche_node.sim.cli import app
from psyche_node.sim.out import OutFolder
from psyche_node.sim.recipe import recipe_for
from psyche_node.sim.samples import SampleCounts
from psyche_node.sim.settings import Kill, Prepared, Ranks, SimSettings


def settings(**changes: Any) -> SimSettings:
    return SimSettings(**{"out": Path("out"), **changes})


def test_kill_reads_node_and_round() -> None:
    assert Kill.parse("2@30") == Kill(node=2, round=30)


@pytest.mark.parametrize("text", ["", "2", "2@", "@3", "a@3", "2@-1", "2@3@4", "2 @3"])
def test_kill_that_is_none_shows_what_one_is(text: str) -> None:
    with pytest.raises(ValueError, match="NODE@ROUND, such as"):
        Kill.parse(text)


def test_ranks_are_taken_in_turn() -> None:
    three = settings(ranks=(Ranks.parse("1"), Ranks.parse("2"), Ranks.parse("4/2")))
    assert [(three.ranks_of(i).ranks, three.ranks_of(i).tensor_parallel) for i in range(4)] == [
        (1, 1),
        (2, 1),
        (4, 2),
        (1, 1),
    ]


@pytest.mark.parametrize("text", ["", "two", "2/", "/2", "2/x", "2/2/2", "-2", "0", "4/3", "2/0", "1/2"])
def test_ranks_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"rank|RANKS"):
        Ranks.parse(text)


@pytest.mark.parametrize("kill", [Kill(node=4, round=0), Kill(node=0, round=10)])
def test_kill_of_nobody_is_refused(kill: Kill) -> None:
    settings(nodes=5, rounds=11, kills=(kill,))
    with pytest.raises(ValidationError, match="cannot kill node"):
        settings(nodes=4, rounds=10, kills=(kill,))


def test_ranks_without_a_node_are_refused() -> None:
    ranks = tuple(map(Ranks.parse, ("1", "2", "4")))
    settings(nodes=3, ranks=ranks)
    with pytest.raises(ValidationError, match="--ranks is given 3 times, and there are 2 nodes"):
        settings(nodes=2, ranks=ranks)


def test_a_model_that_is_not_there_is_told_before_anything_begins(tmp_path: Path) -> None:
    model = tmp_path / "nosuch" / "initial-model"
    done = CliRunner().invoke(app, ["--model", str(model), "--out", str(tmp_path / "out")])
    assert done.exit_code == Exit.USAGE
    assert f"--model {model}: no such file or folder" in done.output
    assert not (tmp_path / "out").exists()


def test_somebody_has_to_be_reachable() -> None:
    settings(nodes=4, private=3)
    with pytest.raises(ValidationError, match="must be reachable"):
        settings(nodes=4, private=4)


def test_chain_of_ones_own_needs_a_wallet_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="funded wallet"):
        settings(rpc="http://127.0.0.1:1")
    with pytest.raises(ValidationError, match=rf"--wallet {tmp_path / 'none.json'}: no such file"):
        settings(rpc="http://127.0.0.1:1", wallet=tmp_path / "none.json")
    (tmp_path / "wallet.json").touch()
    settings(rpc="http://127.0.0.1:1", wallet=tmp_path / "wallet.json")


def test_output_folder_is_new_or_empty(tmp_path: Path) -> None:
    OutFolder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "empty").mkdir()
    OutFolder(tmp_path / "empty")
    for used, why in ((tmp_path, "exists and is not empty"), (tmp_path / "file", "is a file")):
        (tmp_path / "file").touch()
        with pytest.raises(FileExistsError, match=f"{why}; name a new folder with --out"):
            OutFolder(used)


def test_output_folder_is_given_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "precious").write_text("mine")
    for out in (tmp_path / "there", tmp_path / "a" / "b"):
        folder = OutFolder(out)
        (out / "logs" / "x.log").touch()
        (out / "owner.json").touch()
        (out / "link").symlink_to(tmp_path)
        folder.give_back()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "there"]
    assert not any((tmp_path / "there").iterdir())
    shared = OutFolder(tmp_path / "runs" / "mine")
    OutFolder(tmp_path / "runs" / "another's")
    shared.give_back()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["another's"]


@pytest.mark.parametrize("new", [True, False])
def test_of_two_simulations_that_begin_at_once_one_has_the_folder(tmp_path: Path, new: bool) -> None:
    out = tmp_path / "runs" / "now"
    if not new:
        out.mkdir(parents=True)
    both = threading.Barrier(8)

    def claim(_: int) -> OutFolder | None:
        both.wait()
        try:
            return OutFolder(out)
        except FileExistsError:
            return None

    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(claim, range(8)))
    (mine,) = (one for one in claims if one is not None)
    assert out.is_dir(), "the others took nothing away"
    mine.give_back()
    assert out.is_dir() is not new


def test_folder_that_another_has_claimed_since_the_look_is_refused_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(()))  # both looked before either began
    OutFolder(tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"another simulation's.*--out"):
        OutFolder(tmp_path / "out")
    assert (tmp_path / "out" / "logs").is_dir()


@given(st.integers(10, 10_000))
def test_deadlines_are_as_long_as_they_should_be_whatever_a_slot_is(slot_ms: int) -> None:
    limits = settings(slot_ms=slot_ms).limits()
    for slots, seconds in (
        (limits.warmup_time, 120),
        (limits.max_round_train_time, 120),
        (limits.round_witness_time, 10),
        (limits.cooldown_time, 30),
        (limits.adaptive_grace, 5),
    ):
        assert 0 <= slots * slot_ms / 1000 - seconds < slot_ms / 1000


@pytest.mark.parametrize(
    ("nodes", "adversaries", "wanted", "enough"),
    [
        (4, (), 4, 2),
        (3, (Fault.TAMPER, Fault.LENGTH, Fault.OUTSIDER), 5, 2),
        (1, (), 1, 1),
        (1, (Fault.OUTSIDER,), 1, 1),
    ],
)
def test_run_waits_for_all_members_and_an_outsider_is_none(
    nodes: int, adversaries: tuple[Fault, ...], wanted: int, enough: int
) -> None:
    limits = settings(nodes=nodes, adversaries=adversaries).limits()
    assert (limits.init_min_members, limits.min_members) == (wanted, enough)


def test_hosts_differ_in_threads_and_micro_batch_unless_asked_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    made = settings(nodes=4)
    assert [made.threads_of(index) for index in range(4)] == [2, 2, 3, 2]
    assert [made.micro_batch_of(index) for index in range(4)] == [0, 0, 0, 4]
    same = settings(nodes=4, same_hosts=True)
    assert {(same.threads_of(index), same.micro_batch_of(index)) for index in range(4)} == {(2, 0)}
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert settings(nodes=64).threads_of(0) == 1


def test_terms_are_what_was_prepared_and_the_recipe() -> None:
    prepared = Prepared(
        model=Path("m"),
        data=Path("d"),
        model_root="01" * 32,
        layout_digest="02" * 32,
        data_manifest="03" * 32,
        samples=7,
        sequence_length=64,
        update_bytes=999,
        parameters=5,
        unigram_entropy=1.0,
        counts=SampleCounts(
            samples=1, train=1, heldout=0, too_long=0, untrained=0, bad=0, cut=0, closed=0, sequence_length=64
        ),
        model_source="demo",
        data_source="docs",
    )
    terms = settings(recipe=recipe_for("demo", 100, topk=3, peak_lr=0.5, schedule="cosine", lookahead=False)).terms(
        prepared
    )
    assert (terms.model_root, terms.layout_digest, terms.data_manifest) == (b"\1" * 32, b"\2" * 32, b"\3" * 32)
    assert (terms.topk, terms.schedule, terms.lookahead, terms.update_bytes) == (3, 2, False, 999)
    assert terms.peak_lr_bits == float_bits(0.5) == 0x3F000000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--nodes", "0"], "nodes: "),
        (["--topk", "513"], "topk: "),
        (["--recipe", "soup"], "there are demo, hermes-sft, length-control"),
        (["--rounds", "3", "--kill", "1@3"], "cannot kill node 1 in round 3"),
        (["--kill", "one"], "NODE@ROUND"),
        (["--baseline", "sgd"], "the one baseline is adamw"),
        (["--rpc", "http://127.0.0.1:1"], "funded wallet"),
        (["--adversary", "gossip"], "gossip"),
        (["--device", "tpu"], "'tpu' is no device to train on; use auto, cpu, cuda or cuda:1"),
        (
            ["--template", "none.jinja"],
            "--template none.jinja: no such file; name one, or one of hermes-llama3, chatml",
        ),
        (["--skip-bad", "most"], "--skip-bad most is neither a number nor all"),
    ],
)
def test_flag_that_cannot_be_used_is_named(flags: list[str], said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*flags, "--out", str(tmp_path / "out")])
    assert done.exit_code == Exit.USAGE
    assert said in done.output
    assert not (tmp_path / "out").exists()


def test_ranks_and_kills_are_told_as_they_are_written() -> None:
    two = settings(nodes=4, ranks=(Ranks.parse("1"), Ranks.parse("4/2")), kills=(Kill.parse("2@30"),))
    assert two.written() == {"kills": ["2@30"], "ranks": ["1", "4/2"]}
