"""From journals, logs and the chain's record to the result, with a world that never ran."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from solders.pubkey import Pubkey

from coordinator.client import ChainUnavailable
from coordinator.state import InclusionSet, Member, MemberStatus, Phase
from psyche_node.faults import Fault
from psyche_node.node.journal import Journal, JournalReader
from psyche_node.sim.chain_record import ChainRecord
from psyche_node.sim.collect import collect, ledger_result
from psyche_node.sim.node import SimNode
from psyche_node.sim.processes import Managed, MemoryWatch
from psyche_node.sim.result import LedgerResult, RunResult
from psyche_node.sim.run import snapshot
from psyche_node.sim.samples import SampleCounts
from psyche_node.sim.settings import Prepared, SimSettings
from psyche_node.sim.world import SimulationFailed, World

START = 1_700_000_000.0
LEDGER = LedgerResult(program_id="p", run_address="r", transactions=3, lamports=5)
SHA = "ab" * 32
SAMPLES = SampleCounts(
    samples=9, train=5, heldout=1, too_long=2, untrained=0, bad=1, cut=0, closed=0, sequence_length=16
)


def wallet(index: int) -> Pubkey:
    return Pubkey.from_bytes(bytes([index + 1]) * 32)


def member(slot: int) -> Member:
    return Member(
        slot=slot,
        wallet=wallet(slot),
        node_key=bytes([slot]) * 32,
        status=MemberStatus.ACTIVE,
        share=1000,
        next_share=1000,
        joined_round=0,
        joined_slot=0,
        missed=0,
        excluded=0,
        credit=20,
        updates_included=2,
        ready=False,
        grant=None,
        status_slot=0,
        reward=0,
        reward_claimed=0,
    )


class Ended:
    """A process that ended with this status, or runs (None)."""

    def __init__(self, log: Path, name: str, status: int | None) -> None:
        self.name, self.log = name, log
        self.process = SimpleNamespace(poll=lambda: status, returncode=status)
        self.running = status is None

    def tail(self) -> str:
        return self.log.read_text()[-1000:]


class Stage:
    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        settings = SimSettings(out=folder / "out", nodes=nodes, rounds=4)
        self.world = World(settings, START)
        self.world.prepared = Prepared(
            model=folder,
            data=folder,
            model_root="00" * 32,
            layout_digest="00" * 32,
            data_manifest="00" * 32,
            samples=1,
            sequence_length=16,
            update_bytes=100,
            parameters=1000,
            unigram_entropy=5.0,
            counts=SAMPLES,
            model_source="",
            data_source="",
        )
        self.world.record.members = tuple(member(slot) for slot in range(nodes))

    def node(
        self, index: int, *lines: dict[str, Any], status: int | None = 130, log: str = "", **fields: Any
    ) -> SimNode:
        path = self.folder / f"node-{index}.log"
        path.write_text(log)
        journal = Journal(self.folder / f"{index}.jsonl")
        for line in lines:
            journal.write(**line)
        journal.close()
        node = SimNode(
            name=f"node-{index}",
            index=index,
            wallet=str(wallet(index)),
            node_id=f"id {index}",
            process=Ended(path, f"node-{index}", status),  # type: ignore[arg-type]
            journal=JournalReader(self.folder / f"{index}.jsonl"),
            **fields,
        )
        node.lines = [{**line, **own} for line, own in zip(node.journal.read(), lines, strict=True)]
        self.world.nodes.append(node)
        return node

    def round(self, number: int, start: float, committed: set[int], included: set[int] | None) -> None:
        record = self.world.record
        record.rounds_started[number] = START + start
        record.active[number] = frozenset({0, 1})
        record.committed[number] = frozenset(committed)
        record.included[number] = None if included is None else frozenset(included)

    def collect(self, outcome: Any = "finished") -> RunResult:
        result = collect(self.world, outcome, LEDGER)
        assert RunResult.model_validate_json(result.model_dump_json()) == result
        return result


def trained(round: int, started: float, loss: float, tokens: int = 10, sent: int = 0) -> dict[str, Any]:
    return {
        "kind": "trained",
        "round": round,
        "loss": loss,
        "tokens": tokens,
        "started": START + started,
        "seconds": 1.0,
        "bytes_sent": sent,
        "bytes_received": sent,
    }


def applied(round: int, sha: str | None = SHA, until: float = 100.0, seconds: float = 0.0) -> dict[str, Any]:
    return {"kind": "applied", "round": round, "weights_sha256": sha, "time": START + until, "seconds": seconds}


def finished(sha: str = SHA) -> dict[str, Any]:
    return {
        "kind": "finished",
        "weights_sha256": sha,
        "fingerprint": "07" * 8,
        "bytes_sent": 500,
        "bytes_received": 400,
        "train_seconds": 2.0,
        "wait_seconds": 1.0,
    }


def test_rounds_losses_members_and_checks(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.node(0, trained(0, 1, 4.0), trained(1, 3, 2.0, sent=100), applied(0), applied(1), finished())
    stage.node(1, trained(0, 1, 2.0, tokens=30), trained(1, 3, 2.0), applied(0), applied(1), finished())
    stage.round(0, 1, {0, 1}, {0, 1})
    stage.round(1, 3, {0}, {0})
    stage.world.record.finished_at = START + 6
    result = stage.collect()
    assert result.rounds == 2
    assert result.loss == [pytest.approx(2.5), pytest.approx(2.0)], "the mean over tokens, not over nodes"
    assert [[one.state for one in record.members] for record in result.timeline] == [
        ["included", "included"],
        ["included", "trained"],
    ]
    assert [record.tokens for record in result.timeline] == [40, 10]
    assert [(record.start, record.end) for record in result.timeline] == [(1, 3), (3, 6)]
    first = result.timeline[0].members[0]
    assert (first.wait_seconds, first.bytes_sent) == (pytest.approx(1.0), 100)
    assert result.data == SAMPLES
    assert result.replicas_identical
    assert result.weights_sha256 == SHA
    assert [check.round for check in result.checks] == [1, 2]
    assert result.bytes_sent_total == 1000
    assert result.update_bytes_total == 3 * 100
    assert [node.exit for node in result.nodes] == ["finished", "finished"]


def test_time_between_two_trainings_is_applying_or_waiting(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    lines = [trained(0, 1, 4.0), trained(1, 6, 3.0), trained(2, 9, 2.0)]
    # Trained in 1 s each: from 2 to 6 one update was applied, from 4.5 to 5, and the first was before its time.
    stage.node(0, *lines, applied(7, until=1.5, seconds=1.0), applied(0, until=5.0, seconds=0.5), finished())
    for number, start in enumerate((0.5, 5.5, 8.5)):
        stage.round(number, start, {0}, {0})
    stage.world.record.finished_at = START + 12
    result = stage.collect()
    rows = [record.members[0] for record in result.timeline]
    assert [(row.apply_seconds, row.wait_seconds) for row in rows] == [
        (pytest.approx(0.5), pytest.approx(3.5)),
        (0.0, pytest.approx(2.0)),
        (0.0, 0.0),
    ]
    assert result.waited == pytest.approx(2.75)
    assert result.busy == pytest.approx(2.5 / 8.0), "of the two rounds of which the waiting is known"


def test_replicas_that_differ_are_not_called_identical(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.node(0, applied(0), finished())
    stage.node(1, applied(0), finished("cd" * 32))
    stage.round(0, 1, {0, 1}, {0, 1})
    stage.world.record.finished_at = START + 2
    assert not stage.collect().replicas_identical


def test_a_node_that_was_stopped_has_waited_all_the_same(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.node(0, *(trained(number, at, 1.0) for number, at in enumerate((1, 4, 6))))
    for number, start in enumerate((0, 3, 5)):
        stage.round(number, start, {0}, {0})
    result = stage.collect("interrupted")
    rows = [record.members[0].wait_seconds for record in result.timeline]
    assert result.nodes[0].wait_seconds == pytest.approx(sum(rows))
    assert sum(rows) > 0


def test_nobody_has_missed_the_round_that_the_run_was_stopped_in(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.node(0, trained(0, 1, 1.0), trained(1, 2, 1.0))
    stage.node(1, trained(1, 2, 1.0))
    for number, start in enumerate((1, 2, 3)):
        stage.round(number, start, {0} if number == 0 else set(), {0} if number == 0 else None)
    states = [[(one.node, one.state) for one in record.members] for record in stage.collect().timeline]
    assert states == [
        [("node-0", "included"), ("node-1", "missed")],
        [("node-0", "trained"), ("node-1", "trained")],
        [],
    ]


def test_void_round_missed_round_and_update_that_did_not_count(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.node(0, trained(0, 1, 1.0), trained(1, 2, 1.0))
    stage.node(1, trained(0, 1, 1.0))
    stage.round(0, 1, {0, 1}, None)
    stage.round(1, 2, {0}, {1})
    stage.world.record.finished_at = START + 3
    result = stage.collect()
    assert [[one.state for one in record.members] for record in result.timeline] == [
        ["void", "void"],
        ["committed", "missed"],
    ]
    assert [record.void for record in result.timeline] == [True, False]
    assert [event.message for event in result.events] == ["void: too few attestations"]


def test_nothing_has_happened_yet(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.node(0, status=None)
    stage.world.record.members = ()
    result = stage.collect("interrupted")
    assert (result.rounds, result.loss, result.heldout_loss, result.checkpoint) == (0, [], None, None)
    assert result.nodes[0].slot is None


@pytest.mark.parametrize(
    ("status", "fields", "said"),
    [
        (None, {}, "interrupted"),
        (130, {}, "interrupted"),
        (-signal.SIGTERM, {}, "interrupted"),
        (-signal.SIGKILL, {"killed": True}, "killed"),
        (-signal.SIGKILL, {}, "failed"),
        (22, {}, "failed"),
        (0, {"fault": Fault.OUTSIDER}, "finished"),
    ],
)
def test_how_a_node_ended(tmp_path: Path, status: int | None, fields: dict[str, Any], said: str) -> None:
    stage = Stage(tmp_path)
    stage.node(0, status=status, **fields)
    assert stage.collect("interrupted").nodes[0].exit == said
    # Nobody but the simulation stops a node of a run that failed.
    assert stage.collect("failed").nodes[0].exit == said.replace("interrupted", "stopped")


def test_warnings_of_the_logs_become_events_and_hostile_lines_do_not_hurt(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    lines = [
        json.dumps({"ts": START + 2, "level": "WARNING", "msg": "rejected a piece" + "x" * 1000}),
        json.dumps({"ts": START - 5, "level": "ERROR", "msg": "clock"}),
        json.dumps({"ts": START + 1, "level": "INFO", "msg": "nothing"}),
        json.dumps({"level": "WARNING"}),
        "{not json",
        "plain text",
    ]
    stage.node(0, log="\n".join(lines))
    events = stage.collect("interrupted").events
    assert [(event.time, event.level) for event in events] == [(0.0, "error"), (2.0, "warning")]
    assert len(events[1].message) == 500


def test_curve_has_one_point_a_round_in_their_order(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    lines = [
        {"kind": "evaluated", "time": START + at, "round": number, "heldout_loss": loss, "seconds": 0.0}
        for at, number, loss in ((3, 9, 2.0), (1, 0, 4.0), (4, 9, 1.5))
    ]
    node = stage.node(0)
    node.lines = lines
    result = stage.collect("interrupted")
    assert [(point.round, point.loss) for point in result.heldout_curve] == [(1, 4.0), (10, 1.5)]
    assert result.heldout_loss == 1.5


def test_a_run_that_holds_nothing_out_has_no_curve(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    line = {"kind": "evaluated", "time": START, "round": 3, "heldout_loss": None, "seconds": 0.0}
    stage.node(0).lines = [line]
    result = stage.collect("interrupted")
    assert (result.heldout_curve, result.heldout_loss) == ([], None)


def test_tasks_are_told_with_their_figures(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    measures = {"accuracy": {"value": 0.5, "stderr": 0.1}, "accuracy_normalised": {"value": 1.0, "stderr": None}}
    line = {"kind": "tasks", "time": START, "sha256": "ab", "file": "x", "seconds": 2.0}
    results = [{"task": "sums", "thinking": None, "samples": 9, "measures": measures}]
    stage.node(0).lines = [
        {**line, "round": number, "signature": signature, "results": results}
        for number, signature in ((7, None), (3, "s"))
    ]
    found = stage.collect("interrupted").evaluations
    assert [(one.round, one.signature, one.seconds) for one in found] == [(3, "s", 2.0), (7, None, 2.0)]
    assert [(f.task, f.measure, f.value, f.stderr, f.samples) for f in found[0].figures] == [
        ("sums", "accuracy", 0.5, 0.1, 9),
        ("sums", "accuracy_normalised", 1.0, None, 9),
    ]


def test_ledger_that_is_gone_or_silent_costs_the_counts_and_not_the_report(tmp_path: Path) -> None:
    class Silent:
        program_id = wallet(9)

        async def transaction_counts(self) -> tuple[int, int]:
            raise ChainUnavailable("away")

    world = Stage(tmp_path).world
    world.chain, world.rpc = Silent(), "http://x"  # type: ignore[assignment]
    world.addresses = SimpleNamespace(run=wallet(8), members=wallet(8), rounds=wallet(8))  # type: ignore[assignment]
    silent = asyncio.run(ledger_result(world))
    assert (silent.transactions, silent.lamports, silent.run_address) == (0, 0, str(wallet(8)))
    world.ledger = SimpleNamespace(running=False)  # type: ignore[assignment]
    assert asyncio.run(ledger_result(world)) == silent


def run_in(phase: Phase) -> Any:
    return SimpleNamespace(run=SimpleNamespace(phase=phase, round=0, inclusion=()))


@pytest.mark.parametrize(
    ("phase", "statuses", "said"),
    [
        (Phase.WAITING_FOR_MEMBERS, (None, None, None), None),
        (Phase.WAITING_FOR_MEMBERS, (None, None, 52), "waits for 3 members, and only 2"),
        (Phase.WARMUP, (None, 52, 52), None),
        (Phase.ROUND_TRAIN, (None, 52, 52), None),
        (Phase.ROUND_TRAIN, (52, 52, 52), "every honest node has ended"),
        (None, (None, None, 52), None),
    ],
)
def test_run_that_cannot_go_on_is_noticed(
    tmp_path: Path, phase: Phase | None, statuses: tuple[int | None, ...], said: str | None
) -> None:
    stage = Stage(tmp_path, nodes=3)
    for index, status in enumerate(statuses):
        stage.node(index, status=status, log="out of memory")
    stage.world.record.pulse = None if phase is None else run_in(phase)
    if said is None:
        stage.world._check_alive()
        return
    with pytest.raises(SimulationFailed, match=rf"{said}(.|\n)*exit status 52(.|\n)*out of memory"):
        stage.world._check_alive()


def test_the_last_words_of_a_node_are_what_it_said_to_a_person(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    lines = [{"level": "INFO", "msg": "loading"}, {"level": "ERROR", "msg": "no such device"}]
    stage.node(0, status=10, log="\n".join(json.dumps(line) for line in lines))
    with pytest.raises(SimulationFailed) as caught:
        stage.world._check_alive()
    assert str(caught.value).endswith("ends with\nno such device")


@pytest.mark.parametrize("what", ["ledger", "relay"])
def test_what_all_nodes_need_is_noticed_when_it_ends(tmp_path: Path, what: str) -> None:
    stage = Stage(tmp_path)
    stage.node(0, status=None)
    log = tmp_path / "its.log"
    log.write_text("killed")
    setattr(stage.world, what, Ended(log, what, -9))
    with pytest.raises(SimulationFailed, match=rf"the {what} has ended(.|\n)*killed"):
        stage.world._check_alive()


def test_round_between_two_looks_is_on_record(tmp_path: Path) -> None:
    record = ChainRecord()
    kept = [
        SimpleNamespace(round=number, ranges=((number * 4, 2), (99, 1)), commitments={0: None}, active=frozenset({0}))
        for number in (0, 1)
    ]
    pulse = run_in(Phase.ROUND_WITNESS)
    pulse.run.inclusion = (InclusionSet(0, frozenset({0}), False), InclusionSet(1, frozenset(), True))
    record.see(pulse, tuple(kept), ())  # type: ignore[arg-type]
    assert sorted(record.rounds_started) == [0, 1]
    assert record.positions == {0: [0, 1, 99], 1: [4, 5, 99]}
    assert record.included == {0: frozenset({0}), 1: None}


def test_process_is_gone_when_its_end_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stubborn_part.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def test() -> None:
        process = Managed("part", "stubborn_part", [], tmp_path / "part.log", pipe=True)
        assert await process.first_line(90) == "up\n"
        stopping = asyncio.create_task(process.stop())
        await asyncio.sleep(0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert process.process.returncode == -signal.SIGKILL

    asyncio.run(test())


def test_memory_of_a_process_that_is_gone_counts_nothing() -> None:
    watch = MemoryWatch()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    watch.watch("gone", gone.pid)
    watch.sample()
    assert watch.peak == watch.now > 0
    assert watch.peaks == {}


def test_progress_tells_the_round_of_a_held_out_loss_and_a_reduction_that_stays(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    trained = {"kind": "trained", "loss": 5.0, "tokens": 9, "started": START, "seconds": 1.0, "bytes_sent": 7}
    stage.node(0, trained | {"round": 0}, {"kind": "evaluated", "round": 0, "heldout_loss": 6.5}, status=None)
    first = snapshot(stage.world)
    stage.node(1, trained | {"round": 1, "bytes_sent": 500}, status=None)
    later = snapshot(stage.world)
    assert (first.heldout, first.heldout_round) == (later.heldout, later.heldout_round) == (6.5, 1)
    # Two nodes: half of 1,000 fp32 values twice, against an update of 100 bytes to the other one.
    assert first.reduction == later.reduction == 40.0
