"""`psyche-node`: the daemon of one member."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from coordinator.pipes import end_with_reader
from psyche_node import log as logs
from psyche_node.commands import recipe
from psyche_node.commands.chat import chat
from psyche_node.commands.data import app as data_commands
from psyche_node.commands.ending import failures
from psyche_node.commands.eval import evaluate
from psyche_node.commands.interrupts import Interrupts
from psyche_node.commands.plan import plan
from psyche_node.commands.serve import serve
from psyche_node.commands.terms import terms
from psyche_node.exits import NOTHING_TO_DO, SAID, Exit, exit_for, in_words

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Take part in a run: train, exchange, apply. And what belongs to it: plans, data, models.",
)
keys = typer.Typer(no_args_is_help=True, help="The node's identity in the network.")
log = logging.getLogger(__name__)


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Option(help="TOML file with these settings (p2p_port for --p2p-port); flags win.")
    ] = None,
    run_name: Annotated[str | None, typer.Option("--run", help="The run's name, or its account's address.")] = None,
    program: Annotated[
        str | None, typer.Option(help="Address of the coordinator program, where --run is a name.")
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Address of the owner's wallet, where --run is a name.")] = None,
    rpc: Annotated[list[str] | None, typer.Option(help="Solana RPC endpoint; repeat for fail-over.")] = None,
    commitment: Annotated[
        str | None, typer.Option(help="Level to read the chain at: processed, confirmed or finalized.")
    ] = None,
    priority_fee: Annotated[str | None, typer.Option(help="Micro-lamports per compute unit, or auto.")] = None,
    priority_fee_cap: Annotated[
        int | None, typer.Option(help="Micro-lamports that --priority-fee auto never goes above.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Keys, updates, logs and checkpoints of this node.")] = None,
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder of the model the run starts from.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the run's prepared data.")] = None,
    wallet: Annotated[Path | None, typer.Option(help="Solana keypair file. Default: FOLDER/wallet.json.")] = None,
    bootstrap: Annotated[
        list[str] | None, typer.Option(help="/ip4/IP/tcp/PORT/p2p/ID of a node in the network; repeat.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="IP address to listen on: 127.0.0.1 by default, 0.0.0.0 for the world.")
    ] = None,
    p2p_port: Annotated[int | None, typer.Option(help="TCP port of libp2p; 0 picks one.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="TCP port that updates are fetched from; 0 picks one.")] = None,
    mdns: Annotated[bool | None, typer.Option(help="Find members on the local network.")] = None,
    metrics: Annotated[str | None, typer.Option(help="IP:port to serve Prometheus metrics on; off by default.")] = None,
    announce_p2p: Annotated[str | None, typer.Option(help="IP:PORT that is forwarded to the libp2p port.")] = None,
    bulk_port: Annotated[int | None, typer.Option(help="TCP port for updates in bulk; 0 picks one.")] = None,
    announce_bulk: Annotated[str | None, typer.Option(help="IP:PORT that is forwarded to the bulk port.")] = None,
    announce_grpc: Annotated[str | None, typer.Option(help="IP:PORT that is forwarded to the gRPC port.")] = None,
    reachable: Annotated[str | None, typer.Option(help="Whether others can connect to it: auto, yes or no.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:1.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of this host to train on, one process each.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Training processes on the CPU, as if they were GPUs.")] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="Training processes that divide each matrix; 1: none do.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a training process; 0: PyTorch's choice.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences per forward pass; 0 chooses.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of the weights: auto (the run's), fp32 or bf16.")] = None,
    activation_checkpointing: Annotated[
        str | None, typer.Option(help="Compute activations again going backward: auto, on or off.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="Implementation: auto, sdpa, eager, flex or flash.")] = None,
    compile: Annotated[bool | None, typer.Option(help="Compile the decoder's layers with torch.compile.")] = None,
    share: Annotated[
        int | None, typer.Option(help="Share of the batch, compared with the others'; 0: the measured speed.")
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Rounds between held-out evaluations; 0: at the end.")
    ] = None,
    tasks: Annotated[
        list[Path] | None, typer.Option("--tasks", help="Task file to evaluate while the node waits; repeat.")
    ] = None,
    check_every: Annotated[int | None, typer.Option(help="Rounds between weight digests; 0: at the end.")] = None,
    update_timeout: Annotated[
        float | None, typer.Option(help="Seconds to look for an update that counts before giving up.")
    ] = None,
    fault: Annotated[list[str] | None, typer.Option(help="Misbehave on purpose (tests).", hidden=True)] = None,
    name: Annotated[str, typer.Option(help="Name of this node in its log.")] = "node",
) -> None:
    """Join a run and train until it is finished. SIGTERM or Ctrl-C ends the node and its processes.

    It needs --run, --rpc, --folder, --model and --data, as flags or in the file of --config. What the others are if
    they are left out: docs/reference/settings.md.

    Several hosts: started by torchrun on each, rank 0 is the node, and the others train along with it.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        from psyche_node.trainer import main as train_along

        raise typer.Exit(train_along([]))
    logs.configure(name)
    overrides: dict[str, object] = {
        "run": run_name,
        "program": program,
        "owner": owner,
        "rpc": tuple(rpc or ()),
        "commitment": commitment,
        "priority_fee": int(priority_fee) if priority_fee and priority_fee.isdecimal() else priority_fee,
        "priority_fee_cap": priority_fee_cap,
        "folder": folder,
        "model": model,
        "data": data,
        "wallet": wallet,
        "bootstrap": tuple(bootstrap or ()),
        "listen": listen,
        "p2p_port": p2p_port,
        "grpc_port": grpc_port,
        "bulk_port": bulk_port,
        "mdns": mdns,
        "metrics": metrics,
        "announce_p2p": announce_p2p,
        "announce_grpc": announce_grpc,
        "announce_bulk": announce_bulk,
        "reachable": reachable,
        "device": device,
        "gpus": gpus,
        "ranks": ranks,
        "tensor_parallel": tensor_parallel,
        "threads": threads,
        "micro_batch": micro_batch,
        "precision": precision,
        "activation_checkpointing": activation_checkpointing,
        "attention": attention,
        "compile": compile,
        "share": share,
        "evaluate_every": evaluate_every,
        "tasks": tuple(tasks or ()),
        "check_every": check_every,
        "update_timeout": update_timeout,
        "faults": tuple(fault or ()),
    }
    interrupts = Interrupts()
    try:
        with interrupts.heard():
            code = _run(config, overrides, interrupts)
    except KeyboardInterrupt:  # before there was a node
        log.info("stopped by a signal")
        code = Exit.INTERRUPTED
    raise typer.Exit(code)


@keys.command()
def show(
    folder: Annotated[Path, typer.Option(help="The node's folder; made if it is missing.")],
) -> None:
    """Print the id of the node key, which is made if there is none.

    Others need it before this node runs, to name it as /ip4/IP/tcp/PORT/p2p/ID in their --bootstrap.
    """
    from psyche_node.identity import IdentityError, load_or_create_node_key

    logs.configure("keys")
    with failures(IdentityError):
        path = folder / "node.key"
        new = not path.exists()
        folder.mkdir(parents=True, exist_ok=True)
        key = load_or_create_node_key(path)
    if new:
        typer.secho(f"made a new node key in {path}, for there was none", dim=True, err=True)
    typer.echo(key.node_id)


@keys.command()
def rotate(
    folder: Annotated[Path, typer.Option(help="The node's folder.")],
) -> None:
    """Make a new node key. The node takes it on chain when it is started next; the old key is refused from then on."""
    from psyche_node.identity import IdentityError, rotate_node_key

    logs.configure("keys")
    path = folder / "node.key"
    if not folder.is_dir():
        typer.secho(f"{folder} is no folder: name the one that the node runs with", fg="red", err=True)
        raise typer.Exit(Exit.CONFIG)
    with failures(IdentityError):
        old, new = rotate_node_key(path)
    if old is not None:
        typer.echo(f"old node key  {old.node_id}  (kept in {path}.old; remove it when the node runs)")
    typer.echo(f"new node key  {new.node_id}  ({path})")
    typer.echo(
        "Restart the node: it joins again with the new key, and keeps its slot, share and credit. A node that was"
    )
    typer.echo("stopped cannot come back once the run has trained, in this version: do it before the first round.")


def _run(config: Path | None, overrides: dict[str, object], interrupts: Interrupts) -> Exit:
    """Run the node until SIGTERM or SIGINT; return the exit code."""
    # Imported late: `psyche-node --help` and a wrong flag should not wait for the chain client and the codec.
    from psyche_node.evaluation.errors import TaskError
    from psyche_node.evaluation.opening import open_between
    from psyche_node.node.config import ConfigError, load_config

    try:
        settings = load_config(config, overrides)
        open_between(settings.tasks)  # which the training process would find out after minutes of loading
    except (ConfigError, TaskError) as error:
        typer.secho(str(error), fg="red", err=True)
        return _last_line(exit_for(error))
    from psyche_node.node.daemon import Node
    from psyche_node.node.folder import held

    async def live() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        with interrupts.call(lambda: loop.call_soon_threadsafe(task.cancel)), held(settings.folder):
            await Node(settings).run()

    try:
        asyncio.run(live())
    except asyncio.CancelledError:
        log.info("stopped by a signal")
        return Exit.INTERRUPTED
    except Exception as error:
        if interrupts.asked:
            # Its processes may have got the signal, too, and have been quicker.
            log.info("stopped by a signal; on the way: %s", in_words(error))
            return Exit.INTERRUPTED
        code = exit_for(error)
        log.log(_level(code), "%s", in_words(error), exc_info=error if code is Exit.UNEXPECTED else None)
        return _last_line(code)
    return Exit.OK


def _last_line(code: Exit) -> Exit:
    """Log what the code is called and, where the error's own words have not said it, what to do next."""
    advice = "" if code in SAID else f": {code.resolve}"
    log.log(_level(code), "exit code %d, %s%s", code, code.name, advice)
    return code


def _level(code: Exit) -> int:
    return logging.INFO if code in NOTHING_TO_DO else logging.ERROR


# Those that take part in a run come first in --help: `run`, above, and these.
app.command()(plan)
app.command()(terms)
app.command("eval")(evaluate)
app.command()(chat)
app.command()(serve)
app.add_typer(keys, name="keys")
app.add_typer(data_commands, name="data")
app.add_typer(recipe.app, name="recipe")


def main() -> None:
    end_with_reader(app)


if __name__ == "__main__":
    main()
