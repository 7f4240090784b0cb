"""The advice of `psyche-node plan`: whatever it names holds when it is planned again."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from optimizer.layout import Layout
from psyche_node.cli import app
from psyche_node.exits import Exit
from psyche_node.planning.advice import Try
from psyche_node.planning.asked import Asked
from psyche_node.planning.errors import PlanError
from psyche_node.planning.gpus import GPUS, parse_gpus
from psyche_node.planning.plan import Plan, plan
from psyche_node.planning.shape import ModelShape, shape_of
from psyche_node.relay.spec import LinkSpec


def shape_with(hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> ModelShape:
    """A Llama's."""
    inner, size = 4 * hidden, hidden // heads
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_heads * size, hidden),
        "self_attn.v_proj": (kv_heads * size, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    tensors = {f"model.layers.{n}.{name}": sizes for n in range(layers) for name, sizes in layer.items()}
    ends = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
    }
    return shape_of("some", config, tuple({**tensors, **ends}.items()))


def asked(**changes: Any) -> Asked:
    values: dict[str, Any] = {
        "gpus": 8,
        "gpu": GPUS["H100"],
        "members": 4,
        "link": LinkSpec.parse("1gbit/50ms"),
        "sequence": 16384,
        "batch": 64,
        "rounds": 900,
        "rounds_per_epoch": 250,
        "topk": 8,
        "update_bytes": 10**8,
        "overlap": True,
    }
    return Asked(**{**values, **changes})


def followed(asked: Asked, tries: tuple[Try, ...]) -> Asked:
    """What is asked for after all changes."""
    for step in tries:
        match step.flag:
            case "gpus":
                count, gpu = parse_gpus(str(step.value))
                asked = replace(asked, gpus=count, gpu=gpu)
            case "precision":
                asked = replace(asked, bf16=step.value == "bf16")
            case flag:
                field = {"seq": "sequence"}.get(flag, flag.replace("-", "_"))
                asked = replace(asked, **{field: step.value})
    return asked


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([(8, 8), (32, 8), (24, 6), (9, 3), (16, 1)]),
    wide=st.integers(2, 16),
    layers=st.integers(8, 48),
    gpu=st.sampled_from(sorted(GPUS)),
    ranks=st.integers(1, 10),
    sequence=st.integers(1, 2**18),
    micro_batch=st.integers(1, 8),
    checkpointing=st.sampled_from([None, True, False]),
    tensor_parallel=st.integers(1, 4),
    batch=st.integers(4, 300),
    bf16=st.booleans(),
    joining=st.booleans(),
)
def test_whatever_is_advised_fits_when_it_is_planned(
    heads: tuple[int, int], wide: int, layers: int, gpu: str, ranks: int, **changes: Any
) -> None:
    shape = shape_with(heads[0] * 64 * wide, layers, *heads, 32000)
    wanted = asked(gpu=GPUS[gpu], gpus=ranks * changes["tensor_parallel"], **changes)
    try:
        made = plan(shape, wanted)
    except PlanError:
        return
    if made.fits or not made.tries:
        assert made.fits == (made.memory.total <= made.usable)
        return
    for count in range(1, len(made.tries) + 1):
        again = plan(shape, followed(wanted, made.tries[:count]))
        step = made.tries[count - 1]
        assert (again.memory.total, again.fits) == (step.total, step.fits)
        assert step.fits == (count == len(made.tries))
        assert not (wanted.joining and step.owners)
    for left_out in range(len(made.tries) - 1):
        fewer = [step for number, step in enumerate(made.tries) if number != left_out]
        if made.tries[left_out].flag != "gpus":  # what comes after it may need more of them to divide
            assert not plan(shape, followed(wanted, fewer)).fits


def test_a_member_of_a_run_that_exists_gets_no_advice_for_its_owner() -> None:
    shape = shape_with(16384, 8, 64, 8, 131072)
    owner, member = plan(shape, asked()), plan(shape, asked(joining=True))
    assert {"precision", "seq"} & {step.flag for step in owner.tries}
    assert {step.flag for step in member.tries} <= {"gpus", "tensor-parallel", "micro-batch", "checkpointing"}
    assert member.tries[-1].fits


def test_what_fits_nowhere_is_said() -> None:
    # One sequence's activations alone: tensor parallelism has a single key-value head to divide.
    made = plan(shape_with(8192, 64, 64, 1, 32000), asked(gpu=GPUS["RTX3090"], sequence=2**20, joining=True))
    assert not made.fits
    assert made.tries == ()


def model_file(folder: Path, hidden: int = 16384) -> str:
    file = folder / "a model.json"
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 4, "vocab_size": 32000}
    file.write_text(
        json.dumps({"model_type": "llama", "num_attention_heads": 16, "num_key_value_heads": 4, **sizes}),
    )
    return str(file)


@pytest.mark.parametrize(
    "flags",
    [
        ["--gpus", "2xH100", "--seq", "65536"],
        ["--gpus", "2xH100", "--seq", "65536", "--joining", "--no-checkpointing", "--micro-batch", "4"],
        ["--gpus", "3xRTX4090", "--tensor-parallel", "1", "--link", "100mbit:1gbit/80ms", "--mfu", "0.4"],
        ["--gpus", "4xL40S", "--tensor-parallel", "4", "--precision", "fp32", "--seq", "4096", "--topk", "16"],
    ],
)
def test_the_last_command_line_fits_when_it_is_pasted(tmp_path: Path, flags: list[str]) -> None:
    words = ["plan", "--model", model_file(tmp_path), *flags]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == Exit.NO_ROOM, first.output
    line = first.output.splitlines()[-1].partition("this fits: psyche-node ")[2]
    again = CliRunner().invoke(app, shlex.split(line))
    assert again.exit_code == 0, again.output
    assert "it fits" in again.output
    shown = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert sorted(shlex.split(shown["command"])) == sorted(["psyche-node", *shlex.split(line), "--json"])


def test_nothing_fits_is_said_by_the_command(tmp_path: Path) -> None:
    words = ["plan", "--model", model_file(tmp_path), "--gpus", "1xRTX3090", "--seq", str(2**23), "--joining"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == Exit.NO_ROOM
    assert "nothing makes it fit" in done.output
    assert "psyche-node plan" not in done.output


SMALL = shape_with(4096, 8, 32, 8, 32000)


def timed(**changes: Any) -> tuple[Asked, Plan]:
    topk = changes.pop("topk", 64)
    size = Layout.build(SMALL.tensors, topk).update_bytes
    base: dict[str, Any] = {"gpu": GPUS["H200"], "train_slots": 1500, "witness_slots": 300, "topk": topk}
    wanted = asked(**{**base, "update_bytes": size, **changes})
    return wanted, plan(SMALL, wanted)


def test_a_round_within_the_runs_times_has_no_warnings() -> None:
    assert timed()[1].warnings == ()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_line_too_slow_for_the_runs_times_is_said_with_changes_that_are_enough(overlap: bool) -> None:
    wanted, made = timed(link=LinkSpec.parse("5mbit/50ms"), overlap=overlap)
    (said,) = made.warnings
    given = 60 + (made.compute_seconds if overlap else 0)
    assert f"take {made.exchange.seconds:.1f} s" in said
    assert f"there are {given:.1f} s" in said
    link = re.search(r"--link ([^)]+)\)", said)
    topk = re.search(r"--topk (\d+)", said)
    slots = re.search(r"round_witness_time = (\d+)", said)
    assert link
    assert topk
    assert slots
    assert plan(SMALL, replace(wanted, link=LinkSpec.parse(link[1]))).warnings == ()
    assert timed(link=wanted.link, overlap=overlap, topk=int(topk[1]))[1].warnings == ()
    assert timed(link=wanted.link, overlap=overlap, topk=int(topk[1]) + 1)[1].warnings
    assert plan(SMALL, replace(wanted, witness_slots=int(slots[1]))).warnings == ()
    assert plan(SMALL, replace(wanted, witness_slots=int(slots[1]) - 2)).warnings


def test_a_line_too_far_for_any_rate_gets_no_rate() -> None:
    _, made = timed(link=LinkSpec.parse("20mbit/10s"), witness_slots=10, overlap=False, members=64)
    (said,) = made.warnings
    assert "--link" not in said
    assert "--topk" not in said
    assert "round_witness_time" in said


def test_training_too_slow_for_the_runs_times_is_said() -> None:
    wanted, made = timed(train_slots=1)
    (said,) = made.warnings
    assert f"takes {made.compute_seconds:.1f} s" in said
    enough = ceil(made.compute_seconds / 0.4)
    assert f"max_round_train_time = {enough}" in said
    assert plan(SMALL, replace(wanted, train_slots=enough)).warnings == ()


def test_a_chain_slower_than_training_is_named() -> None:
    _, made = timed(batch=4, sequence=512)
    assert made.chain_seconds == pytest.approx(3.2)
    assert any("the chain takes 3.20 s" in note for note in made.notes)
    assert timed(slot_seconds=0.05)[1].chain_seconds == pytest.approx(0.4)
