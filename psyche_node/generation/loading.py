"""Loading a Hugging Face folder to talk to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from psyche_node.generation.errors import GenerationError
from psyche_node.generation.folder import check_folder
from psyche_node.generation.reasoning import MARKS as REASONING_MARKS
from psyche_node.generation.toolcalls import MARKS as TOOL_MARKS
from psyche_node.training.device import choose_device
from psyche_node.training.errors import TrainingError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class Loaded:
    """A model and what belongs to it.

    Attributes:
        generation: the folder's own generation config; the model keeps a neutral one.
        hidden: special tokens that are no part of an answer's text.
        where: the folder, for messages.
        reasons: a line for each choice.
    """

    model: Any
    tokenizer: Any
    generation: Any
    device: torch.device
    hidden: frozenset[int]
    where: str
    reasons: list[str] = field(default_factory=list)


def load(folder: Path, device: str, dtype: str) -> Loaded:
    """Load a causal language model and its tokenizer. Raises as ``Engine.load``."""
    check_folder(folder)
    try:
        place = choose_device(device, sequence_length=1, micro_batch=1, threads=0).torch
    except TrainingError as error:
        raise GenerationError(str(error)) from error
    kind, reason = _dtype(dtype, place)
    untyped: Any = transformers_logging
    untyped.disable_progress_bar()
    auto_model: Any = AutoModelForCausalLM
    tokenizer = _tokenizer(folder)
    try:
        model, info = auto_model.from_pretrained(folder, dtype=kind, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise GenerationError(
            f"the model of {folder} cannot be loaded: {_first_line(error)}. Name a folder with config.json and "
            "safetensors of a causal language model"
        ) from error
    if lacking := sorted(map(str, info["missing_keys"])):
        raise GenerationError(
            f"{folder} lacks {len(lacking)} tensors of its own config, the first being {lacking[0]}. Fetch all of it"
        )
    if len(tokenizer) > (rows := model.get_input_embeddings().weight.shape[0]):
        raise GenerationError(
            f"{folder} has {rows} token embeddings, and its tokenizer {len(tokenizer)} tokens. "
            "Use the model's own tokenizer"
        )
    generation = model.generation_config
    model.generation_config = type(generation)()
    return Loaded(
        model=model.to(place).eval(),
        tokenizer=tokenizer,
        generation=generation,
        device=place,
        hidden=_hidden(tokenizer),
        where=str(folder),
        reasons=[f"device {place}: {'as asked' if device != 'auto' else 'what PyTorch sees here'}", reason],
    )


def around(model: Any, folder: Path, device: torch.device) -> Loaded:
    """What an engine needs of a model that is loaded already, from ``folder``. The model is left as it is: put it into
    ``eval`` and give it a neutral generation config while the engine runs. Raises GenerationError for the tokenizer."""
    tokenizer = _tokenizer(folder)
    return Loaded(model, tokenizer, model.generation_config, device, _hidden(tokenizer), str(folder))


def _tokenizer(folder: Path) -> Any:
    auto_tokenizer: Any = AutoTokenizer
    try:
        return auto_tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception, transformers whatever a folder's class raises
        raise GenerationError(
            f"the tokenizer of {folder} cannot be loaded: {_first_line(error)}. Copy the tokenizer's files into it "
            "(tokenizer.json, tokenizer_config.json)"
        ) from error


def _dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16, "bfloat16: a GPU is fastest in it, and it halves the memory of weights"
        return torch.float32, "float32: a CPU gains nothing from bfloat16"
    if name not in DTYPES:
        raise GenerationError(f"dtype {name!r} is unknown. Use auto, {', '.join(DTYPES)}")
    return DTYPES[name], f"{name}: as asked"


def _hidden(tokenizer: Any) -> frozenset[int]:
    """Special tokens, but for the marks of reasoning and tool calls: some tokenizers call those special, too."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = {tokenizer.convert_tokens_to_ids(mark) for mark in (*REASONING_MARKS, *TOOL_MARKS)}
    return frozenset((special | set(tokenizer.all_special_ids)) - marks)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
