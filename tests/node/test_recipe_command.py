"""`psyche-node recipe`, and what the recipes say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from solders.pubkey import Pubkey
from typer.testing import CliRunner

from coordinator.instructions import init_run
from coordinator.recipes import Recipe, load_recipe, recipe_file, recipe_names
from coordinator.run_config import ConfigError, RunSettings, settings_table, validated
from coordinator.state import Terms
from psyche_node.cli import app
from psyche_node.exits import Exit
from psyche_node.sim.recipe import recipe_for
from psyche_node.sim.settings import SimSettings
from psyche_node.training.schedule import Schedule, lr_bits
from psyche_node.training.terms import TrainingTerms, fp32

HASH = "ab" * 32
MADE = [
    *(f"terms.{name}={HASH}" for name in ("model_root", "layout_digest", "data_manifest")),
    "terms.samples=1000000",
    "terms.update_bytes=105913352",
]


def ask(*words: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["recipe", *words])
    assert done.exit_code == status, done.output
    return done.output


def test_list_names_every_file() -> None:
    assert recipe_names() == ["demo", "hermes-sft", "length-control"]
    rows = json.loads(ask("list", "--json"))
    assert [row["name"] for row in rows] == recipe_names()
    for row in rows:
        assert row["title"] in ask("list")


def test_show_prints_the_file_or_every_setting() -> None:
    text = ask("show", "hermes-sft")
    assert text == recipe_file("hermes-sft").read_text()
    shown = json.loads(ask("show", "hermes-sft", "--json"))
    assert (shown["terms"]["warmup_rounds"], shown["limits"]["total_rounds"], shown["limits"]["batch"]) == (
        300,
        9000,
        384,
    )
    assert (shown["terms"]["sequence_length"], shown["terms"]["schedule"]) == (16384, "cosine")
    assert shown["terms"]["window"] == 3, "defaults are there, too"
    assert json.loads(ask("show", "length-control", "--json"))["data"] == {
        "template": "hermes-llama3",
        "length_control": 30000,
        "vocabulary": 0,
    }
    assert "there are demo" in ask("show", "soup", status=Exit.CONFIG)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_makes_a_run_that_the_program_takes(name: str) -> None:
    made = settings_table("run", None, MADE, load_recipe(name).settings()).checked()
    terms = made.terms.on_chain()
    init_run(Pubkey.default(), Pubkey.default(), "run", made.limits.on_chain(), terms)
    rates = [fp32(lr_bits(rates_of(made, terms), round)) for round in range(made.limits.total_rounds)]
    assert max(rates) == pytest.approx(made.terms.peak_lr)
    assert rates[-1] == pytest.approx(made.terms.final_lr)


def rates_of(made: RunSettings, terms: Terms) -> TrainingTerms:
    return TrainingTerms(
        total_rounds=made.limits.total_rounds,
        schedule=Schedule(terms.schedule),
        warmup_rounds=terms.warmup_rounds,
        peak_lr_bits=terms.peak_lr_bits,
        final_lr_bits=terms.final_lr_bits,
    )


def test_a_file_goes_over_the_recipe_and_flags_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('run_id = "mine"\n[limits]\nbatch = 128\n[terms]\npeak_lr = 1e-5\nz_loss = 1e-4\n')
    made = settings_table(None, file, [*MADE, "limits.batch=96"], load_recipe("hermes-sft").settings()).checked()
    assert (made.run_id, made.limits.batch, made.terms.peak_lr, made.terms.warmup_rounds) == ("mine", 96, 1e-5, 300)
    assert made.terms.on_chain().z_loss_bits == 0x38D1B717
    with pytest.raises(ConfigError, match=r"terms\.peek_lr: there is no such key \(--set\); did you mean peak_lr"):
        settings_table(None, file, [*MADE, "terms.peek_lr=1"], load_recipe("hermes-sft").settings()).checked()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"terms": {"ramp_rounds": 10}}, "go together"),
        ({"terms": {"ramp_rounds": 200, "ramp_batch": 3}}, "at most the 100 rounds"),
        ({"terms": {"warmup_rounds": 101}}, "at most the 100 rounds"),
        ({"terms": {"schedule": "wsd"}}, "wsd needs it"),
        ({"terms": {"decay_rounds": 5}}, "is for the schedule wsd"),
        ({"about": {"licence": "x"}}, r"recipe x\.about\.licence: there is no such key"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(change: dict[str, dict[str, Any]], said: str) -> None:
    table = load_recipe("demo").model_dump()
    for section, values in change.items():
        table[section] |= values
    with pytest.raises(ConfigError, match=said):
        validated(Recipe, table, "recipe x")


def test_a_simulation_has_the_recipes_shape_and_a_small_models_size() -> None:
    made = recipe_for("hermes-sft", 60)
    assert (made.schedule, made.warmup_rounds, made.overlap, made.weight_decay) == ("cosine", 2, 1, 0.01)
    demo = recipe_for("demo", 100)
    assert (made.sequence_length, made.batch, made.peak_lr) == (demo.sequence_length, demo.batch, demo.peak_lr)
    assert SimSettings(out=Path("out")).recipe == demo
    assert recipe_for("demo", 1000).warmup_rounds == demo.warmup_rounds == 5


def test_a_simulation_ramps_in_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sft = recipe_file("hermes-sft").read_text()
    (tmp_path / "ramped.toml").write_text(sft + "ramp_batch = 96\nramp_rounds = 900\n")
    (tmp_path / "demo.toml").write_text(recipe_file("demo").read_text())
    monkeypatch.setattr("coordinator.recipes.FOLDER", tmp_path)
    made = recipe_for("ramped", 900)
    assert (made.ramp_batch, made.ramp_rounds, made.batch) == (6, 90, 24)
    assert (recipe_for("ramped", 4).ramp_batch, recipe_for("ramped", 4).ramp_rounds) == (0, 0), "no room for it"
