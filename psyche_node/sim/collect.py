"""From the nodes' journals and the chain to the result of the run. Reads; decides nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from solders.pubkey import Pubkey

from coordinator.client import ChainUnavailable
from coordinator.deploy import program_data_address
from coordinator.state import Member, MemberStatus
from psyche_node.exits import Exit
from psyche_node.sim.node import SimNode
from psyche_node.sim.result import (
    Baseline,
    CurvePoint,
    Event,
    LedgerResult,
    Level,
    MemberRound,
    MemberState,
    NodeExit,
    NodeResult,
    Outcome,
    ReplicaCheck,
    RoundRecord,
    RunResult,
    TaskEvaluation,
    TaskFigure,
    mean_loss,
    replicas,
)
from psyche_node.sim.traffic import dense_allreduce_bytes
from psyche_node.sim.world import World


def collect(world: World, outcome: Outcome, ledger: LedgerResult, baseline: Baseline | None = None) -> RunResult:
    """Return everything known about the run. Works at any moment, also after an interruption."""
    settings, prepared, record = world.settings, world.prepared, world.record
    timeline = list(_timeline(world))
    rounds = len(timeline)
    nodes = [_node(world, node, outcome, timeline) for node in world.nodes]
    checks = _checks(world)
    identical, sha = replicas(nodes, checks)
    losses = _losses(world)
    dense = dense_allreduce_bytes(prepared.parameters, sum(node.slot is not None for node in nodes))
    starts = record.rounds_started
    end = record.finished_at or time.time()
    seconds = end - min(starts.values(), default=end)
    tokens = sum(int(line["tokens"]) for node in world.nodes for line in node.all("trained"))
    committed = sum(len(members) for members in record.committed.values())
    evaluated = sorted((line for node in world.nodes for line in node.all("evaluated")), key=lambda line: line["time"])
    measured = [line for line in evaluated if line["heldout_loss"] is not None]  # None: nothing is held out
    losses_by_round = {int(line["round"]) + 1: line["heldout_loss"] for line in measured}
    curve = [CurvePoint(round=number, loss=loss) for number, loss in sorted(losses_by_round.items())]
    first = min((line["time"] for node in world.nodes for line in node.all("trained")), default=None)
    return RunResult(
        outcome=outcome,
        run_id=world.run_id,
        started_at=datetime.fromtimestamp(world.started, UTC).isoformat(timespec="seconds"),
        wall_seconds=end - world.started,
        first_round_seconds=None if first is None else first - world.started,
        rounds=rounds,
        loss=[mean_loss(losses.get(number, {})) for number in range(rounds)],
        heldout_loss=curve[-1].loss if curve else None,
        heldout_curve=curve,
        unigram_entropy=prepared.unigram_entropy,
        baseline=baseline,
        parameters=prepared.parameters,
        update_bytes=prepared.update_bytes,
        dense_bytes=dense,
        update_bytes_total=committed * prepared.update_bytes,
        dense_bytes_total=sum(
            dense_allreduce_bytes(prepared.parameters, n) * n for n in (len(m) for m in record.active.values())
        ),
        bytes_sent_total=sum(node.bytes_sent for node in nodes),
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        peak_memory_bytes=world.memory.peak,
        replicas_identical=identical,
        weights_sha256=sha,
        checks=checks,
        passes=sum(len(drawn) for drawn in record.positions.values()) / max(prepared.samples, 1),
        evaluations=_evaluations(world),
        data=prepared.counts,
        checkpoint=_checkpoint(world),
        question=prepared.question,
        nodes=nodes,
        ledger=ledger,
        timeline=timeline,
        events=sorted(_events(world), key=lambda event: event.time),
        settings=_flat(settings.model_dump(mode="json") | settings.written()),
    )


async def ledger_result(world: World) -> LedgerResult:
    """Ask the ledger what the run cost; all counts are 0 if it does not answer any more."""
    unknown = LedgerResult(
        rpc=world.rpc,
        program_id=str(world.chain.program_id),
        run_address=str(world.addresses.run),
        transactions=0,
        lamports=0,
        slot_ms=world.settings.slot_ms,
    )
    if world.ledger is not None and not world.ledger.running:
        return unknown
    try:
        return unknown.model_copy(update=await _costs(world))
    except ChainUnavailable:
        return unknown


async def _costs(world: World) -> dict[str, int]:
    chain, addresses = world.chain, world.addresses
    transactions, failed = await chain.transaction_counts()
    if world.settings.rpc is None:
        # On a ledger of its own everything belongs to the run: deployment and funding, too.
        transactions = int(str(await chain.rpc.call("getTransactionCount", [{"commitment": "confirmed"}])))
    accounts = [
        chain.program_id,
        program_data_address(chain.program_id),
        addresses.run,
        addresses.members,
        addresses.rounds,
    ]
    deposits = sum(await asyncio.gather(*(chain.balance(account) for account in accounts)))
    wallets = [world.owner.pubkey(), *(Pubkey.from_string(node.wallet) for node in world.nodes)]
    left = sum(await asyncio.gather(*(chain.balance(wallet) for wallet in wallets)))
    return {
        "transactions": transactions,
        "failed_transactions": failed,
        # The wallet is the user's on a chain of theirs: what others pay into it meanwhile is not the run's.
        "lamports": max(0, world.funded - left - deposits),
        "rent_lamports": deposits,
        "slots": await chain.slot(),
    }


def _members_by_wallet(world: World) -> dict[str, Member]:
    return {str(member.wallet): member for member in world.record.members}


def _node(world: World, node: SimNode, outcome: Outcome, timeline: list[RoundRecord]) -> NodeResult:
    member = _members_by_wallet(world).get(node.wallet)
    finished = node.last("finished") or {}
    newest = finished or node.last("trained") or {}
    trained = node.all("trained")
    # One that was stopped has not told it: then it is what its rounds say.
    waited = sum(one.wait_seconds for record in timeline for one in record.members if one.node == node.name)
    return NodeResult(
        name=node.name,
        slot=None if member is None else member.slot,
        wallet=node.wallet,
        node_id=node.node_id,
        status="outsider" if member is None else _status(member.status),
        exit=_exit(node, outcome),
        exit_code=node.process.process.poll(),
        ended_at=None if node.ended_at is None else node.ended_at - world.started,
        fault=node.fault,
        device=_device(node),
        weights_sha256=finished.get("weights_sha256"),
        fingerprint=finished.get("fingerprint"),
        bytes_sent=int(newest.get("bytes_sent", 0)),
        bytes_received=int(newest.get("bytes_received", 0)),
        train_seconds=finished.get("train_seconds", sum(line["seconds"] for line in trained)),
        wait_seconds=finished.get("wait_seconds", waited),
        updates_included=0 if member is None else member.updates_included,
        credit=0 if member is None else member.credit,
        peak_memory_bytes=world.memory.peaks.get(node.name, 0),
    )


def _status(status: MemberStatus) -> str:
    return status.name.lower()


def _exit(node: SimNode, outcome: Outcome) -> NodeExit:
    if node.killed:
        return "killed"
    code = node.process.process.poll()
    if node.last("finished") is not None or code == Exit.OK:
        return "finished"
    # By SIGTERM before its handler is there, or after.
    stopped = (None, -signal.SIGTERM, Exit.INTERRUPTED)
    if code not in stopped:
        return "failed"
    return "interrupted" if outcome == "interrupted" else "stopped"


def _device(node: SimNode) -> str:
    started = node.last("started") or {}
    return str(started.get("device", ""))


def _losses(world: World) -> dict[int, dict[str, tuple[float, int]]]:
    losses: dict[int, dict[str, tuple[float, int]]] = {}
    for node in world.nodes:
        for line in node.all("trained"):
            losses.setdefault(int(line["round"]), {})[node.name] = (float(line["loss"]), int(line["tokens"]))
    return losses


def _checks(world: World) -> list[ReplicaCheck]:
    found: dict[int, dict[str, str]] = {}
    for node in world.nodes:
        for line in node.all("applied"):
            if line["weights_sha256"]:
                found.setdefault(int(line["round"]) + 1, {})[node.name] = str(line["weights_sha256"])
    return [ReplicaCheck(round=number, weights_sha256=hashes) for number, hashes in sorted(found.items())]


def _evaluations(world: World) -> list[TaskEvaluation]:
    found = []
    for node in world.nodes:
        for line in node.all("tasks"):
            figures = [
                TaskFigure(
                    task=one["task"],
                    thinking=one["thinking"],
                    measure=name,
                    value=measure["value"],
                    stderr=measure["stderr"],
                    samples=one["samples"],
                )
                for one in line["results"]
                for name, measure in one["measures"].items()
            ]
            found.append(
                TaskEvaluation(
                    node=node.name,
                    round=line["round"],
                    sha256=line["sha256"],
                    signature=line["signature"],
                    seconds=line["seconds"],
                    figures=figures,
                )
            )
    return sorted(found, key=lambda one: one.round)


def _timeline(world: World) -> Iterator[RoundRecord]:
    record, members = world.record, _members_by_wallet(world)
    starts = sorted(record.rounds_started.items())
    nodes = {member.slot: node for node in world.nodes if (member := members.get(node.wallet)) is not None}
    lines = {(node.name, int(line["round"])): line for node in world.nodes for line in node.all("trained")}
    worked = {
        node.name: [
            (line["time"] - line["seconds"], line["time"]) for line in [*node.all("applied"), *node.all("evaluated")]
        ]
        for node in world.nodes
    }
    for position, (number, start) in enumerate(starts):
        end = starts[position + 1][1] if position + 1 < len(starts) else (record.finished_at or time.time())
        included = record.included.get(number, frozenset())
        rows = []
        tokens = 0
        for slot in sorted(record.active.get(number, frozenset())):
            if (node := nodes.get(slot)) is None:
                continue
            line = lines.get((node.name, number))
            state = _state(slot, line, record.committed.get(number, frozenset()), included)
            if state == "missed" and record.finished_at is None and position == len(starts) - 1:
                continue  # the run was stopped in this round: nobody has missed it
            following = lines.get((node.name, number + 1))
            row = MemberRound(node=node.name, state=state)
            if line is not None:
                done = line["started"] + line["seconds"]
                until = following["started"] if following else done
                applied = sum(max(0.0, min(until, end) - max(done, start)) for start, end in worked[node.name])
                row = MemberRound(
                    node=node.name,
                    state=state,
                    train_start=line["started"] - world.started,
                    train_end=done - world.started,
                    apply_seconds=applied,
                    wait_seconds=max(0.0, until - done - applied),
                    loss=line["loss"],
                    tokens=line["tokens"],
                    bytes_sent=max(0, following["bytes_sent"] - line["bytes_sent"]) if following else 0,
                    bytes_received=max(0, following["bytes_received"] - line["bytes_received"]) if following else 0,
                )
            tokens += row.tokens if state == "included" else 0
            rows.append(row)
        yield RoundRecord(
            round=number,
            start=start - world.started,
            end=end - world.started,
            void=included is None,
            tokens=tokens,
            members=rows,
        )


def _state(
    slot: int, line: dict[str, Any] | None, committed: frozenset[int], included: frozenset[int] | None
) -> MemberState:
    if slot in committed:
        if included is None:
            return "void"
        return "included" if slot in included else "committed"
    return "missed" if line is None else "trained"


def _checkpoint(world: World) -> str | None:
    final = world.settings.out / "model"
    return str(final) if final.is_dir() else None


def _events(world: World) -> Iterator[Event]:
    """Rejections from the journals, kills and drops, void rounds, and the warnings and errors of the nodes' logs."""
    for note in world.prepared.notes:
        yield Event(time=0.0, message=note)
    for warning in world.prepared.warnings:
        yield Event(time=0.0, level="warning", message=warning)
    for node in world.nodes:
        if node.killed and node.ended_at is not None:
            yield Event(
                time=node.ended_at - world.started, level="warning", message=f"{node.name} was killed with SIGKILL"
            )
        for line in _warnings(node.process.log):
            level: Level = "error" if line["level"] in ("ERROR", "CRITICAL") else "warning"
            at = max(0.0, float(line["ts"]) - world.started)
            yield Event(time=at, level=level, node=node.name, message=str(line["msg"])[:500])
    for number, included in world.record.included.items():
        if included is None:
            start = world.record.rounds_started.get(number, world.started)
            yield Event(time=start - world.started, level="warning", round=number, message="void: too few attestations")


def _warnings(log: Path, limit: int = 200) -> Iterator[dict[str, Any]]:
    found = 0
    for text in log.read_text(errors="replace").splitlines():
        if not text.startswith("{"):
            continue
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line.get("level") in ("WARNING", "ERROR", "CRITICAL") and {"ts", "msg"} <= line.keys():
            found += 1
            if found > limit:
                return
            yield line


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool | None]:
    flat: dict[str, str | int | float | bool | None] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif isinstance(value, list):
            flat[prefix + key] = ", ".join(str(item) for item in value)
        else:
            flat[prefix + key] = value
    return flat
