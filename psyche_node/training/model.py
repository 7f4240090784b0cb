"""Models: from a config with seeded weights, or from a Hugging Face folder; always fp32, and without dropout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from psyche_node.folder_files import CONFIG, MODEL_CONFIG, TEMPLATE, TOKENIZER, config_file
from psyche_node.planning.names import mistyped, unknown_kind
from psyche_node.planning.sizes import NOT_A_MODEL, bad_size, config_values
from psyche_node.training.errors import ModelError
from psyche_node.training.weight_files import INDEX, SINGLE
from psyche_node.training.weights import load_into

TOKENIZER_FILES = (
    TOKENIZER,
    CONFIG,
    TEMPLATE,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "merges.txt",
)

_ADVICE = "generation_config.json"

DEMO_MODEL: Mapping[str, Any] = {
    "model_type": "seed_oss",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 352,
    "max_position_embeddings": 2048,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
}
"""About a million parameters with a vocabulary of 2,048: a Seed-OSS as Hermes 4.3's, only small.

A width of 128 learns faster from wider initial weights than the usual 0.02: held-out loss 6.08 after 40 small AdamW
steps, against 6.33.
"""


_SMALL_MODELS_NEED: Mapping[str, Any] = {
    "do_sample": False,
    "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 12,
    "min_new_tokens": 8,
}
"""Generation settings of a model that starts from nothing: it would repeat itself, or end at once. Runs of 12 tokens
come once: that ends loops, and still lets a signature appear in question and answer."""


def make_demo_model(source: Mapping[str, Any] | Path, tokenizer: Path, out: Path, seed: int) -> int:
    """Write a Hugging Face folder with initial weights and the tokenizer; return the number of parameters.

    ``source`` is a config (a mapping, a JSON file, or a folder with a config.json) to be initialised from ``seed``, or
    a folder with weights, which are copied in fp32. ``vocab_size`` and the special tokens follow the tokenizer where
    the config does not say. The same seed gives the same weights on one kind of machine; members compare the
    model root.

    Raises:
        ModelError: no such model type, a bad config, or a vocabulary smaller than the tokenizer's.
    """
    from transformers import AutoModelForCausalLM

    _no_bars()

    weights = (
        source if isinstance(source, Path) and any((source / name).is_file() for name in (SINGLE, INDEX)) else None
    )
    if weights is not None:
        model, _ = load_model(weights, torch.device("cpu"))
        model.generation_config = type(model.generation_config)()  # what the folder has is copied
    else:
        config = _config(source, tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                model = cast(Any, AutoModelForCausalLM).from_config(config, dtype=torch.float32)
            except NOT_A_MODEL as error:
                raise ModelError(f"no causal language model can be built from this config: {error}") from error
        model.generation_config.update(**_SMALL_MODELS_NEED)
    _check_vocabulary(model, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    if weights is not None:
        copy_advice(weights, out)
    copy_tokenizer(tokenizer, out)
    return parameter_count(model)


def load_model(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Any, list[str]]:
    """Return a causal language model in ``dtype`` on ``device``, to be trained, and a line for each changed setting.

    Raises:
        ModelError: there is no such model, or its folder lacks weights.
    """
    model, reasons = build_model(folder, dtype)
    load_into(model, folder, device)
    return model, reasons


def build_model(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, list[str]]:
    """As ``load_model``, but on the meta device: to be divided, if it is to be, and filled by ``load_into``."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    _no_bars()

    file = folder / MODEL_CONFIG
    if not file.is_file():
        raise ModelError(f"{folder} has no config.json. Name a Hugging Face model folder")
    values = _values(file)
    _check_sizes(file, values)
    unknown = unknown_kind(values["model_type"]) if isinstance(values.get("model_type"), str) else None
    if unknown is not None and "auto_map" not in values:
        raise ModelError(f"{file}: {unknown}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "vision_config"):
            raise ModelError(f"{folder} has a part for images, which text does not train. Save its text model alone")
        if getattr(config, "quantization_config", None):
            raise ModelError(
                f"{folder} holds quantised weights (quantization_config in config.json), which cannot be trained. Use "
                "the model in float32, bfloat16 or float16, without that key"
            )
        reasons = [f"{file}: {slip}" for slip in mistyped(values)] + without_dropout(config)
        with torch.device("meta"):
            model = cast(Any, AutoModelForCausalLM).from_config(config, dtype=dtype)
        if model.can_generate() and (folder / _ADVICE).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, *NOT_A_MODEL) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{folder} needs code of its own, which is not run here. Use a model that transformers itself has"
            ) from error
        why = str(error).partition("\nModel type should be one of")[0]  # a list of all that there are
        raise ModelError(f"{folder} cannot be loaded as a causal language model: {why}") from error
    model.train()
    return model, reasons


def without_dropout(config: Any) -> list[str]:
    """Set every dropout of ``config`` to 0; return a line for each that was not."""
    reasons = []
    for name, value in sorted(config.to_dict().items()):
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float) and value != 0.0:
            setattr(config, name, 0.0)
            reasons.append(
                f"{name} 0 (the config says {value:g}): post-training of large models uses none, and its masks would "
                "differ from host to host"
            )
    return reasons


def copy_advice(source: Path, out: Path) -> bool:
    """Copy what a folder advises about generation, if it does; return whether it does.

    As it is: transformers loads some advice that it refuses to write, such as a temperature without do_sample.
    """
    if found := (source / _ADVICE).is_file():
        _copy(source / _ADVICE, out / _ADVICE)
    return found


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer's files and chat template of a folder. Raises ModelError if it has none."""
    present = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if CONFIG not in present:
        raise ModelError(f"{source} has no {CONFIG}. Name a folder with a tokenizer")
    for name in present:
        _copy(source / name, out / name)


def _copy(file: Path, out: Path) -> None:
    if file.resolve() != out.resolve():
        shutil.copyfile(file, out)


def _config(source: Mapping[str, Any] | Path, tokenizer: Path) -> Any:
    from transformers import AutoConfig

    if isinstance(source, Path):
        path = config_file(source)
        values = _values(path)
        _check_sizes(path, values)
    else:
        values = dict(source)
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ModelError(
            "the model config names no model_type. Add one that transformers knows, such as seed_oss or llama"
        )
    values.setdefault("vocab_size", _tokens(tokenizer))
    special = _special_tokens(tokenizer)
    for name, token in special.items():
        values.setdefault(name, token)
    # Seed-OSS's own defaults are 0.1 and 0.1; they are part of the initial model, not of a later correction.
    for name in ("attention_dropout", "residual_dropout"):
        if values["model_type"] == "seed_oss":
            values.setdefault(name, 0.0)
    kind = values.pop("model_type")
    if (unknown := unknown_kind(kind)) is not None:
        raise ModelError(unknown)
    try:
        config = AutoConfig.for_model(kind, **values)
    except NOT_A_MODEL as error:
        raise ModelError(f"the config of a {kind} model is not valid: {error}") from error
    without_dropout(config)
    return config


def _values(file: Path) -> dict[str, Any]:
    try:
        return config_values(file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{error}. Name a JSON file or a folder") from error


def _check_sizes(file: Path, values: Mapping[str, Any]) -> None:
    if (wrong := bad_size(values)) is not None:
        raise ModelError(f"{file}: {wrong}")


def _check_vocabulary(model: Any, tokenizer: Path) -> None:
    has, needs = model.get_input_embeddings().weight.shape[0], _tokens(tokenizer)
    if has < needs:
        raise ModelError(
            f"the model has {has} token embeddings, its tokenizer {needs} tokens. Set vocab_size to at least {needs}, "
            "or use the model's own tokenizer"
        )


def _tokens(tokenizer: Path) -> int:
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(
            f"{tokenizer}/tokenizer.json cannot be read: {error}. Name a folder with a tokenizer"
        ) from error
    return max(loaded.get_vocab(with_added_tokens=True).values()) + 1


def _special_tokens(tokenizer: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    config = json.loads((tokenizer / CONFIG).read_bytes())
    found = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and (token := loaded.token_to_id(text)) is not None:
            found[f"{name}_id"] = token
    return found


def _no_bars() -> None:
    """Keep transformers' progress bars out of the log, which is one JSON object a line."""
    from transformers.utils import logging

    cast(Any, logging).disable_progress_bar()


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
