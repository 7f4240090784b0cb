"""What the files of a model's folder are called: its config, those of its tokenizer, and its chat template."""

from __future__ import annotations

import re
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


def config_file(source: Path) -> Path:
    """The model's config that a folder holds, or that a path is."""
    return source / MODEL_CONFIG if source.is_dir() else source


def hub_hint(name: Path | str) -> str:
    """A sentence for who names a model of the Hub, OWNER/NAME, where a folder is wanted; empty for any other name."""
    words = str(name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", words) or Path(words).parent.exists():
        return ""
    return f". To get it from the Hub: hf download {words} --local-dir FOLDER"
