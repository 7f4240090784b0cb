"""One simulation from start to report."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from coordinator.client import ChainError
from coordinator.state import Member, MemberStatus, Phase
from psyche_node import units
from psyche_node.exits import Exit, exit_for, in_words
from psyche_node.sim.baseline import BaselineRequest
from psyche_node.sim.collect import collect, ledger_result
from psyche_node.sim.node import SimNode
from psyche_node.sim.out import LOGS, OutFolder
from psyche_node.sim.processes import Managed, ProcessEnded
from psyche_node.sim.progress import MemberProgress, Progress, ProgressDisplay
from psyche_node.sim.report import write_report
from psyche_node.sim.result import Baseline, Outcome, RunResult
from psyche_node.sim.settings import Prepared, SimSettings
from psyche_node.sim.summary import print_summary
from psyche_node.sim.traffic import update_reduction
from psyche_node.sim.world import SimulationFailed, World
from psyche_node.terms import training_terms

BASELINE_TIMEOUT = 3600.0
_LISTED = 3


async def run(settings: SimSettings, started: float) -> Exit:
    """Simulate, write the report, print the summary. Cancel to stop early: what was trained is still reported.

    What fails before there is anything to keep leaves the output folder as it was: the corrected command may name it.
    A failure whose message does not say what was wrong keeps it, for its logs.
    """
    console = Console(highlight=False)
    world = World(settings, started)
    try:
        with _out_folder(world):
            return await _simulate(world, console)
    except asyncio.CancelledError:
        console.print("psyche-sim: stopped; no process is left behind")
        return Exit.INTERRUPTED
    except BrokenPipeError:
        raise  # who reads has gone: nobody is there to be told
    except ProcessEnded as error:
        words = str(error) if world.worth_keeping else error.words
        console.print(f"[red]psyche-sim: {escape(words)}[/red]", soft_wrap=True)
        return _exit_of(error)
    except Exception as error:
        console.print(f"[red]psyche-sim: {escape(in_words(error))}[/red]", soft_wrap=True)
        if world.worth_keeping:
            console.print(f"Logs: {settings.out / LOGS}", soft_wrap=True)
        return exit_for(error)


@contextlib.contextmanager
def _out_folder(world: World) -> Iterator[None]:
    """The output folder is the simulation's; it is given back if that ends with nothing to keep."""
    folder = OutFolder(world.settings.out)
    try:
        yield
    except Exception as error:
        world.worth_keeping = world.worth_keeping or not _explained(error, world)
        raise
    finally:
        if not world.worth_keeping:
            folder.give_back()


def _explained(error: Exception, world: World) -> bool:
    """Whether the message says what was wrong. Why a ledger of the simulation's own fails, only its log can tell."""
    if isinstance(error, ProcessEnded):
        return error.explained
    return exit_for(error) is not Exit.UNEXPECTED and not (isinstance(error, ChainError) and world.ledger is not None)


async def _simulate(world: World, console: Console) -> Exit:
    settings = world.settings
    async with world.up():
        result, code = await _train(world, console)
        html = write_report(result, settings.out)[1]
        _point_latest(settings.out)
        print_summary(result, report=str(html), console=console)
        if settings.hold and result.outcome == "finished" and code is not Exit.INTERRUPTED:
            console.print(
                f"The ledger stays up until Ctrl-C: psyche-admin run show {world.addresses.run} --rpc {world.rpc}",
                soft_wrap=True,  # to be copied
            )
            await asyncio.Event().wait()
    return code


async def _train(world: World, console: Console) -> tuple[RunResult, Exit]:
    """Follow the run to its end, or to Ctrl-C, and return what there is to tell, and how it ended."""
    baseline: Baseline | None = None
    outcome: Outcome = "finished"
    code = Exit.OK
    with ProgressDisplay(console, passed=time.time() - world.started) as display:
        display.log(f"ledger {world.rpc}, run {world.addresses.run}")
        _tell_prepared(world.prepared, display)
        try:
            await world.follow(lambda: display.update(snapshot(world)))
        except asyncio.CancelledError:
            outcome, code = "interrupted", Exit.INTERRUPTED
            _be_able_to_wait_again()
        except SimulationFailed as error:
            outcome, code = "failed", Exit.SIMULATION
            display.log(str(error), "error")
        display.update(snapshot(world, stage="stopping the nodes"))
        ledger = await ledger_result(world)
        if not ledger.transactions:
            display.log("what the run cost is not known: the ledger does not answer", "warning")
        await world.stop_nodes()
        _keep_model(world)
        if world.settings.baseline and not world.prepared.counts.heldout:
            display.log("no comparison with AdamW: nothing is held out to compare them by", "warning")
        elif world.settings.baseline and outcome == "finished":
            display.update(snapshot(world, stage="comparing with AdamW on the same tokens, in one process"))
            try:
                baseline = await _baseline(world)
            except asyncio.CancelledError:
                code = Exit.INTERRUPTED
                _be_able_to_wait_again()
                display.log("stopped before AdamW was through: the report has no comparison", "warning")
            except ProcessEnded as error:
                code = _exit_of(error)
                display.log(f"no comparison with AdamW: {error}", "error")
    result = collect(world, outcome, ledger, baseline)
    if code is Exit.OK and not result.replicas_identical:
        code = Exit.REPLICAS_DIFFER
    return result, code


def _tell_prepared(prepared: Prepared, display: ProgressDisplay) -> None:
    """Say what became of files and samples before anything is trained."""
    counts = prepared.counts
    for note in prepared.notes:
        display.log(note)
    display.log(counts.taken_text())
    if dropped := counts.dropped_text():
        display.log(dropped, "warning" if counts.alarming else "info")
    for line in counts.skipped[:_LISTED]:
        display.log(f"bad: {line}", "warning")
    if (more := len(counts.skipped) - _LISTED) > 0:
        display.log(f"bad: {units.counted(more, 'reason')} more, in the report", "warning")
    for warning in prepared.warnings:
        display.log(warning, "warning")


def _exit_of(error: ProcessEnded) -> Exit:
    """A process of this project says by its exit status what went wrong."""
    return next((code for code in Exit if code == error.code and code is not Exit.OK), Exit.SIMULATION)


def snapshot(world: World, stage: str = "") -> Progress:
    """Return what the display shows, from the chain and the nodes' journals. A ``stage`` given: the rounds are over."""
    settings, prepared, pulse = world.settings, world.prepared, world.record.pulse
    members = {str(member.wallet): member for member in world.record.members}
    trained = [line for node in world.nodes for line in node.all("trained")]
    newest = max((int(line["round"]) for line in trained), default=-1)
    last = [line for line in trained if int(line["round"]) == newest]
    tokens = sum(int(line["tokens"]) for line in trained)
    since = min((line["started"] for line in trained), default=0.0)
    until = max((line["started"] + line["seconds"] for line in trained), default=0.0)
    evaluated = max((line for node in world.nodes for line in node.all("evaluated")), key=_time, default=None)
    sent = [node.last("finished") or node.last("trained") or {} for node in world.nodes]
    return Progress(
        stage=stage or ("training" if trained else "starting the nodes"),
        round=0 if pulse is None else pulse.run.final_rounds if pulse.run.phase is Phase.FINISHED else pulse.run.round,
        rounds=settings.rounds,
        phase="" if pulse is None else "".join(word.capitalize() for word in pulse.run.phase.name.split("_")),
        loss=_weighted(last),
        heldout=None if evaluated is None else evaluated["heldout_loss"],
        heldout_round=0 if evaluated is None else int(evaluated["round"]) + 1,
        entropy=prepared.unigram_entropy,
        tokens_per_second=tokens / (until - since) if until > since else 0.0,
        bytes_sent=sum(int(line.get("bytes_sent", 0)) for line in sent),
        bytes_received=sum(int(line.get("bytes_received", 0)) for line in sent),
        reduction=update_reduction(prepared.parameters, prepared.update_bytes, settings.nodes),
        memory_bytes=world.memory.now,
        members=tuple(_member_progress(node, members.get(node.wallet)) for node in world.nodes),
        ending=bool(stage),
    )


def _time(line: dict[str, Any]) -> float:
    return float(line["time"])


def _weighted(lines: list[dict[str, Any]]) -> float | None:
    tokens = sum(int(line["tokens"]) for line in lines)
    return sum(line["loss"] * line["tokens"] for line in lines) / tokens if tokens else None


def _member_progress(node: SimNode, member: Member | None) -> MemberProgress:
    trained = node.last("trained") or {}
    traffic = node.last("finished") or trained
    return MemberProgress(
        name=node.name,
        status=_status(node, member),
        fault=node.fault,
        included=0 if member is None else member.updates_included,
        rounds=len(node.all("trained")),
        loss=trained.get("loss"),
        bytes_sent=int(traffic.get("bytes_sent", 0)),
        bytes_received=int(traffic.get("bytes_received", 0)),
    )


def _status(node: SimNode, member: Member | None) -> str:
    if node.killed:
        return "killed"
    if node.last("finished") is not None:
        return "finished"
    if not node.process.running:
        return "failed"
    if member is None:
        return "starting" if node.last("started") is None else "joining"
    if member.status is MemberStatus.ACTIVE:
        return str(node.lines[-1]["kind"]).replace("applied", "training").replace("trained", "committed")
    return member.status.name.lower()


async def _baseline(world: World) -> Baseline:
    """Train the same model on the same positions with AdamW. Raises ProcessEnded."""
    settings, prepared = world.settings, world.prepared
    assert world.record.pulse is not None, "the run is finished, so its state was seen"
    request = BaselineRequest(
        model=prepared.model,
        data=prepared.data,
        terms=training_terms(world.record.pulse.run),
        rounds=[world.record.positions[number] for number in sorted(world.record.positions)],
        evaluate_every=settings.evaluate_every or settings.rounds,
        device=settings.device,
        threads=os.cpu_count() or 1,
    )
    file = settings.out / "baseline-request.json"
    file.write_text(request.model_dump_json())
    process = Managed(
        "AdamW baseline", "psyche_node.sim.baseline", [str(file)], settings.out / LOGS / "baseline.log", pipe=True
    )
    try:
        return Baseline.model_validate_json(await process.first_line(BASELINE_TIMEOUT))
    finally:
        await process.stop()


def _keep_model(world: World) -> None:
    """Copy the newest model that an honest node has to OUT/model; the one that the chain agreed on, if there is one."""
    agreed = "" if world.record.pulse is None else world.record.pulse.run.checkpoint_root.hex()
    saved = [line for node in world.nodes if node.fault is None and (line := node.last("checkpoint")) is not None]
    if saved:
        best = max(saved, key=lambda line: (line["model_root"] == agreed, line["round"]))
        shutil.copytree(str(best["folder"]), world.settings.out / "model")


def _point_latest(out: Path) -> None:
    """Make ``latest`` beside the output folder point to it, if that is a place where runs are kept."""
    link = out.parent / "latest"
    if out.parent.name == "runs" and (link.is_symlink() or not link.exists()):
        link.unlink(missing_ok=True)
        link.symlink_to(out.name)


def _be_able_to_wait_again() -> None:
    """Take the cancellation as noticed: what follows is the orderly end."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
