"""What is likely mistyped in a model's config is told, and nothing of what published models have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from psyche_node.planning.errors import PlanError
from psyche_node.planning.meta import shape_from
from psyche_node.planning.names import mistyped, unknown_kind
from psyche_node.planning.shape import SHIPPED, ModelConfig
from psyche_node.sim.prepare import _slips
from psyche_node.training.errors import ModelError
from psyche_node.training.model import build_model

COMMON = "architectures auto_map torch_dtype dtype transformers_version _name_or_path use_cache rope_theta rope_scaling"
SMALL = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
}
# Beside COMMON, the keys of the families' published configs.
PUBLISHED = {
    "llama": "pretraining_tp attention_bias attention_dropout mlp_bias head_dim rms_norm_eps hidden_act",
    "qwen2": "max_window_layers use_sliding_window sliding_window use_mrope attention_dropout",
    "qwen3": "max_window_layers use_sliding_window sliding_window head_dim attention_bias",
    "qwen3_moe": "decoder_sparse_step mlp_only_layers moe_intermediate_size norm_topk_prob num_experts",
    "mistral": "sliding_window head_dim attention_dropout",
    "mixtral": "num_experts_per_tok num_local_experts router_aux_loss_coef router_jitter_noise output_router_logits",
    "gemma2": "hidden_act hidden_activation query_pre_attn_scalar cache_implementation sliding_window_size",
    "granite": "attention_multiplier embedding_multiplier logits_scaling residual_multiplier",
    "phi3": "original_max_position_embeddings embd_pdrop resid_pdrop sliding_window",
    "seed_oss": "attention_out_bias residual_dropout pretraining_tp",
    "gpt2": "n_ctx n_embd n_head n_layer n_positions task_specific_params summary_use_proj layer_norm_epsilon",
    "olmo2": "clip_qkv attention_bias",
    "deepseek_v3": "ep_size first_k_dense_replace kv_lora_rank moe_layer_freq num_nextn_predict_layers",
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_configs_are_not_doubted(kind: str) -> None:
    values = dict.fromkeys(f"{COMMON} {PUBLISHED[kind]}".split()) | {"model_type": kind}
    assert mistyped(values) == []


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.json")), ids=lambda file: file.stem)
def test_shipped_configs_are_not_doubted(file: Path) -> None:
    assert mistyped(json.loads(file.read_bytes())) == []


@pytest.mark.parametrize(
    ("kind", "slip", "meant"),
    [
        ("llama", "num_hidden_layer", "num_hidden_layers"),
        ("llama", "num_layers", "num_hidden_layers"),
        ("seed_oss", "n_head", "num_attention_heads"),
        ("seed_oss", "intermediat_size", "intermediate_size"),
        ("qwen3", "tie_word_embedding", "tie_word_embeddings"),
        ("gpt2", "n_layers", "n_layer"),
    ],
)
def test_a_slip_is_told_with_what_was_meant(kind: str, slip: str, meant: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": kind, slip: 2}))
    (line,) = _slips(file)
    assert line.endswith(f"{kind} models have no setting {slip!r}, and it changes nothing: did you mean {meant}?")
    assert _slips(tmp_path) == [line]


def test_a_model_with_a_slip_says_so_when_it_is_loaded(tmp_path: Path) -> None:
    def reasons(**more: Any) -> list[str]:
        (tmp_path / "config.json").write_text(json.dumps(SMALL | more))
        return build_model(tmp_path)[1]

    assert reasons(num_hidden_layers=2) == []
    (line,) = reasons(num_hidden_layer=2)
    assert "did you mean num_hidden_layers?" in line


def test_an_unknown_kind_of_model_comes_with_the_nearest(tmp_path: Path) -> None:
    assert unknown_kind("qwen3") is None
    assert unknown_kind(None) == "it names no model_type"
    assert unknown_kind("~") == "transformers has no model_type '~'"
    file, values = tmp_path / "config.json", SMALL | {"model_type": "qwen33"}
    file.write_text(json.dumps(values))
    said = r"config.json: transformers has no model_type 'qwen33': did you mean qwen3\?$"
    with pytest.raises(ModelError, match=said):
        build_model(tmp_path)
    with pytest.raises(PlanError, match=said):
        shape_from(ModelConfig("model", file, values))
