"""Loading: the same tensors as transformers loads, from any files, on any layout, with little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from psyche_node.training import ModelError, load_model
from psyche_node.training.model import build_model
from psyche_node.training.weights import load_into

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "seed_oss": {**SMALL, "model_type": "seed_oss"},
    "llama": {**SMALL, "model_type": "llama", "rope_parameters": LLAMA_3_ROPE},
    "llama-tied": {**SMALL, "model_type": "llama", "rope_parameters": LLAMA_3_ROPE, "tie_word_embeddings": True},
    "qwen3": {**SMALL, "model_type": "qwen3"},
    "qwen3-tied": {**SMALL, "model_type": "qwen3", "tie_word_embeddings": True},
    # Its checkpoints keep the experts apart, its modules have them in one tensor.
    "mixtral": {**SMALL, "model_type": "mixtral", "num_local_experts": 3},
    # Names of its own, buffers that are computed, another kind of matrix.
    "gpt2": {"model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    # A scale that is a buffer; two kinds of rotary embedding.
    "gemma3_text": {**SMALL, "model_type": "gemma3_text"},
}


def build(config: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
    with torch.device(device):
        return AutoModelForCausalLM.from_config(kind, dtype=dtype)


def written(config: dict[str, Any], folder: Path, dtype: torch.dtype, shard: str) -> Path:
    torch.manual_seed(3)
    model = build(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_it_loads_what_transformers_loads(kind: str, shard: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = written(FAMILIES[kind], tmp_path, torch.bfloat16, shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "20KB")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found, _ = load_model(folder, torch.device("cpu"))
    theirs, ours = everything(expected), everything(found)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    tied = found.get_input_embeddings().weight is found.get_output_embeddings().weight
    assert tied == (expected.get_input_embeddings().weight is expected.get_output_embeddings().weight)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(found.eval()(tokens).logits, expected.eval()(tokens).logits)


def test_of_one_file_and_many_the_one_is_taken_as_by_transformers(tmp_path: Path) -> None:
    """What is trained has to be what is talked to, and evaluated, which transformers loads."""
    from transformers import AutoModelForCausalLM

    many = written(FAMILIES["qwen3"], tmp_path / "many", torch.float32, "20KB")
    one = written(FAMILIES["qwen3"], tmp_path / "one", torch.float32, "1GB")
    change(one, **{"model.norm.weight": torch.full((32,), 7.0)})
    (many / "model.safetensors").write_bytes((one / "model.safetensors").read_bytes())
    assert (many / "model.safetensors.index.json").exists()
    expected = AutoModelForCausalLM.from_pretrained(many, dtype=torch.float32)
    found, _ = load_model(many, torch.device("cpu"))
    assert torch.equal(found.model.norm.weight, expected.model.norm.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_float_becomes_what_the_model_has(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = written(FAMILIES["qwen3"], tmp_path, dtype, "1GB")
    raw = load_file(folder / "model.safetensors")
    for wanted in (torch.float32, torch.bfloat16):
        model = build(FAMILIES["qwen3"], "meta", wanted)
        load_into(model, folder, torch.device("cpu"))
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, raw[name].to(wanted)), name


def test_weights_that_have_memory_are_overwritten_in_place(tmp_path: Path) -> None:
    folder = written(FAMILIES["llama-tied"], tmp_path, torch.float32, "1GB")
    model = build(FAMILIES["llama-tied"])
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    load_into(model, folder, torch.device("cpu"))
    raw = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name]
        assert torch.equal(parameter, raw[name])


def test_the_folders_config_decides_the_shapes(tmp_path: Path) -> None:
    """Seed-OSS's default width is 4096; the 36B of that family has 5120."""
    folder = written({**FAMILIES["seed_oss"], "hidden_size": 40}, tmp_path, torch.float32, "1GB")
    model, _ = load_model(folder, torch.device("cpu"))
    assert model.config.hidden_size == model.get_input_embeddings().weight.shape[1] == 40


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    raw = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            del raw[name]
        else:
            raw[name] = tensor
    save_file(raw, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weight": None}, r"lacks 1 tensors of its own config, the first being model\.norm\.weight"),
        (
            {"model.extra.weight": torch.zeros(2)},
            r"1 tensors that its own config .* the first being model\.extra\.weight",
        ),
        (
            {"model.norm.weight": torch.zeros(31)},
            r"model\.norm\.weight in .* shape \(31,\), by the config it is \(32,\)",
        ),
        ({"model.norm.weight": torch.zeros(32).to(torch.float8_e4m3fn)}, "quantised weights cannot be trained"),
        ({"lm_head.weight": torch.zeros(96, 32)}, "Set tie_word_embeddings to false"),
    ],
)
def test_what_does_not_fit_is_named(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = written(FAMILIES["qwen3-tied"], tmp_path, torch.float32, "1GB")
    change(folder, **tensors)
    with pytest.raises(ModelError, match=message):
        load_model(folder, torch.device("cpu"))


def test_computed_buffers_in_old_files_are_passed_over(tmp_path: Path) -> None:
    folder = written(FAMILIES["llama"], tmp_path, torch.float32, "1GB")
    change(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    model, _ = load_model(folder, torch.device("cpu"))
    assert bool((model.model.rotary_emb.inv_freq > 0).all())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number"),
        ({"num_hidden_layers": "x"}, 'num_hidden_layers is "x"; it'),
        ({"hidden_size": -1}, "hidden_size is -1; it"),
        ({"rms_norm_eps": []}, "rms_norm_eps"),
        ({"hidden_act": "nothing"}, "nothing"),
    ],
)
def test_sizes_that_no_model_has_are_named_with_their_file(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL, **change}))
    with pytest.raises(ModelError) as raised:
        load_model(tmp_path, torch.device("cpu"))
    assert said in str(raised.value)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_whole_numbers_are_no_weights(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = written(FAMILIES[kind], tmp_path, torch.float32, "1GB")
    tensors = load_file(folder / "model.safetensors")
    some = "experts." if kind == "mixtral" else "mlp.up_proj."
    change(folder, **{name: tensor.to(dtype) for name, tensor in tensors.items() if some in name})
    with pytest.raises(ModelError, match=rf"is {dtype}, whole numbers .*quantised weights cannot be trained"):
        load_model(folder, torch.device("cpu"))


def test_a_config_that_says_quantised_is_refused(tmp_path: Path) -> None:
    folder = written(FAMILIES["qwen3"], tmp_path, torch.bfloat16, "1GB")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="holds quantised weights"):
        load_model(folder, torch.device("cpu"))


def test_sizes_by_layer_are_sizes(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {**SMALL, "intermediate_size": [48, 64], "num_kv_shared_layers": 0}
    sizes |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "laurel_rank": 8}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n_text", **sizes, **layers}))
    model, _ = build_model(tmp_path)
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [48, 64]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n_text", **sizes, "intermediate_size": [0]}))
    with pytest.raises(ModelError, match=r"intermediate_size is \[0\]; it must be a whole number"):
        build_model(tmp_path)


def test_damaged_folders_say_what_is_wrong(tmp_path: Path) -> None:
    folder = written(FAMILIES["qwen3"], tmp_path / "a", torch.float32, "20KB")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    first = folder / min(set(listed["weight_map"].values()))
    whole = first.read_bytes()
    first.write_bytes(whole[:-8])
    with pytest.raises(ModelError, match=f"{first.name} cannot be loaded"):
        load_model(folder, torch.device("cpu"))
    first.unlink()
    with pytest.raises(ModelError, match=rf"names {first.name}, which is not in"):
        load_model(folder, torch.device("cpu"))
    first.write_bytes(whole)
    listed["weight_map"]["model.norm.weight"] = "../model.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(ModelError, match=r"names \.\./model\.safetensors"):
        load_model(folder, torch.device("cpu"))
    index.write_text("{")
    with pytest.raises(ModelError, match="cannot be read as an index"):
        load_model(folder, torch.device("cpu"))
    index.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"Save pytorch_model\.bin as safetensors first"):
        load_model(folder, torch.device("cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ranks", [1, 4])
def test_peak_memory_beside_the_model_is_one_file(ranks: int, tmp_path: Path) -> None:
    """The peak of all resident pages, those of the mapped files included, less what was there and the model itself."""
    config = {
        **FAMILIES["llama"],
        "vocab_size": 16000,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    big = tmp_path / "big"
    build(config, dtype=torch.bfloat16).save_pretrained(big, max_shard_size="20MB")
    small = written(FAMILIES["llama"], tmp_path / "small", torch.bfloat16, "20KB")
    sizes = [path.stat().st_size for path in big.glob("*.safetensors")]
    assert len(sizes) > 4
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("loading_memory.py")), str(small), str(big), str(ranks)],
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    beside, held = json.loads(done.stdout.splitlines()[-1])
    assert held == pytest.approx(2 * sum(sizes) / ranks, rel=0.05)
    assert beside <= 1.3 * max(sizes), f"{beside / max(sizes):.2f} times the largest file"
