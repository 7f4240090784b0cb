"""The trainer, the baseline, generation and likelihoods on a CUDA device, against the CPU.

Without one these run on a pretended device (tests/test_pretended_cuda.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RandomData, bits, terms

import benchmarks.optimizer
import benchmarks.train
from psyche_node.evaluation.likelihood import Pair, score_pairs
from psyche_node.evaluation.steps import finish
from psyche_node.generation import Engine
from psyche_node.generation.request import Advice
from psyche_node.training import Session, run_adamw
from psyche_node.training.options import Options

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")

RUN = bytes(32)


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "sdpa", "activation_checkpointing": "on"},
        {"attention": "eager", "precision": "bf16"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_a_session_trains_as_on_a_cpu(model_dir: Path, data: RandomData, tmp_path: Path, options: Any) -> None:
    """And what it sends moves the weights of both alike, bit for bit."""
    said = terms(z_loss_bits=bits("0.0001"))
    here, there = (
        Session(model_dir, data, said, device, 2, 1, options=Options(**options)) for device in ("cpu", "cuda")
    )
    for tensor in (*there.model.parameters(), *there.model.buffers()):
        assert tensor.device.type == "cuda"
    rotary = {name: b for name, b in there.model.named_buffers() if "inv_freq" in name}
    assert rotary
    assert all(buffer.dtype == torch.float32 for buffer in rotary.values())
    assert here.fingerprint() == there.fingerprint()
    for round in range(2):
        ours, theirs = (s.train(round, range(8), run=RUN, member=n) for n, s in enumerate((here, there)))
        assert theirs.loss == pytest.approx(ours.loss, rel=2e-3)
        assert theirs.gradient_norm == pytest.approx(ours.gradient_norm, rel=0.05)
        for session in (here, there):
            session.apply(round, [ours.blob, theirs.blob], included=True)
        assert here.fingerprint() == there.fingerprint(), f"round {round}"
    assert here.model_root() == there.model_root()
    assert there.evaluate(4)[0] == pytest.approx(here.evaluate(4)[0], rel=2e-3)
    assert there.optimizer.report().agreement is not None
    there.save(tmp_path / "saved")
    assert Session(tmp_path / "saved", data, said, "cpu", 2, 1, options=Options(**options)).model_root() == (
        there.model_root()
    )


def test_the_baseline_trains_as_on_a_cpu(model_dir: Path, data: RandomData) -> None:
    rounds = [range(8), range(8, 16)]
    ours, theirs = (
        run_adamw(model_dir, data, terms(), rounds, learning_rate=1e-3, sequences=4, device=device, micro_batch=2)
        for device in ("cpu", "cuda")
    )
    assert theirs.loss == pytest.approx(ours.loss, rel=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_model_answers(model_dir: Path, dtype: str) -> None:
    engine = Engine.load(model_dir, "cuda", dtype)
    advice = Advice(repetition_penalty=1.1, no_repeat_ngram_size=3, min_new_tokens=4, top_k=20)
    prompts = [[5, 6, 7], [8, 9]]
    ways: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 1, "advice": advice}]
    for settings in ways:
        said = engine.generate(prompts, 6, **settings)
        assert [one.prompt_tokens for one in said] == [3, 2]
        assert all(4 <= len(one.token_ids) <= 6 for one in said)
        assert said == engine.generate(prompts, 6, **settings)


def test_likelihoods_are_those_of_a_cpu(model_dir: Path) -> None:
    pairs = [Pair((1, 2, 3, 4), 2), Pair((1, 2, 3, 5), 3), Pair((1, 2, 9), 1)]
    found = []
    for device in ("cpu", "cuda"):
        engine = Engine.load(model_dir, device, "float32")
        with torch.inference_mode():
            found.append(finish(score_pairs(engine._model, engine.device, pairs)))
    for ours, theirs in zip(*found, strict=True):
        assert theirs.logprob == pytest.approx(ours.logprob, abs=1e-3)
        assert theirs.tokens == ours.tokens


def test_benchmarks_of_the_optimizer_and_the_trainer_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmarks.optimizer.MODELS, "tiny", (64, 1, 128, 64))
    monkeypatch.setitem(benchmarks.train.SIZES, "tiny", (256, 1, 512, 64))
    monkeypatch.setattr(benchmarks.optimizer.Machine, "copy_bandwidth", lambda _: 1e12)
    monkeypatch.setattr(benchmarks.optimizer, "decode_speed", lambda *_: 1e8)
    common = ["--device", "cuda", "--topk", "8", "--members", "2", "--out", str(tmp_path / "figures.json")]
    once = ["--sizes", "tiny", "--repeats", "1", "--scaling", "2", "--engine", "torch"]
    for module, arguments in ((benchmarks.optimizer, once), (benchmarks.train, ["--size", "tiny", "--steps", "1"])):
        if module is benchmarks.train:
            arguments = [*arguments, "--tokens", "32", "--sequence", "16"]
        monkeypatch.setattr("sys.argv", ["benchmark", *arguments, *common])
        module.main()
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert figures["machine"] == torch.cuda.get_device_name()
    assert figures["peak"] > 0


def test_tensors_of_two_devices_do_not_mix() -> None:
    there = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(4)
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert (there * torch.tensor(2.0)).sum().item() == 8.0
    with torch.autocast("cuda", torch.bfloat16):
        assert (there[None] @ there[:, None]).dtype == torch.bfloat16
