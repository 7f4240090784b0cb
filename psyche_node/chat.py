"""Asking a trained model: ``psyche-sim chat FOLDER "What does os.path.join do?"``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

REPETITION_PENALTY = 1.1
"""Divides the logits of tokens that are in the text already. Small models repeat themselves without it."""
NO_REPEAT = 12
"""No run of so many tokens comes twice: ends loops, and still lets a signature appear in question and answer."""

SHORTEST = 8
"""Tokens of the shortest answer: a model that has learned little would often end at once."""


class ChatError(Exception):
    """The folder cannot be chatted with."""


def generate(folder: Path, prompt: str, max_tokens: int = 160, system: str | None = None) -> str:
    """Return a model's answer to ``prompt``: greedy, with the folder's chat template.

    Any Hugging Face folder with a causal language model and a chat template will do.

    Raises:
        ChatError: there is no such folder, or it lacks a model, a tokenizer or a chat template.
    """
    if not (folder / "config.json").is_file():
        raise ChatError(f"{folder} has no config.json. Name a model folder, such as the checkpoint of a finished run")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    silence: Any = transformers_logging.disable_progress_bar
    silence()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ChatError(f"{folder} cannot be loaded: {error}. Name a model folder with its tokenizer") from error
    if tokenizer.chat_template is None:
        raise ChatError(f"{folder} has no chat template. Put one into chat_template.jinja")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = encoded["input_ids"]
    model.eval()
    with torch.inference_mode():
        output = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_tokens,
            min_new_tokens=min(SHORTEST, max_tokens),
            do_sample=False,
            repetition_penalty=REPETITION_PENALTY,
            no_repeat_ngram_size=NO_REPEAT,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)).strip()
