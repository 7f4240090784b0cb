"""A checkpoint: a Hugging Face model folder that loads without this package, and says where it came from."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psyche_node.training.model import copy_tokenizer

_README = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [psyche-node, decentralized-training]
---
# {title}

Post-trained by several nodes together with psyche-node, in a run that a program on Solana coordinated. Every node ended
with these same bytes.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```

## Provenance

| what | value |
|---|---|
{rows}
"""


def save_checkpoint(model: Any, tokenizer: Path, folder: Path, provenance: Mapping[str, str]) -> None:
    """Write ``folder`` anew: weights as safetensors, config, generation config, tokenizer, chat template, README.

    A reader sees the old folder or the new one, never half of one. Raises OSError if the disk does not take it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        os.chmod(temporary, 0o755)
        if not model.generation_config.do_sample:  # what a folder advises about sampling stays, nothing else is added
            model.generation_config.do_sample = False
        model.save_pretrained(temporary)
        copy_tokenizer(tokenizer, temporary)
        rows = "\n".join(f"| {_cell(name)} | `{_cell(value)}` |" for name, value in provenance.items())
        title = f"{type(model).__name__}, post-trained"
        (temporary / "README.md").write_text(_README.format(title=title, rows=rows), encoding="utf-8")
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(new: Path, folder: Path) -> None:
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        os.replace(folder, old / "folder")
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(new, folder)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("`", "'").replace("\n", " ")
