"""What the files of a model's folder are called: those of its tokenizer, and its chat template."""

from __future__ import annotations

from typing import Final

TOKENIZER: Final = "tokenizer.json"
"""The tokenizer itself."""
CONFIG: Final = "tokenizer_config.json"
"""Names a tokenizer's special tokens, and may hold the chat template."""
TEMPLATE: Final = "chat_template.jinja"
"""The folder's own chat template."""
