"""How a node runs the model: precision, attention, activations, compilation, and what happens when memory runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from tiny import LENGTH, TINY, VOCABULARY, RandomData, terms

from optimizer.layout import Layout
from psyche_node.training import ModelError, Session, TrainingError, fit, make_demo_model, preparing
from psyche_node.training.attention import candidates
from psyche_node.training.errors import OutOfMemory, SeparationError
from psyche_node.training.fit import Site, choose_fit, free_memory
from psyche_node.training.forward import LossFunction, logits
from psyche_node.training.gradient import accumulate, micro_batches
from psyche_node.training.model import build_model, load_model
from psyche_node.training.options import DEFAULTS, Options
from psyche_node.training.preparing import compile_layers
from psyche_node.training.separation import check_separation

RUN = bytes(range(32))
CPU = torch.device("cpu")
GPU = torch.device("cuda")  # names one; nothing is put there
ONE = Site(1, 1, only_bf16=False, attention="lengths")


def session(model_dir: Path, data: RandomData, options: Options = DEFAULTS, **settings: Any) -> Session:
    # On one thread, since how many a library takes, and so the order of sums, may follow the machine's load.
    return Session(model_dir, data, terms(), device="cpu", options=options, **{"threads": 1, **settings})


def gradients(one: Session, data: RandomData) -> list[torch.Tensor]:
    one.model.zero_grad()
    accumulate(one._loss, data.batch(range(7), b""), one.device)
    return [p.grad.clone() for p in one.model.parameters()]


@pytest.mark.parametrize("kind", ["seed_oss", "llama", "qwen3"])
def test_activations_computed_again_give_the_same_gradient(
    kind: str, tokenizer: Path, tmp_path: Path, data: RandomData
) -> None:
    make_demo_model({**TINY, "model_type": kind, "vocab_size": VOCABULARY}, tokenizer, tmp_path, seed=1)
    kept, again = (session(tmp_path, data, Options(activation_checkpointing=way)) for way in ("off", "on"))
    for found, expected in zip(gradients(again, data), gradients(kept, data), strict=True):
        assert torch.equal(found, expected)
    assert "activations are computed again going backward: as asked" in again.reasons


@pytest.mark.parametrize("kind", ["seed_oss", "llama", "qwen3"])
def test_full_logits_never_exist(kind: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a vocabulary so large that they would be most of the step's memory."""
    from psyche_node.training import loss as losses

    vocabulary, tokens = 6000, 512
    make_demo_model({**TINY, "model_type": kind, "vocab_size": vocabulary}, tokenizer, tmp_path, seed=1)
    model, _ = load_model(tmp_path, CPU)
    loss = LossFunction(model)
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 32 * vocabulary)
    batch = torch.randint(vocabulary, (1, tokens)), torch.ones(1, tokens, dtype=torch.bool), torch.arange(tokens)[None]
    with LiveBytes() as live:
        loss(*batch).backward()
    table = model.get_output_embeddings().weight.numel() * 4
    assert live.peak < 4 * tokens * vocabulary, "less than the logits alone"
    assert live.peak > table, "the account sees the gradient of the table"


def test_bf16_replicas_are_identical_and_learn(model_dir: Path, data: RandomData) -> None:
    digest = Layout.build(session(model_dir, data).shapes, terms().topk, only_bf16=True).digest
    members = [session(model_dir, data, layout_digest=digest, micro_batch=m) for m in (1, 3)]
    assert {one.precision for one in members} == {"bf16"}
    assert {p.dtype for one in members for p in one.model.parameters()} == {torch.bfloat16}
    first = members[0].evaluate()[0]
    for number in range(14):
        blobs = [s.train(number, range(i * 4, i * 4 + 4), run=RUN, member=i).blob for i, s in enumerate(members)]
        for i, member in enumerate(members):
            member.apply(number, blobs[i:] + blobs[:i], True)
        assert len({(one.fingerprint(), one.weights_sha256(), one.model_root()) for one in members}) == 1
        assert members[0].optimizer.report().lost == 0.0
    assert members[0].evaluate()[0] < first - 0.3


def test_gradients_of_bf16_weights_are_summed_in_fp32(model_dir: Path, data: RandomData) -> None:
    """Each micro-batch's is in bf16, as its weights are; their sum is what fp32 makes of them, bit for bit."""
    one, other = (session(model_dir, data, Options(precision="bf16"), micro_batch=1) for _ in range(2))
    batch = data.batch(range(40), b"")
    accumulate(one._loss, batch, one.device)
    sums = [torch.zeros(p.shape) for p in other.model.parameters()]
    for part in micro_batches(batch, other.device):
        (other._loss(*part) / int(batch.trained.sum())).backward()
        for total, parameter in zip(sums, other.model.parameters(), strict=True):
            assert parameter.grad.dtype == torch.bfloat16
            total += parameter.grad
        other.model.zero_grad()
    for total, (name, parameter) in zip(sums, one.model.named_parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        if name != "model.embed_tokens.weight":  # tied: the embedding's and the head's are not added up in bf16 either
            assert torch.equal(parameter.grad, total)


def test_a_bf16_checkpoint_goes_on_with_the_same_weights(model_dir: Path, data: RandomData, tmp_path: Path) -> None:
    one = session(model_dir, data, Options(precision="bf16"))
    one.apply(0, [one.train(0, [0, 1], run=RUN, member=0).blob], True)
    one.save(tmp_path / "saved")
    assert session(tmp_path / "saved", data, Options(precision="bf16")).model_root() == one.model_root()


def test_precision_is_part_of_the_layout_digest(model_dir: Path, data: RandomData) -> None:
    fp32, bf16 = (session(model_dir, data, Options(precision=kind)) for kind in ("fp32", "bf16"))
    digests = [one.optimizer.layout.digest for one in (fp32, bf16)]
    assert digests[0] != digests[1]
    assert [session(model_dir, data, layout_digest=digest).precision for digest in digests] == ["fp32", "bf16"]
    assert session(model_dir, data, layout_digest=bytes(32)).precision == "fp32"
    asked = session(model_dir, data, Options(precision="fp32"), layout_digest=digests[1])
    assert asked.optimizer.layout.digest != digests[1], "which the node then refuses to join with"
    from optimizer import MalformedUpdate

    with pytest.raises(MalformedUpdate, match="layout"):
        fp32.apply(0, [bf16.train(0, [0], run=RUN, member=1).blob], None)


def test_running_out_of_memory_halves_the_micro_batch_and_the_round_goes_on(
    model_dir: Path, data: RandomData, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory for two sequences: what comes out is what a micro-batch of two makes."""
    expected = session(model_dir, data, micro_batch=2).train(0, range(7), run=RUN, member=0)
    one = session(model_dir, data, micro_batch=8)
    plain, calls = one._loss, []

    class Scarce(LossFunction):
        def __call__(self, tokens_BL: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            calls.append(len(tokens_BL))
            # Half of a step is done by then, and must not count twice.
            if len(tokens_BL) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return plain(tokens_BL, *rest)

    one._loss = Scarce(one.model)
    result = one.train(0, range(7), run=RUN, member=0)
    assert calls == [7, 4, 2, 2, 2, 1]
    assert result.blob == expected.blob
    assert one.device.micro_batch == 2
    assert "the micro-batch is now 2, for good" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory", 2),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "cublas", "driver", "python"],
)
def test_no_memory_at_all_leaves_the_round_and_nothing_else(
    error: Exception, model_dir: Path, data: RandomData
) -> None:
    one = session(model_dir, data, micro_batch=2)
    before, plain = one.weights_sha256(), one._loss

    class Scarce(LossFunction):
        done = 0

        def __call__(self, *batch: torch.Tensor) -> torch.Tensor:
            self.done += 1
            if self.done > 1:
                raise error
            return plain(*batch)

    one._loss = Scarce(one.model)
    with pytest.raises(OutOfMemory, match=r"micro-batch of 1 needs more memory .* Set activation_checkpointing to on"):
        one.train(0, range(5), run=RUN, member=0)
    assert one.weights_sha256() == before
    assert all(p.grad is None for p in one.model.parameters())
    one._loss = plain
    one.apply(1, [one.train(1, range(5), run=RUN, member=0).blob], True)


def test_other_errors_are_not_taken_for_it(model_dir: Path, data: RandomData) -> None:
    one = session(model_dir, data, micro_batch=4)

    class Broken(LossFunction):
        def __call__(self, *batch: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shapes do not fit")

    one._loss = Broken(one.model)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        one.train(0, [0], run=RUN, member=0)
    assert one.device.micro_batch == 4


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Any:
    """8 billion parameters, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_what_fits_on_a_gpu_is_chosen(large: Any) -> None:
    """More memory, more sequences; and activations are kept as soon as they fit."""
    found = [choose_fit(large, GPU, 4096, 0, DEFAULTS, ONE, free=gib << 30) for gib in (150, 175, 200, 900)]
    assert [fit.checkpointing for fit in found] == sorted((fit.checkpointing for fit in found), reverse=True)
    assert found[0].checkpointing
    assert not found[-1].checkpointing
    assert found[-1].micro_batch == 8
    assert "32768 tokens are enough to fill a GPU" in found[-1].reasons[0]
    assert any("GiB of 150 GiB" in line for line in found[0].reasons)
    assert "activations are computed again going backward: kept, they do not fit" in found[0].reasons
    small = choose_fit(large, GPU, 4096, 0, DEFAULTS, ONE, free=40 << 30)
    assert (small.micro_batch, small.checkpointing) == (1, True)
    assert any("too much by this account" in line for line in small.reasons)


def test_what_was_asked_is_done(large: Any) -> None:
    asked = choose_fit(large, GPU, 4096, 3, Options(activation_checkpointing="off"), ONE, free=40 << 30)
    assert (asked.micro_batch, asked.checkpointing) == (3, False)
    assert choose_fit(large, GPU, 4096, 0, Options(activation_checkpointing="on"), ONE, free=900 << 30).checkpointing


def test_less_is_held_where_ranks_share_and_in_bf16(large: Any) -> None:
    alone = choose_fit(large, GPU, 4096, 0, DEFAULTS, ONE, free=78 << 30)
    many = choose_fit(large, GPU, 4096, 0, DEFAULTS, Site(8, 1, only_bf16=False, attention="lengths"), free=78 << 30)
    assert "too much" in alone.reasons[0]
    assert "too much" not in many.reasons[0]
    bf16 = Site(1, 1, only_bf16=True, attention="lengths")
    assert "too much" in choose_fit(large, GPU, 4096, 0, DEFAULTS, ONE, free=125 << 30).reasons[0]
    assert "too much" not in choose_fit(large, GPU, 4096, 0, DEFAULTS, bf16, free=125 << 30).reasons[0]


def test_on_a_cpu_caches_decide(large: Any, model_dir: Path, data: RandomData) -> None:
    found = choose_fit(large, CPU, 512, 0, DEFAULTS, ONE, free=900 << 30)
    assert (found.micro_batch, found.checkpointing) == (4, False)
    assert "about 2048 tokens per forward pass on a cpu device" in found.reasons[0]
    assert choose_fit(large, CPU, 512, 0, DEFAULTS, ONE, free=10 << 30).checkpointing
    one = session(model_dir, data)
    assert one.device.micro_batch == 64
    assert sum(line.startswith("micro-batch 64: about 2048 tokens") for line in one.reasons) == 1


def test_ranks_of_one_host_share_its_memory(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(model_dir, CPU)
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 800 kB\n")
    monkeypatch.setattr(fit, "Path", lambda _: tmp_path / "meminfo")
    held = 4 * sum(p.numel() for p in model.parameters())
    assert free_memory(model, CPU) == held + 800 * 1024
    assert free_memory(model, CPU, 4) == held + 200 * 1024


def test_a_lookahead_that_is_off_needs_no_copy(
    model_dir: Path, data: RandomData, large: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 135 << 30
    without = Site(1, 1, only_bf16=False, attention="lengths", lookahead=False)
    assert "too much" in choose_fit(large, GPU, 4096, 0, DEFAULTS, ONE, free).reasons[0]
    assert "too much" not in choose_fit(large, GPU, 4096, 0, DEFAULTS, without, free).reasons[0]
    sites: list[Site] = []
    monkeypatch.setattr(preparing, "choose_fit", lambda *a: sites.append(a[5]) or choose_fit(*a))
    for lookahead in (True, False):
        Session(model_dir, data, terms(lookahead=lookahead), device="cpu")
    assert [one.lookahead for one in sites] == [True, False]


def test_attention_is_chosen_with_a_reason(model_dir: Path, data: RandomData) -> None:
    assert any(line.startswith("attention sdpa: it runs on every") for line in session(model_dir, data).reasons)
    eager = session(model_dir, data, Options(attention="eager"))
    assert eager.model.config._attn_implementation == "eager"
    assert "attention eager: as asked" in eager.reasons
    for name in ("flash", "flex"):
        with pytest.raises(TrainingError, match=f"attention '{name}' cannot be used: .*it needs a GPU"):
            session(model_dir, data, Options(attention=name))
    on_gpu = [name for name, _ in candidates(eager.model, "auto", GPU)]
    assert on_gpu[-3:] == ["flex", "sdpa", "eager"]


def test_a_micro_batch_laid_end_to_end_is_the_same(model_dir: Path) -> None:
    """As varlen attention needs it: rows of a batch are documents of one long sequence."""
    model, _ = load_model(model_dir, CPU)
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(VOCABULARY, (3, 24), generator=generator)
    places = torch.cat([torch.arange(9), torch.arange(15)]).repeat(3, 1)
    expected = logits(model, tokens, places)

    class EndToEnd:
        """A config that says it is flash, over attention that a CPU has."""

        def __init__(self, config: Any) -> None:
            self._config = config

        def __getattr__(self, name: str) -> Any:
            return "flash_attention_2" if name == "_attn_implementation" else getattr(self._config, name)

    inner, model.config = model.config, EndToEnd(model.config)
    try:
        found = logits(model, tokens, places)
    finally:
        model.config = inner
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_that_see_each_other_are_found(model_dir: Path) -> None:
    """What varlen attention does if it takes a batch for one sequence, and its lengths from the first row."""
    model, _ = load_model(model_dir, CPU)

    def mixed(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        one = torch.arange(2 * length)[None]
        restarted = places[:1].repeat(1, 2).clone()
        restarted[:, length:] += one[:, length : length + 1] if int(places[0, 1]) else 0
        found = model(input_ids=tokens.reshape(1, -1), position_ids=one, attention_mask=None, use_cache=False).logits
        separate = logits(model, tokens, places)
        return torch.stack([separate[0], found[0, length:]])

    with pytest.raises(SeparationError, match="see each other"):
        check_separation(mixed, VOCABULARY, CPU, LENGTH)


REFUSED = {
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_be_packed_are_refused(kind: str, tokenizer: Path, tmp_path: Path, data: RandomData) -> None:
    make_demo_model({**REFUSED[kind], "model_type": kind, "initializer_range": 0.3}, tokenizer, tmp_path, seed=0)
    with pytest.raises(SeparationError, match="cannot be trained on packs"):
        session(tmp_path, data)


TRAINED = {
    **{kind: {**TINY, "vocab_size": VOCABULARY} for kind in ("mistral", "gemma2", "gemma3_text", "phi3", "olmo2")},
    "mixtral": {**TINY, "vocab_size": VOCABULARY, "num_local_experts": 3},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


@pytest.mark.parametrize("kind", TRAINED)
def test_any_other_decoder_trains(kind: str, tokenizer: Path, tmp_path: Path, data: RandomData) -> None:
    make_demo_model({**TRAINED[kind], "model_type": kind}, tokenizer, tmp_path, seed=0)
    one = session(tmp_path, data)
    before = one.weights_sha256()
    result = one.train(0, range(3), run=RUN, member=0)
    assert result.gradient_norm > 0
    one.apply(0, [result.blob], True)
    assert one.weights_sha256() != before
    full = kind == "gemma2"  # which caps its logits
    assert any(line.startswith("loss from full logits") for line in one.reasons) == full


def test_folders_that_are_no_causal_language_model_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    for text, why in (
        ('{"model_type": "vit"}', "cannot be loaded as a causal language model: "),
        ('{"model_type": "t5"}', "cannot be loaded as a causal language model: "),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}', "needs code of its own"),
        ('{"model_type": "gemma3"}', "has a part for images"),
    ):
        config.write_text(text)
        with pytest.raises(ModelError, match=why):
            build_model(tmp_path)


def test_compiled_layers_are_the_same_function(model_dir: Path, data: RandomData) -> None:
    """Captured in one graph each, forward and backward, but not made into machine code, which takes minutes."""
    plain, compiled = session(model_dir, data), session(model_dir, data)
    names = [name for name, _ in plain.model.named_parameters()]
    assert compile_layers(compiled.model, "aot_eager").startswith("torch.compile of 2 layers: as asked")
    assert [name for name, _ in compiled.model.named_parameters()] == names
    for found, expected in zip(gradients(compiled, data), gradients(plain, data), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    compiled.apply(0, [compiled.train(0, [0, 1], run=RUN, member=0).blob], True)
