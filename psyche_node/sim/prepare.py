"""Data, tokenizer and initial model of a simulation, in a process of its own: `python -m psyche_node.sim.prepare JSON`.

Its memory goes back to the machine before the nodes start. It prints one JSON line: `Prepared`.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from psyche_node import log
from psyche_node.data.errors import DataError
from psyche_node.data.files import write_atomically
from psyche_node.data.question import first_question
from psyche_node.data.rendering import find_template
from psyche_node.data.skipping import read_limit
from psyche_node.data.sources import build_data, cache_folder
from psyche_node.data.template import ChatTemplate
from psyche_node.exits import exit_for, in_words
from psyche_node.folder_files import TEMPLATE, config_file
from psyche_node.folders import terms_of_data, terms_of_model
from psyche_node.planning.context import beyond, context_window
from psyche_node.planning.names import mistyped
from psyche_node.planning.sizes import config_values
from psyche_node.sim.samples import SampleCounts
from psyche_node.sim.settings import Prepared, SimSettings
from psyche_node.training.errors import ModelError
from psyche_node.training.model import DEMO_MODEL, make_demo_model

QUESTION = 80
"""Characters of the question that a summary suggests."""


def prepare(settings: SimSettings, cache: Path) -> Prepared:
    """Make what the run's terms and the nodes' folders need. What depends on content alone is kept in ``cache``.

    Raises DataError or ModelError, which say what to change.
    """
    recipe = settings.recipe
    source = Path(settings.model) if settings.model is not None else None
    own_tokenizer = source if source is not None and (source / "tokenizer.json").is_file() else None
    data = build_data(
        cache,
        source=settings.data,
        tokenizer=own_tokenizer,
        vocabulary=recipe.vocabulary,
        sequence_length=recipe.sequence_length,
        seed=settings.seed,
        template=settings.template,
        skip_bad=read_limit(settings.skip_bad),
    )
    folder = settings.out / "initial-model"
    parameters = make_demo_model(DEMO_MODEL if source is None else source, data.tokenizer, folder, settings.seed)
    if settings.template is not None:
        # Whoever talks to the checkpoint renders with the folder's own template: it is to be that of the data.
        write_atomically(folder / TEMPLATE, find_template(settings.template).source.encode())
    manifest = data.manifest
    unseen = beyond(context_window(config_values(config_file(folder))), manifest.sequence_length)
    return Prepared(
        model=folder,
        data=data.packed,
        **terms_of_model(folder, recipe.topk, settings.precision == "bf16"),
        **terms_of_data(manifest),
        parameters=parameters,
        unigram_entropy=manifest.unigram_entropy,
        counts=SampleCounts(
            **manifest.counts.model_dump(), sequence_length=manifest.sequence_length, skipped=data.skipped
        ),
        question=shortened(first_question(data.packed, ChatTemplate(data.tokenizer, data.rendering.template))),
        notes=data.notes,
        warnings=tuple(filter(None, (data.rendering.warning, *data.warnings, unseen, *_slips(source)))),
        model_source=_short(settings.model or "demo"),
        data_source=_short(settings.data or "Python standard library documentation"),
    )


def _slips(source: Path | None) -> list[str]:
    """What looks mistyped in the config that the model is made from."""
    if source is None:
        return []
    file = config_file(source)
    return [f"{file}: {slip}" for slip in mistyped(config_values(file))]


def shortened(question: str | None) -> str | None:
    """A question that fits on a command line: its first words, on one line, without control characters."""
    words = "".join(one for one in " ".join((question or "").split()) if one.isprintable())
    return textwrap.shorten(words, QUESTION, placeholder="") or words[:QUESTION] or None


def _short(text: str) -> str:
    """The end of ``text`` that fits the 64 bytes which the run's terms have for it."""
    return text.encode()[-64:].decode(errors="ignore")


def main() -> int:
    log.configure("prepare")
    settings = SimSettings.model_validate_json(sys.argv[1])
    try:
        prepared = prepare(settings, cache_folder())
    except (DataError, ModelError, OSError) as error:
        print(in_words(error), file=sys.stderr)
        return exit_for(error)
    print(prepared.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
