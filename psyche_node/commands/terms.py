"""`psyche-node terms`: what the terms of a run say of a model and a data folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from psyche_node.commands.ending import failures


def terms(
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder of the model the run starts from.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the prepared data set.")] = None,
    topk: Annotated[int, typer.Option(min=1, max=65536, help="Of the run: components sent per block of 4,096.")] = 512,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Type of the trained weights.")] = "fp32",
    quick: Annotated[
        bool, typer.Option("--quick", help="Read neither weights nor sequences: leaves model_root out.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    early: Annotated[
        bool, typer.Option("--early", help="With --json: print what --quick prints first, as a line of its own.")
    ] = False,
) -> None:
    """Print the part of a run's terms that follows from a model and a data folder, as nodes work it out.

    `psyche-admin run create --model FOLDER --data FOLDER` fills it in by itself. Warns where the data was rendered with
    another chat template than the model folder's own, or prepared with another tokenizer.
    """
    from psyche_node.data.agreement import other_tokenizer, rendering_of
    from psyche_node.data.dataset import PackedDataset
    from psyche_node.data.errors import DataError
    from psyche_node.data.manifest import Manifest
    from psyche_node.folders import BuiltModel, terms_of_data
    from psyche_node.training.errors import TrainingError

    if model is None and data is None:
        raise typer.BadParameter("give --model, --data, or both")
    with failures(DataError, TrainingError):
        # What takes seconds comes first: a mistake is not told after minutes of reading.
        manifest = None if data is None else Manifest.read(data)
        built = None if model is None else BuiltModel.build(model, topk, precision == "bf16", manifest)
        found = {} if built is None else built.terms | {"topk": topk}
        found |= {} if manifest is None else terms_of_data(manifest)
        about = dict[str, str]()
        if not quick:
            if model is not None and manifest is not None and data is not None and (model / "tokenizer.json").is_file():
                rendering = rendering_of(data, manifest, model)
                if rendering is None:
                    about["mismatch"] = other_tokenizer(data, model)
                elif rendering.warning is not None:
                    about["warning"] = rendering.warning
            if as_json and early:
                typer.echo(json.dumps(found | about))
                sys.stdout.flush()
            if data is not None:
                PackedDataset(data)
            if built is not None:
                found = built.root() | found
    if as_json:
        typer.echo(json.dumps(found | about))
        return
    for warning in about.values():
        typer.secho(f"warning: {warning}", fg="yellow", err=True)
    typer.echo("[terms]")
    for key, value in found.items():
        typer.echo(f"{key} = {json.dumps(value)}")
