"""`psyche-node plan`: known sizes, arithmetic that can be done by hand, and advice that holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from optimizer.layout import Layout
from psyche_node.cli import app
from psyche_node.exits import Exit
from psyche_node.planning.asked import Asked
from psyche_node.planning.context import context_window
from psyche_node.planning.errors import PlanError
from psyche_node.planning.exchange import LINE, exchange
from psyche_node.planning.gpus import GPUS, parse_gpus
from psyche_node.planning.memory import memory
from psyche_node.planning.meta import shape_from
from psyche_node.planning.plan import Plan, plan
from psyche_node.planning.shape import ModelShape, config_of
from psyche_node.relay.spec import LinkSpec


def shape(name: str) -> ModelShape:
    return shape_from(config_of(name))


@pytest.fixture(scope="module")
def seed() -> ModelShape:
    return shape("Seed-OSS-36B")


def asked(**changes: Any) -> Asked:
    values: dict[str, Any] = {
        "gpus": 8,
        "gpu": GPUS["H200"],
        "members": 24,
        "link": LinkSpec.parse("1gbit/50ms"),
        "sequence": 16384,
        "batch": 384,
        "rounds": 9000,
        "rounds_per_epoch": 250,
        "topk": 8,
        "update_bytes": 105_913_080,
        "overlap": True,
    }
    return Asked(**{**values, **changes})


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Seed-OSS-36B", 36_151_104_512),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-3.1-70B", 70_553_706_496),
        ("qwen3-14b", 14_768_307_200),
    ],
)
def test_known_models_have_their_known_sizes(name: str, parameters: int) -> None:
    assert shape(name).parameters == parameters


def test_updates_of_the_36b_are_as_large_as_its_layout_says(seed: ModelShape) -> None:
    layout = Layout.build(seed.tensors, 8)
    assert layout.update_bytes == 105_913_080
    # Twelve bytes a block of 4,096: little more than one for every 341 parameters.
    assert layout.update_bytes == pytest.approx(seed.parameters * 12 / 4096, rel=1e-4)


def test_state_is_eighteen_bytes_a_parameter_over_the_gpus(seed: ModelShape) -> None:
    made = plan(seed, asked())
    one = made.memory
    state = one.weights + one.gradients + one.momentum + one.trend + one.aside
    assert state == pytest.approx(18 * seed.parameters / 8, rel=1e-3)
    assert made.fits
    assert made.work.checkpointing


def test_checkpointing_keeps_one_input_a_layer(seed: ModelShape) -> None:
    work = plan(seed, asked()).work
    kept = 64 * 2 * 5120 * 16384
    assert kept < memory(seed, work).activations < 1.4 * kept
    assert memory(seed, replace(work, checkpointing=False)).activations > 15 * kept


def test_more_of_everything_needs_more(seed: ModelShape) -> None:
    def total(**changes: Any) -> int:
        return plan(seed, asked(checkpointing=True, **changes)).memory.total

    base = total()
    assert total(sequence=32768) > base
    assert total(micro_batch=2) > base
    assert total(lookahead=False) < base
    assert total(bf16=True) < base
    assert plan(seed, asked(checkpointing=False)).memory.total > base


def test_speed_is_flops_by_hand(seed: ModelShape) -> None:
    made = plan(seed, asked(mfu=0.5, batch=384, checkpointing=False))
    multiplied = seed.parameters - 155136 * 5120 - 5120
    flops = 6 * multiplied + 6 * 64 * 80 * 128 * 16384
    assert made.member_tokens_per_second == pytest.approx(8 * 989.4e12 * 0.5 / flops, rel=1e-6)
    assert made.compute_seconds == pytest.approx(384 * 16384 / (24 * made.member_tokens_per_second))
    short = plan(seed, asked(mfu=0.5, checkpointing=False, document=1000))
    assert short.member_tokens_per_second > 1.2 * made.member_tokens_per_second


def test_a_round_waits_for_the_slower_of_training_and_line_with_overlap(seed: ModelShape) -> None:
    together, apart = plan(seed, asked()), plan(seed, asked(overlap=False))
    assert apart.round_seconds == pytest.approx(together.compute_seconds + together.exchange.seconds + 3.2)
    assert together.round_seconds == max(together.compute_seconds, together.exchange.seconds + 3.2)
    slow = plan(seed, asked(link=LinkSpec.parse("100mbit/50ms")))
    assert slow.round_seconds == slow.exchange.seconds + 3.2
    assert any("exchange takes longer" in note for note in slow.notes)


def test_idle_ranks_are_counted(seed: ModelShape) -> None:
    full, uneven = plan(seed, asked(batch=384)), plan(seed, asked(batch=200))
    assert uneven.member_tokens_per_second == pytest.approx(full.member_tokens_per_second * 200 / 384)
    assert any("leave some idle" in note for note in uneven.notes)


def test_everybody_gets_every_other_update_and_uploads_as_much() -> None:
    alone = exchange(1000, 1, 1e6, 1e6, 0.05)
    assert (alone.received, alone.sent, alone.seconds) == (0, 0, 0.0)
    of_many = exchange(10**8, 24, 125e6, 250e6, 0.0)
    assert of_many.received == of_many.sent == 23 * 10**8
    # The upload is the narrower one; the tree's steps are pieces.
    assert of_many.seconds == pytest.approx(23 * 10**8 / (125e6 * LINE), rel=0.01)
    assert exchange(10**8, 24, 0.0, 0.0, 0.0).seconds == 0.0


@pytest.mark.parametrize("text", ["8xH2000", "0xH100", "x", "", "8 H100", "99999xH100"])
def test_gpus_that_are_none_are_named(text: str) -> None:
    with pytest.raises(PlanError, match="such as 8xH200"):
        parse_gpus(text)


def test_gpus() -> None:
    assert parse_gpus("8xh200") == (8, GPUS["H200"])
    assert parse_gpus("RTX4090") == (1, GPUS["RTX4090"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensor_parallel": 3}, "has to divide"),
        ({"gpus": 16, "tensor_parallel": 16}, "8 key-value"),
        ({"batch": 9}, "leaves some"),
    ],
)
def test_what_does_not_go_together_is_refused(seed: ModelShape, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        plan(seed, asked(**changes))


def test_other_architectures_are_planned_or_refused_with_the_reason(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps({"model_type": "gemma", "vocab_size": 512, "num_key_value_heads": 4, "head_dim": 16, **sizes})
    )
    assert shape(str(tmp_path)).assumed
    file.write_text(json.dumps({"model_type": "mixtral", "vocab_size": 512, "num_local_experts": 8, **sizes}))
    with pytest.raises(PlanError, match="mixture of experts"):
        shape(str(file))
    file.write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(PlanError, match="has no hidden_size"):
        shape(str(file))
    file.write_text(json.dumps({"model_type": "no such kind", "vocab_size": 512, **sizes}))
    with pytest.raises(PlanError, match="transformers has no model_type 'no such kind'"):
        shape(str(file))
    file.write_text("{")
    with pytest.raises(PlanError, match="cannot be read"):
        shape(str(file))


def written(folder: Path, **changes: Any) -> str:
    """A config as people publish it: without what its kind of model has by default."""
    base = json.loads(config_of("Llama-3.1-8B").file.read_text())
    values = {key: value for key, value in {**base, **changes}.items() if value != "left out"}
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def test_what_a_config_leaves_out_is_its_kind_of_models(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "vocab_size": 256000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma", **sizes, **heads}))
    gemma = shape(str(tmp_path))
    assert gemma.tied, "Gemma ties its embeddings, and its configs need not say so"
    assert gemma.parameters == 2_506_172_416
    assert gemma.layer_parameters == (2 * 8 + 2 * 1) * 256 * 2048 + 3 * 2048 * 16384 + 2 * 2048
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **sizes, "num_attention_heads": 32}))
    assert shape(str(tmp_path)).head_dim == 128, "and not 2048 / 32"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number from 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it"),
        ({"num_key_value_heads": "8"}, 'num_key_value_heads is "8"; it'),
        ({"num_key_value_heads": 5}, "num_attention_heads is 32; it must be a multiple of num_key_value_heads"),
        ({"num_attention_heads": 24, "head_dim": None}, "hidden size (4096) is not a multiple"),
        ({"hidden_size": -1}, "hidden_size is -1; it"),
        ({"hidden_size": "left out"}, "has no hidden_size"),
        ({"vocab_size": 0}, "vocab_size is 0; it"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true; it"),
        ({"num_hidden_layers": 10**9}, "it must be a whole number from 1 to 4,096"),
        ({"head_dim": "x"}, 'head_dim is "x"; it'),
        ({"hidden_act": "no such function"}, "no such function"),
        ({"rms_norm_eps": []}, "rms_norm_eps"),
        (
            {"hidden_size": 2**24, "intermediate_size": 2**24, "num_hidden_layers": 80},
            "shapes cannot be those of a model",
        ),
        ({"model_type": "left out"}, "no model_type"),
    ],
)
def test_sizes_that_none_can_have_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    done = CliRunner().invoke(app, ["plan", "--model", written(tmp_path, **changes), "--gpus", "8xH200"])
    assert done.exit_code == Exit.CONFIG, done.exception
    assert said in done.output
    assert str(tmp_path / "config.json") in done.output.replace("\n", "")


def test_the_command_prints_a_plan_and_its_json() -> None:
    words = [
        "plan",
        "--model",
        "Seed-OSS-36B",
        "--gpus",
        "8xH200",
        "--seq",
        "16384",
        "--members",
        "24",
        "--link",
        "1gbit",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    for said in (
        "36,151,104,512 parameters",
        "105,913,080 bytes",
        "it fits",
        "50 transactions",
        "20.8 s",
        "3.20 s until",
        "24 members, 9,000 rounds of 384 x 16,384 tokens, topk 8, with overlap",
        "of the recipe hermes-sft, but for --members, --seq",
    ):
        assert said in done.output
    shown = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert shown["memory"]["total"] == sum(size for name, size in shown["memory"].items() if name != "total")
    assert shown["exchange"]["update_bytes"] == 105_913_080
    assert set(shown) >= {field for field in Plan.__slots__ if field != "memory"}


def test_what_does_not_fit_has_advice_for_figures_and_an_exit_code_of_its_own() -> None:
    words = ["plan", "--model", "Seed-OSS-36B", "--gpus", "8xH100", "--seq", "16384"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == Exit.NO_ROOM
    assert "it does not fit. What helps" in done.output
    for figure in ("tokens/s", "SOL", "whole run"):
        assert figure not in done.output
    shown = CliRunner().invoke(app, [*words, "--json"])
    assert shown.exit_code == Exit.NO_ROOM
    values = json.loads(shown.output)
    assert values["fits"] is False
    assert values["tries"]
    assert "fees" not in values
    assert "tokens_per_second" not in values


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--gpus", "8xH2"], "kinds: B200"),
        (["--model", "nowhere"], "none of Llama-3.1-70B"),
        (["--link", "fast"], "--link fast: "),
        (["--recipe", "soup"], "there is no recipe"),
    ],
)
def test_wrong_flags_say_what_is_right(change: list[str], said: str) -> None:
    words = ["plan", "--model", "Llama-3.1-8B", "--gpus", "8xH200", *change]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == Exit.CONFIG
    assert said in done.output


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, None),
        ({"max_position_embeddings": 40960}, 40960),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 40960, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 131072, "rope_parameters": YARN}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2}}, 8192),
        ({"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": "x"}}, 4096),
        (
            {"max_position_embeddings": 8, "rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
            16,
        ),
        ({"max_position_embeddings": 8, "model_type": "gemma3_text", "rope_scaling": YARN | {"factor": 8.0}}, 8),
    ],
)
def test_a_context_window_has_its_rope_scaling(config: dict[str, Any], tokens: int | None) -> None:
    assert context_window(config) == tokens


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "dbrx", "kimi_linear", "rwkv", "llama"])
def test_a_context_window_is_found_by_whatever_name_a_kind_of_model_has_for_it(kind: str) -> None:
    config = AutoConfig.for_model(kind).get_text_config()
    assert context_window(config.to_dict()) == config.max_position_embeddings


def test_sequences_beyond_the_models_context_are_warned_of(tmp_path: Path) -> None:
    words = ["plan", "--model", "qwen3-14b", "--gpus", "8xH200", "--seq"]
    assert "the model is made for" not in CliRunner().invoke(app, [*words, "40960"]).output
    done = CliRunner().invoke(app, [*words, "65536"])
    assert "warning: sequences of 65,536 tokens, and the model is made for 40,960" in done.output
    values = json.loads(config_of("qwen3-14b").file.read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "rope_parameters": {**YARN, "rope_theta": 1e6}}))
    assert "the model is made for" not in CliRunner().invoke(app, [*words, "65536", "--model", str(tmp_path)]).output


def test_a_small_models_figures_are_not_zeros(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 2048, **sizes}))
    done = CliRunner().invoke(app, ["plan", "--model", str(tmp_path), "--gpus", "1xH100", "--seq", "256"])
    assert done.exit_code == 0, done.output
    rows = [line.split("  ")[-1].strip() for line in done.output.splitlines() if line.startswith("  ")]
    assert not [row for row in rows if row.startswith(("0.0 ", "0.00 ", "0 "))], done.output
