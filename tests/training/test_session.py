"""Sessions: replicas are exact, micro-batches do not matter, and fates of updates are settled."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, VOCABULARY, RandomData, terms

from optimizer.errors import UnknownRound
from psyche_node.training import (
    ModelError,
    Session,
    TrainingError,
    load_model,
    make_demo_model,
    model_root,
    weights_sha256,
)
from psyche_node.training.device import choose_device
from psyche_node.training.gradient import accumulate

RUN = bytes(range(32))


def session(model_dir: Path, data: Any, micro_batch: int = 0, **changes: Any) -> Session:
    return Session(model_dir, data, terms(**changes), device="cpu", micro_batch=micro_batch)


def gradients(one: Session, data: RandomData, micro_batch: int) -> list[torch.Tensor]:
    one.device.micro_batch = micro_batch
    one.model.zero_grad()
    accumulate(one._loss, data.batch(range(7), b""), one.device)
    return [p.grad.clone() for p in one.model.parameters()]


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_the_gradient_does_not_depend_on_the_micro_batch(model_dir: Path, data: RandomData, micro_batch: int) -> None:
    """Trained tokens per sequence differ, so a mean of means would not pass."""
    one = session(model_dir, data)
    for found, expected in zip(gradients(one, data, micro_batch), gradients(one, data, 100), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_replicas_stay_identical_and_learn(model_dir: Path, data: RandomData) -> None:
    """Three members with different micro-batches, overlap 1, one update left out, one round void."""
    members = [session(model_dir, data, micro_batch=m) for m in (1, 3, 8)]
    first = members[0].evaluate()[0]
    blobs: dict[int, list[bytes]] = {}
    for number in range(16):
        blobs[number] = [
            s.train(number, range(number * 12 + i * 4, number * 12 + i * 4 + 4), run=RUN, member=i).blob
            for i, s in enumerate(members)
        ]
        if number:
            before = number - 1
            included = [] if before == 5 else [1, 2] if before == 3 else [0, 1, 2]
            sent = [blobs[before][i] for i in included]
            for i, member in enumerate(members):
                # Any order gives the same weights.
                member.apply(before, sent[i:] + sent[:i], i in included)
        assert len({m.fingerprint() for m in members}) == 1
        assert len({m.weights_sha256() for m in members}) == 1
    assert len({m.model_root() for m in members}) == 1
    last = [m.evaluate()[0] for m in members]
    assert last[0] < first - 0.5
    assert max(last) == pytest.approx(min(last), rel=1e-5)


def test_training_leaves_the_weights_alone(model_dir: Path, data: RandomData) -> None:
    one = session(model_dir, data)
    before = one.weights_sha256()
    result = one.train(0, [0, 1, 2, 3], run=RUN, member=2)
    assert one.weights_sha256() == before
    assert result.fingerprint_before == one.fingerprint()
    assert len(result.blob) == one.optimizer.layout.update_bytes
    assert result.tokens == int(data.batch(range(4), b"").trained.sum())
    assert 4 < result.loss < 8
    assert result.gradient_norm > 0
    one.apply(0, [], included=False)
    assert one.weights_sha256() == before, "a void round changes nothing"
    other = session(model_dir, data)
    assert other.train(0, [0, 1, 2, 3], run=RUN, member=2).blob == result.blob, "the same work gives the same bytes"


def test_a_share_without_positions_still_gives_an_update(model_dir: Path, data: RandomData) -> None:
    one = session(model_dir, data)
    result = one.train(0, [], run=RUN, member=0)
    assert (result.loss, result.tokens) == (0.0, 0)
    one.apply(0, [result.blob], True)


def test_rates_follow_the_terms(model_dir: Path, data: RandomData) -> None:
    """The step of every weight is the learning rate of the round whose updates are applied."""
    one = session(model_dir, data, warmup_rounds=0, schedule=1, total_rounds=3, weight_decay_bits=0)
    before = [p.detach().clone() for p in one.model.parameters()]
    for number, rate in ((0, 0.004), (1, 0.00225)):
        result = one.train(number, [number], run=RUN, member=0)
        one.apply(number, [result.blob], True)
        after = [p.detach().clone() for p in one.model.parameters()]
        moved = torch.cat([(a - b).abs().flatten() for a, b in zip(after, before, strict=True)])
        assert float(moved.max()) == pytest.approx(rate, rel=1e-2)
        before = after


def test_roots_name_the_weights(model_dir: Path, data: RandomData) -> None:
    model, _ = load_model(model_dir, torch.device("cpu"))
    root, sha = model_root(model), weights_sha256(model)
    assert (root, sha) == (session(model_dir, data).model_root(), session(model_dir, data).weights_sha256())
    with torch.no_grad():
        next(model.parameters()).view(-1)[7].mul_(1.0000002)
    assert model_root(model) != root
    assert weights_sha256(model) != sha


def test_model_root_takes_pieces_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The root is of the description and the pieces' digests, so it can be recomputed without torch."""
    from blake3 import blake3

    from psyche_node.training import hashing

    monkeypatch.setattr(hashing, "PIECE", 64)
    model = torch.nn.ModuleDict({"b": torch.nn.Linear(5, 3), "a": torch.nn.Linear(3, 7, bias=False)})
    raw = b"".join(p.detach().numpy().tobytes() for _, p in sorted(model.named_parameters()))
    root = blake3(
        b'[["a.weight",[7,3]],["b.bias",[3]],["b.weight",[3,5]]]', derive_key_context="psyche-node 2026-11 model root"
    )
    for start in range(0, len(raw), 64):
        root.update(blake3(raw[start : start + 64]).digest())
    assert hashing.model_root(model) == root.digest()


def test_initial_weights_come_from_the_seed(model_dir: Path, tokenizer: Path, tmp_path: Path) -> None:
    config = {**TINY, "vocab_size": VOCABULARY}
    torch.manual_seed(99)
    make_demo_model(config, tokenizer, tmp_path / "same", seed=1)
    state = torch.random.get_rng_state()
    make_demo_model(config, tokenizer, tmp_path / "other", seed=2)
    assert torch.equal(torch.random.get_rng_state(), state), "the process's own random numbers are left alone"
    roots = [
        model_root(load_model(f, torch.device("cpu"))[0]) for f in (model_dir, tmp_path / "same", tmp_path / "other")
    ]
    assert roots[0] == roots[1] != roots[2]


def test_dropouts_are_zero_with_a_reason(model_dir: Path, tmp_path: Path, data: RandomData) -> None:
    shutil.copytree(model_dir, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.1, "residual_dropout": 0.2}))
    one = session(tmp_path / "m", data)
    reasons = [line for line in one.reasons if "dropout" in line]
    assert [line.split(":")[0] for line in reasons] == [
        "attention_dropout 0 (the config says 0.1)",
        "residual_dropout 0 (the config says 0.2)",
    ]
    assert one.train(0, [0], run=RUN, member=0).loss == session(model_dir, data).train(0, [0], run=RUN, member=0).loss


def test_bad_models_say_why(model_dir: Path, tokenizer: Path, tmp_path: Path, data: RandomData) -> None:
    with pytest.raises(ModelError, match="names no model_type"):
        make_demo_model({"hidden_size": 3}, tokenizer, tmp_path / "a", 0)
    with pytest.raises(ModelError, match="no_such_model"):
        make_demo_model({"model_type": "no_such_model"}, tokenizer, tmp_path / "a", 0)
    with pytest.raises(ModelError, match="20 token embeddings"):
        make_demo_model(
            {**TINY, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
            tokenizer,
            tmp_path / "a",
            0,
        )
    shutil.copytree(model_dir, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        session(tmp_path / "m", data)
    from safetensors.torch import load_file, save_file

    weights = load_file(model_dir / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors of its own config, the first being model\.norm\.weight"):
        session(tmp_path / "m", data)
    big = RandomData()
    big.vocabulary = VOCABULARY + 1
    with pytest.raises(ModelError, match="prepared with 301 tokens"):
        session(model_dir, big)


def test_devices() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(TrainingError, match="unknown"):
        choose_device("quantum", 256, 0, 0)
    with pytest.raises(TrainingError, match="not supported"):
        choose_device("meta", 256, 0, 0)
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="sees 0 CUDA devices"):
            choose_device("cuda:0", 256, 0, 0)
    chosen = choose_device("cpu", 256, 0, threads)
    assert chosen.micro_batch == 8
    assert any(line.startswith("micro-batch 8: about 2048 tokens") for line in chosen.reasons)
    assert choose_device("cpu", 256, 5, threads).micro_batch == 5


def test_an_update_that_does_not_count_returns_to_the_momentum(model_dir: Path, data: RandomData) -> None:
    def momentum(included: bool | None) -> float:
        one = session(model_dir, data, lookahead=False)
        blob = one.train(0, [0, 1], run=RUN, member=0).blob
        one.apply(0, [blob] if included else [], included)
        if included is not None:
            with pytest.raises(UnknownRound):
                one.apply(0, [], included)
        return float(one.optimizer.state_dict()["momentum"].norm())

    assert momentum(False) > momentum(True) * 1.01
    assert momentum(None) == momentum(True), "without a fate nothing is put back"


def test_an_update_is_kept_by_who_sends_it_only(model_dir: Path, data: RandomData) -> None:
    """It may have gigabytes, on each rank of a node, in each round whose fate is open."""
    one = session(model_dir, data)
    blob = one.train(0, range(4), run=RUN, member=0).blob
    assert sys.getrefcount(blob) == 2, "that of this name and of this call"
    one.take_back(0)
