"""A checkpoint: a Hugging Face model folder that loads without this package, and says where it came from.

Weights are gathered and written file by file, so that of a sharded model no more than one file is in memory at once.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from psyche_node.training.model import copy_advice, copy_tokenizer
from psyche_node.training.weight_names import Saved, saved_by
from psyche_node.training.world import ONE_PROCESS, World

FILE_BYTES = 5_000_000_000
"""Most bytes of one file of weights, unless a single tensor has more."""
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


def save_checkpoint(
    model: Any, source: Path, folder: Path, provenance: Mapping[str, str], world: World = ONE_PROCESS
) -> None:
    """Write ``folder`` anew: weights as safetensors, config, generation config, tokenizer, chat template, README.

    ``source`` is the folder that the model came from; tokenizer and advice on generation stay what they are there.

    A reader sees the old folder or the new one, never half of one. All ranks of ``world`` take part, and rank 0 writes;
    if the disk does not take it, raises OSError there and RankFailed on the others, when all have done their part.
    """
    writer = _Writer(folder) if world.rank == 0 else None
    try:
        tensors = _tensors(model)
        described = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()
        }
        files = split_torch_state_dict_into_shards(
            described, filename_pattern="model{suffix}.safetensors", max_shard_size=FILE_BYTES
        )
        saved = saved_by(model, described) if writer is not None else None
        file_of: dict[str, str] = {}
        for file, names in files.filename_to_tensors.items():
            whole = {name: found for name in names if (found := world.whole(tensors[name])) is not None}
            if writer is not None and saved is not None:
                writer.add(partial(_write_tensors, file, whole, saved, file_of))
        if writer is not None:
            if files.is_sharded:
                writer.add(partial(_write_index, {"metadata": files.metadata, "weight_map": file_of}))
            writer.add(partial(_write_rest, model, source, provenance))
        world.together(writer.finish if writer is not None else lambda: None)
    finally:
        if writer is not None:
            writer.close()


class _Writer:
    """A folder in the making. After a failure nothing more is written, and ``finish`` raises it: ranks that gather for
    this one must not wait for it in vain."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._failure: Exception | None = None
        self._temporary: Path | None = None

    def add(self, write: Callable[[Path], None]) -> None:
        if self._failure is None:
            try:
                write(self._place())
            except Exception as error:
                self._failure = error

    def finish(self) -> None:
        """Put the folder in its place. Raises what failed."""
        if self._failure is not None:
            raise self._failure
        _replace(self._place(), self._folder)

    def close(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _place(self) -> Path:
        if self._temporary is None:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = Path(tempfile.mkdtemp(prefix=f".{self._folder.name}-", dir=self._folder.parent))
            os.chmod(self._temporary, 0o755)
        return self._temporary


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """What a checkpoint holds, tied parameters once."""
    kept = set(model.state_dict(keep_vars=True))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def _write_tensors(
    file: str, tensors: dict[str, torch.Tensor], saved: Saved, file_of: dict[str, str], place: Path
) -> None:
    """Write ``tensors``, which are used up, as ``saved`` has them, and note in ``file_of`` what is in ``file``."""
    written: dict[str, torch.Tensor] = {}
    for name in list(tensors):
        parts = saved(name, tensors.pop(name))
        # Parts of one tensor share its memory, which safetensors does not write.
        alone = len(parts) == 1
        written |= {part: (value if alone else value.clone()).contiguous() for part, value in parts.items()}
    save_file(written, place / file, metadata={"format": "pt"})
    file_of |= dict.fromkeys(written, file)


def _write_index(index: Mapping[str, Any], place: Path) -> None:
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (place / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_rest(model: Any, source: Path, provenance: Mapping[str, str], place: Path) -> None:
    kind = type(model).__name__
    model.config.architectures = [kind]
    model.config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    model.config.save_pretrained(place)
    if not copy_advice(source, place):
        if not model.generation_config.do_sample:  # nothing is added to what the config says about sampling
            model.generation_config.do_sample = False
        model.generation_config.save_pretrained(place)
    copy_tokenizer(source, place)
    rows = "\n".join(f"| {_cell(name)} | `{_cell(value)}` |" for name, value in provenance.items())
    (place / "README.md").write_text(_README.format(title=f"{kind}, post-trained", rows=rows), encoding="utf-8")


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
