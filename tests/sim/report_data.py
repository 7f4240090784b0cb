"""Runs that never happened, with all that a report shows: kills, rejected updates, void rounds, hostile text."""

from __future__ import annotations

import hashlib
import math
import random

from psyche_node.sim.result import (
    Baseline,
    CurvePoint,
    Event,
    LedgerResult,
    MemberRound,
    MemberState,
    NodeResult,
    ReplicaCheck,
    RoundRecord,
    RunResult,
    TaskEvaluation,
    TaskFigure,
    replicas,
)
from psyche_node.sim.samples import SampleCounts
from psyche_node.sim.traffic import dense_allreduce_bytes

PARAMETERS, UPDATE, TOKENS = 2_134_528, 20_992, 4_096
ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def base58(random_: random.Random, length: int = 44) -> str:
    return "".join(random_.choice(ALPHABET) for _ in range(length))


def loss_at(share: float, end: float) -> float:
    return end + (6.9 - end) * math.exp(-4.2 * share)


def synthetic_run(
    nodes: int = 4,
    rounds: int = 60,
    *,
    seed: int = 1,
    baseline: bool = True,
    kill: bool = True,
    tamper: bool = False,
    void: bool = True,
    round_seconds: float = 2.6,
    tasks: bool = False,
    texts: str = "",
) -> RunResult:
    """Build a plausible run. ``texts`` is appended to every name and message that a peer could choose."""
    rng = random.Random(seed)
    names = [f"node-{index}{texts}" for index in range(nodes)]
    killed = {names[-1]: rounds // 2} if kill else {}
    bad = names[1] if tamper else None
    void_round = rounds * 2 // 3 if void else -1
    sha = hashlib.sha256(str(seed).encode()).hexdigest()
    speed = {name: 0.62 + 0.3 * rng.random() for name in names}

    now, first = 11.4, 11.4
    timeline: list[RoundRecord] = []
    events = [
        Event(time=0.0, message=f"seed {seed}, {nodes} nodes, {rounds} rounds{texts}"),
        Event(time=2.1, message="coordinator program deployed: 11 transactions, 0.0457 SOL deposit"),
        Event(time=11.3, message="every member is ready; round 0 begins", round=0),
    ]
    ended: dict[str, float] = {}
    included = dict.fromkeys(names, 0)
    sent, received = dict.fromkeys(names, 380_000), dict.fromkeys(names, 410_000)
    train, wait = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for number in range(rounds):
        dying = [name for name, at in killed.items() if at == number]
        missing = [name for name, at in killed.items() if at <= number < at + 2]
        active = [name for name in names if killed.get(name, rounds) + 2 > number]
        length = round_seconds * (1 + 0.1 * rng.random()) * (1.55 if missing else 1.0)
        if number == 0:
            length *= 1.6
        members: list[MemberRound] = []
        for name in active:
            if name in missing:
                if name in dying:
                    ended[name] = now + 0.4 * round_seconds
                    events.append(
                        Event(
                            time=ended[name],
                            level="warning",
                            node=name,
                            round=number,
                            message=f"killed (SIGKILL) by the simulation{texts}",
                        )
                    )
                members.append(MemberRound(node=name, state="missed"))
                continue
            state: MemberState = "included"
            if number == void_round:
                state = "void"
            elif name == bad:
                state = "committed"
            elif rng.random() < 0.012:
                state = rng.choice(["committed", "missed"])
            busy = min(speed[name] * (0.96 + 0.08 * rng.random()), 0.97) * round_seconds
            tokens = TOKENS // len(active)
            out = UPDATE * (len(active) - 1) + rng.randrange(6_000, 11_000)
            if state == "missed":
                members.append(MemberRound(node=name, state=state, bytes_sent=9_000))
                continue
            members.append(
                MemberRound(
                    node=name,
                    state=state,
                    train_start=now + 0.02,
                    train_end=now + busy,
                    wait_seconds=max(0.0, length - busy - 0.02),
                    tokens=tokens,
                    bytes_sent=out,
                    bytes_received=out + rng.randrange(-2_000, 2_000),
                    loss=loss_at(number / rounds, 3.3) + rng.gauss(0, 0.12),
                )
            )
            train[name] += busy
            wait[name] += length - busy
            sent[name] += out
            received[name] += out
            included[name] += state == "included"
        if missing and number == killed[missing[0]] + 1:
            events.append(
                Event(
                    time=now + length,
                    level="warning",
                    round=number,
                    message=f"{missing[0]} missed 2 rounds in a row: dropped",
                )
            )
        if bad:
            events.append(
                Event(
                    time=now + 1.2,
                    level="warning",
                    node=names[0],
                    round=number,
                    message=f"update of member 1 rejected: piece 0 does not match the digest it committed to{texts}",
                )
            )
        if number == void_round:
            events.append(
                Event(
                    time=now + length,
                    level="error",
                    round=number,
                    message="round is void: 2 of 4 attestations, quorum 3; its data is requeued",
                )
            )
        timeline.append(
            RoundRecord(
                round=number, start=now, end=now + length, void=number == void_round, tokens=TOKENS, members=members
            )
        )
        now += length

    checks = [
        ReplicaCheck(
            round=at,
            weights_sha256={
                n: hashlib.sha256(f"{seed}{at}".encode()).hexdigest() for n in names if killed.get(n, rounds + 1) > at
            },
        )
        for at in range(10, rounds + 1, max(10, rounds // 12))
    ]
    results = [
        NodeResult(
            name=name,
            slot=index,
            wallet=base58(rng),
            node_id="12D3KooW" + base58(rng),
            status="dropped" if name in killed else "active",
            exit="killed" if name in killed else "finished",
            exit_code=-9 if name in killed else 0,
            ended_at=ended.get(name),
            fault="tamper" if name == bad else None,
            device=f"cpu, {1 + index % 2} threads",
            weights_sha256=None if name in killed else sha,
            fingerprint=None if name in killed else sha[:16],
            bytes_sent=sent[name],
            bytes_received=received[name],
            train_seconds=train[name],
            wait_seconds=wait[name],
            updates_included=included[name],
            credit=included[name] * TOKENS // nodes,
            peak_memory_bytes=730_000_000,
        )
        for index, name in enumerate(names)
    ]
    identical, common = replicas(results, checks)
    dense = dense_allreduce_bytes(PARAMETERS, nodes)
    curve = [CurvePoint(round=at, loss=loss_at(at / rounds, 3.42)) for at in range(0, rounds + 1, max(1, rounds // 15))]
    dense_curve = [CurvePoint(round=p.round, loss=loss_at(p.round / rounds, 3.2)) for p in curve]
    losses = [
        sum(m.loss for m in record.members if m.loss is not None)
        / max(1, sum(m.loss is not None for m in record.members))
        for record in timeline
    ]
    return RunResult(
        outcome="finished",
        run_id=f"stdlib-chat{texts}",
        started_at="2026-03-02T09:14:07Z",
        wall_seconds=now + 1.1,
        first_round_seconds=first + 2.2,
        rounds=rounds,
        loss=list(losses),
        heldout_loss=curve[-1].loss,
        heldout_curve=curve,
        unigram_entropy=5.914,
        parameters=PARAMETERS,
        update_bytes=UPDATE,
        dense_bytes=dense,
        update_bytes_total=UPDATE * sum(len(r.members) for r in timeline),
        dense_bytes_total=dense * sum(len(r.members) for r in timeline),
        bytes_sent_total=sum(sent.values()),
        tokens_per_second=rounds * TOKENS / (now - first),
        peak_memory_bytes=3_480_000_000,
        replicas_identical=identical,
        weights_sha256=common,
        checks=checks,
        evaluations=[
            TaskEvaluation(
                node=results[0].name,
                round=at,
                sha256=rng.randbytes(32).hex(),
                signature=base58(rng, 88) if at else None,
                seconds=1.5,
                figures=[
                    TaskFigure(
                        task=f"sums{texts}",
                        thinking=thinking,
                        measure=measure,
                        value=at / rounds,
                        stderr=error,
                        samples=200,
                    )
                    for thinking in (True, False)
                    for measure, error in (("exact_match", 0.03), ("overlong", None), ("tokens", 4.5))
                ],
            )
            for at in range(0, rounds + 1, max(1, rounds // 9))
        ]
        if tasks
        else [],
        question=f"What does os do?{texts}",
        data=SampleCounts(
            samples=1_500,
            train=1_380,
            heldout=70,
            too_long=43,
            untrained=4,
            bad=3,
            cut=0,
            closed=0,
            sequence_length=256,
            skipped=(f"chats.jsonl:7: this is not JSON{texts}",),
        ),
        checkpoint=f"runs/2026-03-02/checkpoint{texts}",
        nodes=results,
        baseline=Baseline(
            loss=[loss_at(r / rounds, 3.15) for r in range(rounds)],
            heldout_curve=dense_curve,
            heldout_loss=dense_curve[-1].loss,
            learning_rate=0.003,
            wall_seconds=41.2,
        )
        if baseline
        else None,
        ledger=LedgerResult(
            rpc="http://127.0.0.1:41899",
            program_id=base58(rng),
            run_address=base58(rng),
            transactions=rounds * (2 * nodes + 3) + 40,
            failed_transactions=rounds // 5,
            lamports=(rounds * (2 * nodes + 3) + 40) * 5_000,
            rent_lamports=182_400_000,
            slots=int(now * 20),
            slot_ms=50,
            instructions={
                "commit": rounds * nodes,
                "attest": rounds * nodes,
                "tick": rounds * 2,
                "join": nodes,
                "ready": nodes,
                "checkpoint": nodes,
                "init_run": 1,
            },
        ),
        timeline=timeline,
        events=events,
        settings={
            "nodes": nodes,
            "rounds": rounds,
            "seed": seed,
            "topk": 8,
            "peak_lr": 0.004,
            "schedule": "wsd",
            "batch": 16,
            "sequence_length": 256,
            "overlap": 1,
            "lookahead": True,
            "witnesses": 0,
            "slot_ms": 50,
            "check_every": 10,
            "data": "standard library",
            "model": "seed-oss, 2.1 M",
            "device": None,
        },
    )
