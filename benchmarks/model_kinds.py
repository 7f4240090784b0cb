"""Every kind of causal language model that transformers has, at tiny size: it trains as it should, or is refused.

    python -m benchmarks.model_kinds              # six minutes on a core
    python -m benchmarks.model_kinds llama gpt2   # some kinds

Of each kind a model with random weights is written by transformers, and loaded, trained for two rounds, saved and
loaded again by the product. Where it is not refused, each of these has to hold; the baseline is transformers itself:

- the logits of documents in a pack are those that transformers gives each alone, and so is their loss;
- no token moves the logits before it;
- the checkpoint loads to the same weights, here and by `from_pretrained`.

Kinds whose sizes cannot all be made small by the names of their settings are left out, and listed. Exit status 1 if
something does not hold, or a model is refused by an error that is none of the product's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.nn import functional

VOCABULARY, LENGTH, SEED = 304, 64, 1
DOCUMENTS = (19, 23, 17, 40)
MOST = 16_000_000
"""Parameters of what is called tiny."""
SECONDS = 90
_TOLERANCE = 1e-4
"""Of the largest logit, and of the loss: the order of summation may differ."""
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_SMALL: Mapping[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "emb_dim", "dim", "embedding_size", "attention_hidden_size"), 32
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys((*_LAYERS, "n_layers", "encoder_layers", "decoder_layers", "hidden_layers", "layers", "n_dec"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "global_head_dim", "index_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_state"), 8),
    **dict.fromkeys(("state_size", "num_mel_bins", "hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size", "mamba_d_ssm"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "index_topk"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_head", "attention_chunk_size"), 16),
    **dict.fromkeys(("sliding_window", "sliding_window_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("max_target_positions", "max_source_positions"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "time_step_rank"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "altup_num_inputs", "mamba_expand"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups", "num_shared_experts"), 1),
    **dict.fromkeys(("num_kv_shared_layers", "zero_expert_num"), 0),
}
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
_NARROW, _ROTARY = {"head_dim": 8}, {"rotary_dim": 4}
_CONVOLVED = {"layer_types": ["conv", "full_attention"]}
_GLOBAL = {"per_layer_config": {1: {"head_dim": 16}}}
_KINDS: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), _LATENT),
    **dict.fromkeys(("minicpm3", "youtu"), _LATENT),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron"), _NARROW),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _CONVOLVED),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GLOBAL),
    **dict.fromkeys(("codegen", "gptj"), _ROTARY),
    "deepseek_v2": {**_LATENT, "topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"intermediate_size": [64, 64], "activation_sparsity_pattern": [0.0, 0.0]},
    "kimi_linear": {**_LATENT, "num_experts": 8, "num_experts_per_token": 2},
    "longcat_flash": {"num_key_value_heads": 4, "qk_head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "roc_bert": {"shape_embed_dim": 16, "pronunciation_embed_dim": 16},
    "xlnet": {"d_head": 8},
}
"""What the sizes above leave at odds with each other."""

Outcome = Literal["trains", "refused", "left out", "WRONG"]


@dataclass(frozen=True, slots=True)
class Found:
    """What came of one kind."""

    kind: str
    outcome: Outcome
    why: str = ""


@dataclass(frozen=True, slots=True)
class _Batch:
    tokens: Any
    trained: Any
    places: Any


class _Documents:
    """Packed documents of random tokens."""

    sequence_length, vocabulary, unigram_entropy, digest = LENGTH, VOCABULARY, 5.0, bytes(32)

    def __len__(self) -> int:
        return 8

    def batch(self, positions: Any, seed: bytes) -> _Batch:
        tokens = np.random.default_rng(SEED).integers(5, VOCABULARY, (len(positions), LENGTH))
        places = np.broadcast_to(np.arange(LENGTH) % 20, tokens.shape).copy()
        return _Batch(tokens, places > 2, places)

    def heldout(self, limit: int | None = None) -> _Batch:
        return self.batch(range(1), b"")


def small(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values with known sizes made small, and lists by layer cut to a layer of each kind."""
    layers = next((values[key] for key in _LAYERS if isinstance(values.get(key), int)), 0)
    kinds = next((v for k, v in values.items() if k.endswith("layer_types") and v and len(v) == layers), None)
    kept = sorted({kind: at for at, kind in reversed(list(enumerate(kinds)))}.values()) if kinds else []
    kept = kept if len(kept) > 1 else [0, 1]
    made: dict[str, Any] = {}
    for key, value in values.items():
        number = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, dict) and key.endswith("_config") and key != "per_layer_config":
            made[key] = small(value)
        elif key.startswith("vocab_size") and number:
            made[key] = VOCABULARY
        elif key.endswith("token_id") and number:
            made[key] = min(value, 4)
        elif key in _LAYERS and number:
            made[key] = len(kept)
        elif isinstance(value, list) and layers > 2 and len(value) == layers:
            made[key] = [value[at] for at in kept]
        elif key in _SMALL and number:
            made[key] = min(value, _SMALL[key])
        else:
            made[key] = value
    return made


def write(kind: str, folder: Path) -> None:
    """Write a model with random weights. Raises anything where it cannot be made tiny."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**small(AutoConfig.for_model(kind).to_dict()), **_KINDS.get(kind, {})}
    for key in ("model_type", "transformers_version", "architectures"):
        values.pop(key, None)
    config = AutoConfig.for_model(kind, **values)
    make = cast(Any, AutoModelForCausalLM).from_config
    with torch.device("meta"):
        count = sum(p.numel() for p in make(config).parameters())
    if count > MOST:
        raise ValueError(f"it still has {count:,} parameters")
    torch.manual_seed(SEED)
    model = make(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # what begins at zero would hide what it does
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)


def check(kind: str, work: Path) -> Found:
    """Take one kind through the product."""
    from psyche_node.training import Session, TrainingTerms
    from psyche_node.training.errors import TrainingError

    try:
        write(kind, work / "model")
    except Exception as error:
        return Found(kind, "left out", _words(error))
    (work / "model" / "tokenizer_config.json").write_text("{}")
    terms = TrainingTerms(total_rounds=9, peak_lr_bits=0x3B000000, final_lr_bits=0, topk=64)
    try:
        session = Session(work / "model", _Documents(), terms, "cpu", 2, 1)
    except TrainingError as error:
        return Found(kind, "refused", _words(error))
    except Exception as error:
        return Found(kind, "WRONG", _words(error))
    try:
        wrong = [*_logits(session, work / "model"), *_training(session, work / "saved")]
    except Exception as error:
        wrong = [_words(error)]
    return Found(kind, "WRONG" if wrong else "trains", "; ".join(wrong))


def _logits(session: Any, folder: Path) -> list[str]:
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(SEED)
    documents = [torch.randint(5, VOCABULARY, (1, length), generator=generator) for length in DOCUMENTS]
    tokens = torch.cat(documents, 1)
    places = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    reference = cast(Any, AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        packed = session._loss.logits(tokens, places)
        alone = [reference(input_ids=one, use_cache=False).logits for one in documents]
        later = tokens.clone()
        later[:, -9:] = (later[:, -9:] + 7) % VOCABULARY
        ahead = (session._loss.logits(later, places) - packed)[:, :-9].abs().max()
        ours = float(session._loss(tokens, places > 0, places))
        theirs = sum(
            float(functional.cross_entropy(logits[0, :-1].float(), one[0, 1:], reduction="sum"))
            for logits, one in zip(alone, documents, strict=True)
        )
    scale = float(packed.abs().max())
    apart = float((packed - torch.cat(alone, 1)).abs().max())
    found = {
        "documents of a pack have other logits than alone": apart / scale,
        "a token moves the logits before it": float(ahead) / scale,
        "the loss is another one": abs(ours - theirs) / theirs,
    }
    return [f"{what} (by {by:.1e})" for what, by in found.items() if not by <= _TOLERANCE]


def _training(session: Any, saved: Path) -> list[str]:
    from transformers import AutoModelForCausalLM

    from psyche_node.training import load_model

    before = session.model_root()
    for number in range(2):
        session.apply(number, [session.train(number, [0, 1, 2], run=bytes(32), member=0).blob], True)
    wrong = ["it does not learn"] if session.model_root() == before else []
    session.save(saved)
    held = session.model.state_dict()
    loaded = {
        "here": load_model(saved, torch.device("cpu"))[0],
        "by transformers": cast(Any, AutoModelForCausalLM).from_pretrained(saved, dtype=torch.float32),
    }
    for where, model in loaded.items():
        other = model.state_dict()
        if held.keys() != other.keys() or not all(torch.equal(held[name], other[name]) for name in held):
            wrong.append(f"its checkpoint is another model, loaded {where}")
    return wrong


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _alone(kind: str, answer: Any) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    import transformers

    cast(Any, transformers.logging).set_verbosity_error()
    cast(Any, transformers.logging).disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        answer.send(check(kind, Path(work)))


def run(kind: str) -> Found:
    """Check one kind in a process of its own, which may crash or take too long."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(kind, there))
    process.start()
    there.close()
    try:
        found: Found = here.recv() if here.poll(SECONDS) else Found(kind, "left out", f"it takes more than {SECONDS} s")
    except EOFError:
        found = Found(kind, "WRONG", "the process crashed")
    process.kill()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="all by default")
    parser.add_argument("--out", type=Path, help="file for what was found, as JSON")
    args = parser.parse_args()
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KINDS

    found = []
    for kind in args.kinds or sorted(KINDS):
        found.append(one := run(kind))
        print(f"{one.outcome:8} {one.kind:24} {one.why[:150]}", flush=True)
    counts = Counter(one.outcome for one in found)
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    if args.out is not None:
        machine = f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}"
        record = {"machine": machine, "seed": SEED, "kinds": [asdict(one) for one in found]}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(counts["WRONG"]))


if __name__ == "__main__":
    main()
