"""Whether data was rendered with the chat template of a model's folder, which whoever talks to the model uses.

A manifest has one digest over tokenizer and template. Which template it was is told by the file that lies beside it, or
by trying the shipped ones; either is proven by the digest.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from psyche_node.data.errors import DataError
from psyche_node.data.manifest import Manifest
from psyche_node.data.prepare import tokenizer_digest
from psyche_node.data.rendering import SHIPPED, find_template, own_source
from psyche_node.data.template import ChatTemplate
from psyche_node.folder_files import TEMPLATE


class Rendering(NamedTuple):
    """The template that data was rendered with: ``template`` is a shipped one's name or a file, None the model
    folder's own. ``warning`` says so if it is neither that nor what was chosen."""

    template: str | None
    warning: str | None


def rendering_of(data: Path, manifest: Manifest, model: Path, chosen: str | None = None) -> Rendering | None:
    """Return what the prepared folder ``data`` was rendered with, for the tokenizer of ``model``.

    ``chosen`` is a template to be used instead of the model folder's own. None: the data was prepared with another
    tokenizer, or with a template that is neither this, nor shipped, nor beside the manifest.

    Raises:
        DataError: the model folder has no tokenizer, or ``chosen`` cannot be used.
    """
    if not (model / "tokenizer.json").is_file():
        raise DataError(f"{model} has no tokenizer.json. Name a folder with a tokenizer")
    # The digest of the tokenizer's file says all about it: loading it, which takes seconds, would say no more.
    own = own_source(model) if chosen is None else ChatTemplate(model, chosen).source
    if own is not None and tokenizer_digest(model, own) == manifest.tokenizer:
        return Rendering(chosen, None)
    beside = data / TEMPLATE
    for name in (*SHIPPED, *([str(beside)] if beside.is_file() else [])):
        if tokenizer_digest(model, find_template(name).source) == manifest.tokenizer:
            return Rendering(name, _warning(data, name, model, own))
    return None


def template_warning(data: Path, manifest: Manifest, model: Path) -> str | None:
    """What an owner should know before a run of ``data`` and ``model``; None if they agree. Raises DataError."""
    rendering = rendering_of(data, manifest, model)
    return other_tokenizer(data, model) if rendering is None else rendering.warning


def other_tokenizer(data: Path, model: Path) -> str:
    """What there is to say where `rendering_of` knows nothing."""
    return (
        f"{data} was prepared with another tokenizer than that of {model}, or with a chat template that is not "
        f"beside its manifest. Prepare the data with this model's folder: psyche-node data prepare --tokenizer {model}"
    )


def _warning(data: Path, name: str, model: Path, own: str | None) -> str:
    shipped = name in SHIPPED
    which = name if shipped else f"{name} ({_digest(find_template(name).source)})"
    other = "none" if own is None else f"another one, {_known(own)}"
    copy = f"psyche-node data template {name} >" if shipped else f"cp {name}"
    return (
        f"{data} was rendered with the chat template {which}, and {model} has {other}. Whoever talks to the model uses "
        f"the model's. If it should be the data's: {copy} {model / TEMPLATE}"
    )


def _known(source: str) -> str:
    """A shipped template's name, or the beginning of its digest."""
    return next((name for name in SHIPPED if find_template(name).source == source), f"its own ({_digest(source)})")


def _digest(source: str) -> str:
    return f"SHA-256 {hashlib.sha256(source.encode()).hexdigest()[:12]}"
