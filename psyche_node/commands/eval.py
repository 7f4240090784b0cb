"""`psyche-node eval`: the held-out loss of a model and its figures on tasks; whether results are those on chain."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from psyche_node.commands.ending import failures
from psyche_node.units import counted

if TYPE_CHECKING:
    from coordinator.admin.session import RunChoice
    from psyche_node.evaluation import Measure, Results


class Switch(StrEnum):
    ON = "on"
    OFF = "off"
    BOTH = "both"


def evaluate(
    folder: Annotated[Path | None, typer.Argument(help="Hugging Face model folder, such as a checkpoint.")] = None,
    tasks: Annotated[list[Path] | None, typer.Option("--tasks", help="Task file (TOML or JSON); repeat.")] = None,
    data: Annotated[Path | None, typer.Option(help="Prepared data folder: held-out loss and perplexity.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Examples per task and held-out sequences at most; 0: all.")] = 0,
    thinking: Annotated[
        Switch | None, typer.Option(help="Reasoning of the tasks that use a chat template; default: as they say.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="File to write the results to.")] = None,
    verify: Annotated[
        Path | None, typer.Option(help="Measure nothing: look for the SHA-256 of these results on chain.")
    ] = None,
    run: Annotated[str | None, typer.Option(help="The run's name, or its account's address; with --verify.")] = None,
    program: Annotated[str | None, typer.Option(help="The coordinator program, where --run is a name.")] = None,
    owner: Annotated[str | None, typer.Option(help="Owner's wallet, where several have a run of that name.")] = None,
    rpc: Annotated[list[str] | None, typer.Option(help="Solana RPC endpoint; with --verify; repeat.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model: held-out loss and perplexity, tasks by log-likelihood or by generation."""
    if verify is not None:
        if not run or not rpc:
            raise typer.BadParameter("--verify needs --run RUN and --rpc URL, to know where to look")
        from coordinator.admin.session import RunChoice

        _verify(verify, RunChoice(rpc, run, program, owner), as_json)
        return
    if folder is None or not (tasks or data):
        raise typer.BadParameter("name a model FOLDER, and --tasks, --data or both")
    if out is not None:
        _check_writable(out)
    from psyche_node.data import DataError, PackedDataset
    from psyche_node.generation import GenerationError
    from psyche_node.generation.folder import check_folder

    with failures(DataError, GenerationError):
        check_folder(folder)
        dataset = None if data is None else PackedDataset(data)
    # Imported late: neither `--help` nor what is refused waits for torch.
    from psyche_node.evaluation import EvaluationError, Subject, open_tasks, run_suite
    from psyche_node.evaluation.steps import finish
    from psyche_node.training import TrainingError

    with failures(DataError, EvaluationError, GenerationError, TrainingError):
        opened = open_tasks(tasks or [], limit, None if thinking is None else thinking.value)
        length = 2048 if dataset is None else dataset.sequence_length
        subject = Subject.load(folder, device, dtype, length)
        with Console(stderr=True).status("evaluating") as status:
            steps = run_suite(subject, opened, data=dataset, sequences=limit or None)
            results = finish(steps, lambda done: status.update(f"evaluating: {counted(done, 'step')} done"))
        for one in results.tasks:
            if one.unswitched:
                as_it_is = "with it, because its prompts begin inside" if one.thinking else "without"
                note = f"{one.task}: the chat template of {folder} has no switch for reasoning: measured {as_it_is}"
                typer.secho(note, fg="yellow", err=True)
        try:
            if out is not None:
                out.write_bytes(results.canonical() + b"\n")
        finally:  # what was measured for hours is not lost with the disk that got full meanwhile
            if as_json:
                typer.echo(json.dumps(results.model_dump(mode="json") | {"sha256": results.digest.hex()}))
            else:
                _show(results)


def _check_writable(out: Path) -> None:
    """Refuse a file for the results that cannot be written, before anything is measured for it."""
    if out.is_dir():
        raise typer.BadParameter(f"--out: {out} is a folder; name a file")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"--out: there is no folder {out.parent}")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise typer.BadParameter(f"--out: {out} cannot be written: permission denied; name another file")


def _show(results: Results) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("task", "thinking", "measure", "value", "± s.e.", "samples"):
        table.add_column(name, justify="right" if name in ("value", "± s.e.", "samples") else "left")
    if results.heldout is not None:
        held = results.heldout
        table.add_row("held out", "", "loss, nats", *_figure(held.loss), f"{held.sequences:,}")
        perplexity = "infinite" if held.perplexity is None else f"{held.perplexity:,.3f}"
        error = "" if held.perplexity_stderr is None else f"{held.perplexity_stderr:,.3f}"
        table.add_row("", "", "perplexity", perplexity, error, f"{held.tokens:,} tokens")
    for one in results.tasks:
        switch = {True: "on", False: "off", None: ""}[one.thinking] + (", no switch" if one.unswitched else "")
        samples = f"{one.samples:,}" + (f" x {one.repeats}" if one.repeats > 1 else "")
        for place, (name, measure) in enumerate(one.measures.items()):
            head = (one.task, switch) if place == 0 else ("", "")
            table.add_row(*head, name, *_figure(measure), samples)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"SHA-256 of the results: {results.digest.hex()}", soft_wrap=True)  # to be copied


def _figure(measure: Measure) -> tuple[str, str]:
    return f"{measure.value:.4f}", "" if measure.stderr is None else f"{measure.stderr:.4f}"


def _verify(file: Path, choice: RunChoice, as_json: bool) -> None:
    import asyncio

    from coordinator.client import ChainError
    from coordinator.evaluations import recorded_evaluations
    from coordinator.run_config import ConfigError
    from psyche_node.evaluation import EvaluationError, read_results

    async def look(digest: bytes) -> tuple[list[dict[str, Any]], int]:
        async with choice.open() as client:
            recorded = await recorded_evaluations(client, client.addresses.run)
            members = {member.wallet: member.slot for member in await client.members()}
        found = [
            {"round": one.round, "wallet": str(one.wallet), "member": members.get(one.wallet), "slot": one.slot}
            | {"signature": one.signature}
            for one in recorded
            if one.digest == digest
        ]
        return found, len(recorded)

    with failures(EvaluationError, ChainError, ConfigError):
        results = read_results(file)
        if results.round is None:
            raise EvaluationError(
                f"{file} is of `psyche-node eval`, and only what a node has measured in a run is recorded on chain. "
                "Name a file of evaluations/ in that node's folder"
            )
        found, of = asyncio.run(look(results.digest))
        fitting = [one for one in found if one["round"] == results.round]
        if not fitting:
            raise EvaluationError(
                f"the SHA-256 of {file}, {results.digest.hex()}, is not recorded for round {results.round} of this run "
                f"({of} evaluations are, {len(found)} of them with this SHA-256). The file was changed, or it is "
                "another run's"
            )
    if as_json:
        typer.echo(json.dumps({"sha256": results.digest.hex(), "recorded": fitting}))
        return
    for one in fitting:
        who = "no member" if one["member"] is None else f"member {one['member']}"
        typer.echo(f"recorded for round {one['round']} by {one['wallet']} ({who}), slot {one['slot']}")
