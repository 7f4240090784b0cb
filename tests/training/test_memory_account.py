"""`psyche-node plan`'s memory against the tensors that are alive in real steps of the trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_bytes import LiveBytes
from tiny import Packed, bits, terms

from optimizer.geometry import SLAB_BLOCKS
from psyche_node.planning import memory as account
from psyche_node.planning.meta import shape_from
from psyche_node.planning.shape import ModelConfig, ModelShape
from psyche_node.training import Session, loss
from psyche_node.training import session as trainer
from psyche_node.training.device import Device
from psyche_node.training.options import DEFAULTS, Options

LENGTH, VOCABULARY, SHARE = 128, 1024, 4
BASE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 384,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
}
FAMILIES = ("llama", "qwen3", "seed_oss")


class LongData:
    """Two documents a sequence, every token of them trained."""

    sequence_length, vocabulary, unigram_entropy = LENGTH, VOCABULARY, 5.0
    digest = bytes(32)

    def __len__(self) -> int:
        return 64

    def batch(self, positions: Any, seed: bytes) -> Packed:
        shape = (len(positions), LENGTH)
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, shape)
        places = np.broadcast_to(np.arange(LENGTH) % (LENGTH // 2), shape).copy()
        return Packed(tokens, np.ones(shape, np.bool_), places)

    def heldout(self, limit: int | None = None) -> Packed:
        return self.batch(range(limit or 1), b"")


def folder_of(kind: str, tied: bool, make: Callable[[], Path], **sizes: int) -> tuple[Path, ModelShape]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**BASE, **sizes, "model_type": kind, "tie_word_embeddings": tied}
    values = {key: value for key, value in config.items() if key != "model_type"}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values, **tokens))
    folder = make()
    model.save_pretrained(folder)
    return folder, shape_from(ModelConfig(kind, folder / "config.json", config))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], tuple[Path, ModelShape]]:
    kinds = [(kind, False) for kind in FAMILIES] + [("llama", True)]
    return {key: folder_of(*key, lambda: tmp_path_factory.mktemp("model")) for key in kinds}


@dataclass
class Peaks:
    """Bytes alive at most, of all tensors: in forward and backward passes, and in the optimizer."""

    training: int = 0
    optimizer: int = 0


def peaks_of(
    folder: Path,
    micro_batch: int,
    checkpointing: bool,
    lookahead: bool,
    monkeypatch: pytest.MonkeyPatch,
    options: Options = DEFAULTS,
    **changes: Any,
) -> Peaks:
    """Of two rounds; ``changes`` of the terms."""
    said = terms(lookahead=lookahead, **changes)
    session = Session(folder, LongData(), said, "cpu", micro_batch, 1, options=options)
    if checkpointing:
        session.model.gradient_checkpointing_enable({"use_reentrant": False})
    accumulate, peaks = trainer.accumulate, Peaks()
    with LiveBytes() as live:

        def watched(*arguments: Any) -> float:
            peaks.optimizer = max(peaks.optimizer, live.peak)
            live.reset_peak()
            loss = accumulate(*arguments)
            peaks.training = max(peaks.training, live.peak)
            live.reset_peak()
            return loss

        monkeypatch.setattr(trainer, "accumulate", watched)
        state = session.optimizer.state_dict()
        for tensor in (*session.model.parameters(), *session.model.buffers(), state["momentum"], state["trend"]):
            live.add(tensor)
        del state
        for round in range(2):
            blob = session.train(round, range(SHARE), run=bytes(32), member=0).blob
            session.apply(round, [blob], included=True)
        peaks.optimizer = max(peaks.optimizer, live.peak)
    return peaks


def planned(
    shape: ModelShape,
    compute: account.Compute,
    micro_batch: int,
    checkpointing: bool,
    lookahead: bool,
    **changes: Any,
) -> int:
    work = account.Work(
        sequence=LENGTH,
        micro_batch=micro_batch,
        compute=compute,
        checkpointing=checkpointing,
        lookahead=lookahead,
        micro_batches=SHARE // micro_batch,
        **{"attention": "scores" if shape.capped_scores else "mask", **changes},
    )
    return account.memory(shape, work, outside=0, scratch=0).total


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_needs_what_was_planned(
    models: dict[tuple[str, bool], tuple[Path, ModelShape]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    micro_batch: int,
    checkpointing: bool,
) -> None:
    folder, shape = models[kind, False]
    found = peaks_of(folder, micro_batch, checkpointing, True, monkeypatch)
    assert planned(shape, "fp32", micro_batch, checkpointing, True) == pytest.approx(found.training, rel=0.1)
    state = account.memory(shape, account.Work(LENGTH, compute="fp32"), outside=0, scratch=0)
    kept = state.weights + state.momentum + state.trend + state.aside + 4 * shape.parameters
    on_a_cpu = account.SCRATCH * SLAB_BLOCKS["cpu"] // SLAB_BLOCKS["cuda"]
    assert found.optimizer <= kept + on_a_cpu


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelShape]:
    """A family whose logits are no plain product, with so many words that they are what a step needs most for."""
    sizes = {"vocab_size": 8 * VOCABULARY, "logits_scaling": 8}
    return folder_of("granite", False, lambda: tmp_path_factory.mktemp("model"), **sizes)


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize(("micro_batch", "checkpointing"), [(1, False), (4, False), (4, True)])
def test_a_step_with_full_logits_needs_what_was_planned(
    scaled: tuple[Path, ModelShape],
    monkeypatch: pytest.MonkeyPatch,
    micro_batch: int,
    checkpointing: bool,
    lookahead: bool,
) -> None:
    folder, shape = scaled
    assert shape.loss == "full"
    found = peaks_of(folder, micro_batch, checkpointing, lookahead, monkeypatch)
    wanted = planned(shape, "fp32", micro_batch, checkpointing, lookahead)
    assert wanted == pytest.approx(found.training, rel=0.1)


WIDE = {"granite": {"vocab_size": 8 * VOCABULARY, "logits_scaling": 8}, "gemma2": {"vocab_size": 8 * VOCABULARY}}


@pytest.mark.parametrize("kind", sorted(WIDE))
@pytest.mark.parametrize(("micro_batch", "checkpointing"), [(1, True), (4, False), (4, True)])
def test_a_step_with_z_loss_of_full_logits_needs_what_was_planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, micro_batch: int, checkpointing: bool
) -> None:
    folder, shape = folder_of(kind, False, lambda: tmp_path, **WIDE[kind])
    assert shape.loss != "chunked"
    found = peaks_of(folder, micro_batch, checkpointing, True, monkeypatch, z_loss_bits=bits("0.0001"))
    wanted = planned(shape, "fp32", micro_batch, checkpointing, True, z_loss=True)
    assert wanted == pytest.approx(found.training, rel=0.03)


def test_z_loss_of_chunks_needs_no_more(
    models: dict[tuple[str, bool], tuple[Path, ModelShape]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shape = models["llama", False]
    found = peaks_of(folder, 4, False, True, monkeypatch, z_loss_bits=bits("0.0001"))
    assert planned(shape, "fp32", 4, False, True, z_loss=True) == pytest.approx(found.training, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_of_gemma_2_needs_what_was_planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tied: bool, micro_batch: int, checkpointing: bool
) -> None:
    """Four norms a layer, and attention's scores through a cap, which only the eager implementation can."""
    folder, shape = folder_of("gemma2", tied, lambda: tmp_path)
    assert (shape.norms, shape.masks, shape.assumed) == (4, 2, False)
    found = peaks_of(folder, micro_batch, checkpointing, True, monkeypatch)
    assert planned(shape, "fp32", micro_batch, checkpointing, True) == pytest.approx(found.training, rel=0.05)


@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_gemma_2_in_bf16_needs_what_was_planned(
    autocast: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpointing: bool, heads: int
) -> None:
    folder, shape = folder_of("gemma2", False, lambda: tmp_path, num_attention_heads=heads)
    found = peaks_of(folder, 4, checkpointing, True, monkeypatch)
    assert planned(shape, "autocast", 4, checkpointing, True) == pytest.approx(found.training, rel=0.07)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_step_with_eager_attention_needs_what_was_planned(
    models: dict[tuple[str, bool], tuple[Path, ModelShape]], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder, shape = models[kind, False]
    found = peaks_of(folder, 4, False, True, monkeypatch, Options(attention="eager"))
    assert planned(shape, "fp32", 4, False, True, attention="scores") == pytest.approx(found.training, rel=0.05)


@pytest.fixture
def autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 computing with fp32 weights, as on one GPU."""

    def compute(_: Device) -> AbstractContextManager[object]:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    monkeypatch.setattr(Device, "compute", compute)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "tied"), [("seed_oss", False), ("llama", True)])
def test_a_step_in_bf16_needs_what_was_planned(
    models: dict[tuple[str, bool], tuple[Path, ModelShape]],
    autocast: None,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    tied: bool,
    checkpointing: bool,
) -> None:
    folder, shape = models[kind, tied]
    found = peaks_of(folder, 2, checkpointing, False, monkeypatch)
    assert planned(shape, "autocast", 2, checkpointing, False) == pytest.approx(found.training, rel=0.1)


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize(("kind", "tied"), [("seed_oss", False), ("llama", True)])
def test_a_step_with_bf16_weights_needs_what_was_planned(
    models: dict[tuple[str, bool], tuple[Path, ModelShape]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    tied: bool,
    micro_batch: int,
) -> None:
    """Their gradients are in fp32."""
    folder, shape = models[kind, tied]
    found = peaks_of(folder, micro_batch, False, True, monkeypatch, Options(precision="bf16"))
    plan = planned(shape, "bf16", micro_batch, False, True, weight_bytes=2, masters=False)
    assert plan == pytest.approx(found.training, rel=0.1)


def test_a_step_in_bf16_with_full_logits_needs_what_was_planned(
    scaled: tuple[Path, ModelShape], autocast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shape = scaled
    found = peaks_of(folder, 4, False, True, monkeypatch)
    assert planned(shape, "autocast", 4, False, True) == pytest.approx(found.training, rel=0.1)


def test_the_account_sees_what_autograd_keeps() -> None:
    with LiveBytes() as live:
        x = torch.ones(256, requires_grad=True)
        y = x.exp()
        assert live.now == 2 * 1024
        view = y[3:]
        del y
        assert live.now == 2 * 1024, "a view keeps its storage"
        view.sum().backward()
        del view
    assert live.now == 2 * 1024, "x and its gradient"
    assert live.peak >= 3 * 1024


def test_constants_are_those_of_the_trainer() -> None:
    assert account.CHUNK_LOGITS == loss.CHUNK_LOGITS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: what CUDA has allocated is compared")
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_step_on_a_gpu_needs_what_was_planned(tmp_path: Path, micro_batch: int) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "head_dim": 64}
    folder, shape = folder_of("llama", False, lambda: tmp_path, num_hidden_layers=8, **sizes)
    session = Session(folder, LongData(), terms(), "cuda", micro_batch, 1)
    torch.cuda.reset_peak_memory_stats()
    for round in range(2):
        blob = session.train(round, range(SHARE), run=bytes(32), member=0).blob
        session.apply(round, [blob], included=True)
    found = torch.cuda.max_memory_allocated()
    work = account.Work(LENGTH, micro_batch, micro_batches=SHARE // micro_batch)
    assert account.memory(shape, work, outside=0).total == pytest.approx(found, rel=0.1)
