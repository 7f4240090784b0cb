"""What the files of a model's folder are called: its config, those of its tokenizer, and its chat template; and which
file makes a folder one of prepared data."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MODEL_CONFIG: Final = "config.json"
"""The kind of the model, and its sizes."""
TOKENIZER: Final = "tokenizer.json"
"""The tokenizer itself."""
CONFIG: Final = "tokenizer_config.json"
"""Names a tokenizer's special tokens, and may hold the chat template."""
TEMPLATE: Final = "chat_template.jinja"
"""The folder's own chat template."""
MANIFEST: Final = "manifest.json"
"""What a prepared data folder holds, and the digest that the run's terms name."""


def config_file(source: Path) -> Path:
    """The model's config that a folder holds, or that a path is."""
    return source / MODEL_CONFIG if source.is_dir() else source
