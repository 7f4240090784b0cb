"""What a simulated run ends with: the model of ``report.json``.

The docstring under each field is its documentation: ``docs/reference/report.md`` is generated from them. Times are
seconds since the command was started unless a field says otherwise; losses are mean natural-log cross-entropy per
trained token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Literal, Self

from pydantic import Field, model_validator

from psyche_node import units
from psyche_node.sim.record import Count, Loss, Record, Seconds
from psyche_node.sim.samples import SampleCounts

Outcome = Literal["finished", "interrupted", "failed"]
NodeExit = Literal["finished", "killed", "failed", "stopped", "interrupted"]
MemberState = Literal["trained", "committed", "included", "missed", "void"]
Level = Literal["info", "warning", "error"]


class CurvePoint(Record):
    """One evaluation on the held-out split."""

    round: Count
    """Rounds applied when the evaluation was made; 0 is the untrained model."""
    loss: Loss
    """Mean loss over the held-out tokens; null if it was not finite."""


class Baseline(Record):
    """A dense AdamW run of the same model on the same tokens in one process."""

    name: str = "adamw"
    """Which optimizer it was."""
    loss: list[Loss]
    """Training loss per step; step r sees the tokens that the network's members saw in round r."""
    heldout_curve: list[CurvePoint]
    """Held-out loss over the steps."""
    heldout_loss: Loss
    """Held-out loss at the end."""
    learning_rate: float
    """The peak learning rate, the best of those tried."""
    wall_seconds: Seconds
    """How long it took, the search for the learning rate not counted."""


class NodeResult(Record):
    """One node of the simulation: an honest member, an adversary or an outsider."""

    name: str
    """The simulation's name of the node; timeline, checks and events refer to it."""
    slot: int | None
    """Its member slot on chain; null for a node that never joined."""
    wallet: str
    """Address of its Solana wallet, base58."""
    node_id: str
    """Its libp2p peer id, derived from the node key that is registered on chain."""
    status: str
    """The member's status on chain at the end: pending, active, desynced, dropped, left, ejected; outsider if none."""
    exit: NodeExit
    """How its process ended: finished by itself, killed on purpose, failed with an error, stopped by
    the simulation, interrupted by its user."""
    exit_code: int | None = None
    """The process's exit code (docs/reference/exit-codes.md); negative: the signal that ended it."""
    ended_at: Seconds | None = None
    """When its process ended; null if that was with the run."""
    fault: str | None = None
    """The misbehaviour it was started with (tamper, length, outsider); null for an honest node."""
    device: str = ""
    """What it trained on, with threads and micro-batch where they were set."""
    weights_sha256: str | None
    """SHA-256 over the model's weights at the end; null for a node that was not there at the end."""
    fingerprint: str | None
    """The 64-bit fingerprint of the weights at the end, 16 hexadecimal digits."""
    bytes_sent: Count
    """Bytes that its network process sent, all protocols together."""
    bytes_received: Count
    """Bytes that its network process received, all protocols together."""
    train_seconds: Seconds
    """Time in forward, backward and encoding."""
    wait_seconds: Seconds
    """Time in which the model was idle: waiting for the chain, for updates, or for the other members."""
    updates_included: Count
    """Rounds whose inclusion set contains its update, as the chain counted them."""
    credit: Count = 0
    """Tokens credited to the member on chain: those of its included updates."""
    peak_memory_bytes: Count = 0
    """Largest resident memory of its processes together."""


class LedgerResult(Record):
    """What the run cost on chain."""

    rpc: str = ""
    """The JSON-RPC address that the nodes used."""
    program_id: str
    """Address of the coordinator program."""
    run_address: str
    """Address of the run's account; `psyche-admin run show` takes it."""
    transactions: Count
    """Transactions that the run put on chain, deployment and funding included."""
    failed_transactions: Count = 0
    """Those among them that the program refused (two nodes ticking at the same time, for example)."""
    lamports: Count
    """Fees paid by all wallets together."""
    rent_lamports: Count = 0
    """Deposits of the program's and the run's accounts; they come back when the accounts are closed."""
    slots: Count = 0
    """Slots that passed."""
    slot_ms: Count = 0
    """Length of a slot in milliseconds; 0 if it is the cluster's own."""
    instructions: dict[str, int] = Field(default_factory=dict)
    """How often each instruction of the program succeeded."""


class MemberRound(Record):
    """What one member did in one round. A member that is no longer active has no entry."""

    node: str
    """Name of the node."""
    state: MemberState
    """How far its update came: missed (none made in time), trained (made, not on chain), committed (on chain, not
    in the inclusion set), included, void (committed, but the round had too few attestations)."""
    train_start: float | None = None
    """When it started to train the round."""
    train_end: float | None = None
    """When its update was encoded."""
    apply_seconds: Seconds = 0.0
    """How long it applied updates, and evaluated, before it trained the next round."""
    wait_seconds: Seconds = 0.0
    """How long its model was idle before it trained the next round: for the others, their updates, or the chain."""
    loss: Loss = None
    """Mean loss over the tokens it trained in this round."""
    tokens: Count = 0
    """Tokens it trained in this round."""
    bytes_sent: Count = 0
    """Bytes sent from the start of this round to the start of the next."""
    bytes_received: Count = 0
    """Bytes received in the same time."""

    @property
    def went_on(self) -> bool:
        """Whether it trained this round and the next: only then it is known how long it waited."""
        return self.wait_seconds > 0 or self.apply_seconds > 0


class RoundRecord(Record):
    """One round of the run."""

    round: Count
    """Its number, from 0."""
    start: float
    """When the chain opened it."""
    end: float
    """When the chain opened the next one, or ended the run."""
    void: bool = False
    """Whether it had too few attestations, so that nothing was applied and its data was requeued."""
    tokens: Count = 0
    """Tokens of the included updates."""
    members: list[MemberRound]
    """The members that were active in it."""

    @property
    def waited(self) -> float | None:
        """Median of what its members waited; None if nobody went on to the next round."""
        return median(waits) if (waits := [m.wait_seconds for m in self.members if m.went_on]) else None


class TaskFigure(Record):
    """One figure of a task."""

    task: str
    """Name of the task."""
    thinking: bool | None
    """Whether the chat template's reasoning switch was on, or, without one, whether its prompts begin inside reasoning;
    null where the task has none."""
    measure: str
    """Which figure: accuracy, accuracy_normalised, exact_match, overlong, unclosed, tokens, loss."""
    value: float
    """The mean over the samples."""
    stderr: float | None
    """Standard error of the mean; null for a single sample."""
    samples: Count
    """Examples."""


class TaskEvaluation(Record):
    """What one node found in time that it spent waiting (`--tasks`)."""

    node: str
    """Name of the node."""
    round: Count
    """Rounds that the weights contained."""
    sha256: str
    """SHA-256 of the results; `psyche-node eval --verify` compares a file of results with the chain."""
    signature: str | None
    """Transaction that recorded it; null if the chain was away."""
    seconds: Seconds
    """Time that it took of the training process."""
    figures: list[TaskFigure]
    """The figures, task by task."""


class ReplicaCheck(Record):
    """One comparison of all replicas (`--check-every`)."""

    round: Count
    """Rounds applied when the weights were hashed."""
    weights_sha256: dict[str, str]
    """SHA-256 of the weights, per node."""

    @property
    def identical(self) -> bool:
        return len(set(self.weights_sha256.values())) <= 1


class Event(Record):
    """Something worth telling: a kill, a rejected update, a dropped member, a void round, a warning of a node."""

    time: float
    """When it happened."""
    level: Level = "info"
    """How bad it is."""
    node: str | None = None
    """The node that said it; null for the simulation itself."""
    round: int | None = None
    """The round it belongs to, where known."""
    message: str
    """What happened."""


class RunResult(Record):
    """Everything that `psyche-sim` knows about a run when it is over: the content of `report.json`."""

    format: Literal[1] = 1
    """Version of this format; raised when a field changes its meaning."""
    outcome: Outcome
    """finished: all rounds were trained; interrupted: stopped by the user; failed: see the events."""
    run_id: str
    """The run's name on chain."""
    started_at: str
    """Start of the command, ISO 8601, UTC."""
    wall_seconds: Seconds
    """From the command's start to the end of the last round (an AdamW baseline not counted)."""
    first_round_seconds: Seconds | None = None
    """From the command's start until the first update was committed."""
    rounds: Count
    """Rounds trained, void ones included."""
    loss: list[Loss]
    """Training loss per round: the mean over the members, weighted by tokens; null if no member reported one."""
    heldout_loss: Loss
    """Held-out loss at the end; null if nothing is held out, or none was measured."""
    heldout_curve: list[CurvePoint]
    """Held-out loss over the rounds; empty if nothing is held out."""
    unigram_entropy: float
    """Entropy of the single tokens of the training data, in nats: the loss of a model that knows only frequencies."""
    baseline: Baseline | None = None
    """The dense run beside it; null if none was asked for."""
    parameters: Count
    """Trainable parameters of the model."""
    update_bytes: Count
    """Bytes of the update that one node makes in one round. Fixed by the model's shapes and `topk`."""
    dense_bytes: Count
    """Bytes that one node would have sent in one round, had the gradient been averaged by a ring all-reduce in fp32:
    2 (n - 1) / n x 4 x parameters, for the n members that the run started with."""
    update_bytes_total: Count
    """`update_bytes` summed over the updates that were committed."""
    dense_bytes_total: Count
    """The dense all-reduce's bytes summed over rounds and the nodes active in them; compare with
    `bytes_sent_total`."""
    bytes_sent_total: Count
    """Bytes that all network processes together sent: updates to every peer, announcements, handshakes."""
    tokens_per_second: float
    """Tokens trained by all members together, per second of the rounds."""
    peak_memory_bytes: Count
    """Largest resident memory of all processes of the simulation together."""
    replicas_identical: bool | None
    """Whether the nodes that were there at the end have byte-identical weights, and did at every check; null if no node
    got to the end, and no check found a difference."""
    weights_sha256: str | None = None
    """The SHA-256 they have in common at the end; null if they differ, or no node got there."""
    checks: list[ReplicaCheck] = Field(default_factory=list)
    """The comparisons made during the run."""
    evaluations: list[TaskEvaluation] = Field(default_factory=list)
    """The evaluations of tasks, in order of their rounds."""
    data: SampleCounts | None = None
    """What became of the samples; null in reports of older versions."""
    passes: float | None = None
    """How often the rounds went over the training sequences; null in reports of older versions."""
    checkpoint: str | None
    """Hugging Face folder of the final model."""
    question: str | None = None
    """First prompt of the held-out data, shortened: something to ask the model. Null where the data has none."""
    nodes: list[NodeResult]
    """The nodes, in the order they were started."""
    ledger: LedgerResult
    """What happened on chain."""
    timeline: list[RoundRecord]
    """The rounds, in order."""
    events: list[Event] = Field(default_factory=list)
    """What happened, in order of time."""
    settings: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """The resolved settings of the simulation."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse a report that contradicts itself: no claim may be printed that the data denies."""
        if len(self.loss) != self.rounds:
            raise ValueError(
                f"{len(self.loss)} losses for {self.rounds} rounds; give one per round, null where unknown"
            )
        names = Counter(node.name for node in self.nodes)
        if doubled := [name for name, times in names.items() if times > 1]:
            raise ValueError(f"two nodes are called {doubled[0]!r}; the timeline could not tell them apart")
        for record in self.timeline:
            if unknown := [member.node for member in record.members if member.node not in names]:
                raise ValueError(f"round {record.round} of the timeline names {unknown[0]!r}, which is not a node")
        if self.replicas_identical and not (
            same(node.weights_sha256 for node in self.nodes) and all(check.identical for check in self.checks)
        ):
            raise ValueError("replicas_identical is true, but the weights' SHA-256 differ; compute it with `replicas`")
        return self

    @property
    def members(self) -> list[NodeResult]:
        """The nodes that were members of the run, outsiders left out."""
        return [node for node in self.nodes if node.slot is not None]

    @property
    def compared_text(self) -> str:
        """What the checks on the way found, where no node got to the end."""
        if not self.checks:
            return "no node got to the end"
        when = f"{units.times_of(len(self.checks))} on the way, last after round {self.checks[-1].round:,}"
        return f"no node got to the end; identical {when}"

    @property
    def heldout_text(self) -> str:
        """The held-out loss at the end, or why there is none."""
        if self.heldout_loss is not None:
            return f"{self.heldout_loss:.3f}"
        return "none: nothing is held out" if self.data is not None and not self.data.heldout else "unknown"

    @property
    def void_rounds(self) -> list[int]:
        return [record.round for record in self.timeline if record.void]

    @property
    def waited(self) -> float | None:
        """Median over the rounds of what members waited in each; None if there was but one."""
        waits = [waited for record in self.timeline if (waited := record.waited) is not None]
        return median(waits) if waits else None

    @property
    def busy(self) -> float | None:
        """Share of the members' time between two trainings and in them in which their models were not idle."""
        rows = [m for record in self.timeline for m in record.members if m.went_on and m.train_end is not None]
        worked = sum((m.train_end or 0.0) - (m.train_start or 0.0) + m.apply_seconds for m in rows)
        waited = sum(m.wait_seconds for m in rows)
        return worked / (worked + waited) if worked + waited else None

    @property
    def reduction(self) -> float | None:
        """How many times fewer bytes were sent, everything counted, than a dense all-reduce would have."""
        return self.dense_bytes_total / self.bytes_sent_total if self.bytes_sent_total else None


def same(hashes: Iterable[str | None]) -> bool:
    """Whether all hashes that are known are equal."""
    return len({value for value in hashes if value is not None}) <= 1


def replicas(nodes: Iterable[NodeResult], checks: Iterable[ReplicaCheck]) -> tuple[bool | None, str | None]:
    """Return ``(replicas_identical, weights_sha256)``; a member that finished without telling its hash is different."""
    nodes, checks = list(nodes), list(checks)
    silent = any(node.slot is not None and node.exit == "finished" and node.weights_sha256 is None for node in nodes)
    hashes = {node.weights_sha256 for node in nodes if node.weights_sha256 is not None}
    if not hashes and not silent and all(check.identical for check in checks):
        return None, None
    identical = len(hashes) == 1 and not silent and all(check.identical for check in checks)
    return identical, next(iter(hashes)) if len(hashes) == 1 else None


def mean_loss(losses: Mapping[str, tuple[float, int]]) -> float | None:
    """Return the mean of the nodes' ``(loss, tokens)``, weighted by tokens; None if nobody trained a token."""
    tokens = sum(count for _, count in losses.values())
    return sum(loss * count for loss, count in losses.values()) / tokens if tokens else None


def load_result(path: Path) -> RunResult:
    """Read a ``report.json``. Raises pydantic.ValidationError or OSError."""
    return RunResult.model_validate_json(path.read_bytes())
