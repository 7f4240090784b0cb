"""`psyche-sim`: a whole network on one machine."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from pydantic import ValidationError

from coordinator.pipes import end_with_reader
from coordinator.run_config import ConfigError
from coordinator.wording import problems
from psyche_node.commands.chat import chat
from psyche_node.commands.ending import failures
from psyche_node.exits import Exit
from psyche_node.faults import Fault
from psyche_node.sim.recipe import DEMO, recipe_for
from psyche_node.sim.settings import Kill, Ranks, SimSettings

app = typer.Typer(
    add_completion=False,
    help="Train a model with a whole decentralized network on this machine: ledger, on-chain program, nodes.",
)
app.command()(chat)


@app.callback(invoke_without_command=True)
def simulate(
    context: typer.Context,
    nodes: Annotated[int, typer.Option(help="Honest nodes.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds of the run.")] = SimSettings.model_fields["rounds"].default,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the data.")] = 0,
    out: Annotated[Path | None, typer.Option(help="New folder for report, model, logs. Default: runs/TIME.")] = None,
    data: Annotated[
        str | None, typer.Option(help="File, folder or URL with samples, as `psyche-node data prepare` takes them.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Chat template: hermes-llama3, chatml, or a file; by default the tokenizer's own."),
    ] = None,
    skip_bad: Annotated[
        str,
        typer.Option(metavar="N|all", help="Pass over so many bad samples at most, counted by reason; then stop."),
    ] = "0",
    model: Annotated[str | None, typer.Option(help="Hugging Face folder, or JSON file with a model config.")] = None,
    adversary: Annotated[list[Fault] | None, typer.Option(help="Add a dishonest node; repeat for more.")] = None,
    kill: Annotated[list[str] | None, typer.Option(help="SIGKILL a node in a round: NODE@ROUND; repeat.")] = None,
    chain_fault: Annotated[
        list[str] | None,
        typer.Option(help="What goes wrong at an RPC endpoint, such as 'lose=0.1, latency_ms=50'; repeat for more."),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="adamw: compare with AdamW on the same tokens.")] = None,
    check_every: Annotated[int, typer.Option(help="Rounds between comparisons of all replicas' SHA-256.")] = 10,
    evaluate_every: Annotated[int, typer.Option(help="Rounds between held-out evaluations.")] = 10,
    tasks: Annotated[
        list[Path] | None,
        typer.Option("--tasks", help="Task file that the first node evaluates while it waits; repeat."),
    ] = None,
    topk: Annotated[int | None, typer.Option(help="Coefficients sent per block of 4,096 weights.")] = None,
    recipe: Annotated[str, typer.Option(help="Recipe to train by, made to fit: psyche-node recipe list.")] = DEMO,
    peak_lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens per packed sequence. Default: the recipe's, or the prepared folder's."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences per round, all nodes together.")] = None,
    overlap: Annotated[
        int | None, typer.Option(help="1: updates travel while the next round is trained. Default 0.")
    ] = None,
    link: Annotated[
        str | None, typer.Option(help="Each node's line: rate, round trip, loss, such as 100mbit/80ms/0.5%.")
    ] = None,
    private: Annotated[int, typer.Option(help="So many of the nodes cannot be reached, as behind NAT.")] = 0,
    ranks: Annotated[
        list[str] | None,
        typer.Option(help="Training processes of a node, such as 2 or 4/2 (two divide each matrix); in turn."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="What the weights are kept in: fp32 or bf16.")] = "fp32",
    rpc: Annotated[str | None, typer.Option(help="Solana RPC endpoint to use instead of a ledger of its own.")] = None,
    wallet: Annotated[Path | None, typer.Option(help="Owner's keypair file, funded; with --rpc.")] = None,
    slot_ms: Annotated[int, typer.Option(help="Length of the ledger's slot in milliseconds.")] = 50,
    port: Annotated[int, typer.Option(help="Port of the ledger's JSON-RPC; 0 picks one.")] = 0,
    hold: Annotated[bool, typer.Option("--hold", help="Keep the ledger up after the run, until Ctrl-C.")] = False,
    same_hosts: Annotated[bool, typer.Option("--same-hosts", help="Start all nodes with equal settings.")] = False,
) -> None:
    """Run a simulation. Without options: four nodes fine-tune a small Seed-OSS on Python's own documentation."""
    if context.invoked_subcommand is not None:
        return
    started = time.time()
    changes = {
        "topk": topk,
        "peak_lr": peak_lr,
        "sequence_length": _prepared_length(data) if sequence_length is None else sequence_length,
        "batch": batch,
        "overlap": overlap,
    }
    try:
        if baseline not in (None, "adamw"):
            raise ValueError(f"--baseline {baseline}: the one baseline is adamw")
        settings = SimSettings(
            nodes=nodes,
            rounds=rounds,
            seed=seed,
            out=out or Path("runs") / time.strftime("%Y%m%d-%H%M%S", time.localtime(started)),
            data=data,
            template=template,
            skip_bad=skip_bad,
            model=model,
            adversaries=tuple(adversary or ()),
            kills=tuple(Kill.parse(text) for text in kill or ()),
            chain_faults=tuple(chain_fault or ()),
            link=link,
            private=private,
            baseline=baseline is not None,
            check_every=check_every,
            evaluate_every=evaluate_every,
            tasks=tuple(tasks or ()),
            rpc=rpc,
            wallet=wallet,
            slot_ms=slot_ms,
            port=port,
            hold=hold,
            device=device,
            precision=cast(Any, precision),
            ranks=tuple(Ranks.parse(text) for text in ranks or ["1"]),
            same_hosts=same_hosts,
            recipe=recipe_for(recipe, rounds, **{key: value for key, value in changes.items() if value is not None}),
        )
    except ValidationError as error:
        for key, words in problems(error):
            typer.secho(f"psyche-sim: {key + ': ' if key else ''}{words}", fg="red", err=True)
        raise typer.Exit(Exit.USAGE) from None
    except (ValueError, ConfigError) as error:
        typer.secho(f"psyche-sim: {error}", fg="red", err=True)
        raise typer.Exit(Exit.USAGE) from None
    _check_tasks(settings.tasks)
    try:
        code = asyncio.run(_simulate(settings, started))
    except KeyboardInterrupt:  # before the handler below was there, and anything was started
        code = Exit.INTERRUPTED
    raise typer.Exit(code)


def _prepared_length(data: str | None) -> int | None:
    """The sequence length of a folder that is prepared already, whose sequences are what they are."""
    if data is None:
        return None
    # Imported late: `--help` does not wait for the data package.
    from psyche_node.data.errors import DataError
    from psyche_node.data.manifest import Manifest
    from psyche_node.folder_files import MANIFEST

    if not (Path(data) / MANIFEST).is_file():
        return None
    with failures(DataError):
        return Manifest.read(Path(data)).sequence_length


def _check_tasks(files: Sequence[Path]) -> None:
    """Say what is wrong with a task file before anything is started, rather than when a node comes to it."""
    if not files:
        return
    # Imported late, as above.
    from psyche_node.evaluation.errors import TaskError
    from psyche_node.evaluation.opening import open_between

    with failures(TaskError):
        open_between(files)


async def _simulate(settings: SimSettings, started: float) -> int:
    from psyche_node.sim.run import run

    loop, task = asyncio.get_running_loop(), asyncio.create_task(run(settings, started))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    code: int = await task
    return code


def main() -> None:
    end_with_reader(app)


if __name__ == "__main__":
    main()
