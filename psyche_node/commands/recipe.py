"""`psyche-node recipe`: the shipped training configs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from psyche_node.commands.ending import failures

app = typer.Typer(no_args_is_help=True, help="Shipped training configs, to begin a run from.")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes."""
    from coordinator.recipes import load_recipe, recipe_names

    found = {name: load_recipe(name) for name in recipe_names()}
    if as_json:
        rows = [
            {
                "name": name,
                "title": recipe.about.title,
                "rounds": recipe.limits.total_rounds,
                "batch": recipe.limits.batch,
                "sequence_length": recipe.terms.sequence_length,
            }
            for name, recipe in found.items()
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max(map(len, found))
    for name, recipe in found.items():
        limits, length = recipe.limits, recipe.terms.sequence_length
        typer.echo(f"{name:{width}}  {recipe.about.title}")
        typer.echo(f"{'':{width}}  {limits.total_rounds:,} rounds of {limits.batch:,} x {length:,} tokens")


@app.command()
def show(name: Annotated[str, typer.Argument(help="Name of a recipe.")], as_json: AsJson = False) -> None:
    """Print a recipe: the file with its comments, or with --json every setting, defaults included."""
    from coordinator.recipes import load_recipe, recipe_file
    from coordinator.run_config import ConfigError

    with failures(ConfigError):
        recipe, file = load_recipe(name), recipe_file(name)
    typer.echo(
        json.dumps(recipe.model_dump(mode="json"), indent=2) if as_json else file.read_text(encoding="utf-8"),
        nl=as_json,
    )
