"""`psyche-node plan`: what a model needs before it is trained; nothing is loaded but its config."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from psyche_node.commands.ending import failures
from psyche_node.exits import Exit

_LINE = "Line of a member: 1gbit, or 100mbit:1gbit/80ms (up:down/round trip)."


def plan(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Folder with config.json, JSON file, or known name: Seed-OSS-36B, ...")],
    gpus: Annotated[str, typer.Option(help="GPUs of a member, such as 8xH200.")],
    members: Annotated[int | None, typer.Option(min=1, max=256, help="Members. Default: the recipe's.")] = None,
    link: Annotated[str, typer.Option(help=_LINE)] = "1gbit",
    seq: Annotated[
        int | None, typer.Option(min=1, max=2**24, help="Tokens per packed sequence. Default: the recipe's.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=2**24, help="Sequences per round. Default: the recipe's.")
    ] = None,
    topk: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Components sent per block of 4,096. Default: the recipe's.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, help="Rounds of the run. Default: the recipe's.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Recipe whose terms hold where no flag says otherwise: psyche-node recipe list.")
    ] = "hermes-sft",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs that divide a matrix.")] = 1,
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences per forward pass of a GPU.")] = 1,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Type of the trained weights.")] = "fp32",
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--checkpointing/--no-checkpointing",
            help="Compute activations again instead of keeping them. Default: only to make it fit.",
        ),
    ] = None,
    document: Annotated[int, typer.Option(min=0, help="Mean tokens of a document; 0: as long as a sequence.")] = 0,
    mfu: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="Share of a GPU's peak that a step gets. Default: 0.35.")
    ] = None,
    priority_fee: Annotated[int, typer.Option(min=0, help="Micro-lamports per compute unit.")] = 0,
    slot_ms: Annotated[float, typer.Option(min=1, help="Slot of the chain; 400: mainnet and devnet.")] = 400,
    joining: Annotated[bool, typer.Option("--joining", help="The run exists: its terms stay as they are.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Memory per GPU, bytes and seconds of a round, tokens per second, fees of a run. Needs no GPU and no weights.

    If it does not fit, it says which command line does instead, and ends with code 54.
    """
    from coordinator.recipes import load_recipe
    from coordinator.run_config import ConfigError
    from psyche_node.planning.asked import Asked
    from psyche_node.planning.errors import PlanError
    from psyche_node.planning.gpus import MFU, parse_gpus
    from psyche_node.planning.plan import plan as make
    from psyche_node.planning.report import command, lines
    from psyche_node.planning.shape import config_of
    from psyche_node.relay.spec import BadSpec, LinkSpec

    with failures(ConfigError, PlanError):
        known = load_recipe(recipe)
        limits, terms = known.limits, known.terms
        count, gpu = parse_gpus(gpus)
        try:
            line = LinkSpec.parse(link if "/" in link else f"{link}/50ms")  # the usual round trip, where none is said
        except BadSpec as error:
            raise PlanError(f"--link {link}: {error}") from None
        config = config_of(model)
        from psyche_node.planning.meta import layout_of, shape_from  # torch: flags and files are known to be good

        shape = shape_from(config)
        asked = Asked(
            gpus=count,
            gpu=gpu,
            members=members or limits.init_min_members,
            link=line,
            sequence=seq or terms.sequence_length,
            batch=batch or limits.batch,
            rounds=rounds or limits.total_rounds,
            rounds_per_epoch=limits.rounds_per_epoch,
            topk=topk or terms.topk,
            update_bytes=layout_of(config, shape, topk or terms.topk).update_bytes,
            overlap=bool(limits.overlap),
            lookahead=terms.lookahead,
            z_loss=bool(terms.z_loss),
            tensor_parallel=tensor_parallel,
            micro_batch=micro_batch,
            checkpointing=checkpointing,
            bf16=precision == "bf16",
            document=document,
            mfu=mfu or MFU,
            priority_fee=priority_fee,
            witnesses=limits.witnesses,
            train_slots=limits.max_round_train_time,
            witness_slots=limits.round_witness_time,
            slot_seconds=slot_ms / 1000,
            joining=joining,
        )
        made = make(shape, asked)
    given = _given(context)
    values = made.to_json() | {"recipe": recipe, "command": command(made, given)}
    typer.echo(json.dumps(values, indent=2) if as_json else "\n".join(lines(made, given, recipe)))
    if not made.fits:
        raise typer.Exit(Exit.NO_ROOM)


def _given(context: typer.Context) -> dict[str, str | int | bool]:
    """The flags of the command line, without their dashes, and what they were given."""
    given: dict[str, str | int | bool] = {}
    for each in context.command.params:
        source = context.get_parameter_source(each.name or "")
        if source is not None and source.name != "DEFAULT":
            given[each.opts[0].removeprefix("--")] = context.params[each.name or ""]
    return given
