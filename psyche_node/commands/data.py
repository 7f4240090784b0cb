"""`psyche-node data`: from files of samples to the prepared folder that nodes train on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from psyche_node import log as logs
from psyche_node.exits import exit_for

app = typer.Typer(no_args_is_help=True, help="Prepare, look at and check training data.")


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="JSONL of conversations.")],
    tokenizer: Annotated[Path, typer.Option(help="Hugging Face folder with the tokenizer and its chat template.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    sequence_length: Annotated[int, typer.Option(help="Tokens per packed sequence.")] = 16_384,
    heldout: Annotated[float, typer.Option(help="Fraction of the samples that is kept for evaluation.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Which samples those are.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Tokenize, pack and write a folder that nodes train on."""
    from psyche_node.data.prepare import prepare as write

    with failures():
        manifest = write(source, tokenizer, out, sequence_length, heldout, seed)
        answer(manifest.model_dump(mode="json") | {"manifest": manifest.digest.hex()}, as_json)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Prepared folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Verify every file of a prepared folder."""
    from psyche_node.data.dataset import PackedDataset

    with failures():
        dataset = PackedDataset(folder)
        answer({"manifest": dataset.digest.hex(), "sequences": len(dataset)}, as_json)


@contextmanager
def failures() -> Iterator[None]:
    """End the command with the error's message and exit code."""
    from psyche_node.data.errors import DataError

    logs.configure("data")
    try:
        yield
    except (DataError, OSError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(exit_for(error)) from None


def answer(values: dict[str, Any], as_json: bool) -> None:
    """Print a result, for people or as JSON."""
    if as_json:
        typer.echo(json.dumps(values))
        return
    for key, value in values.items():
        typer.echo(f"{key:<18} {value}")
