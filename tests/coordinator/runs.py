"""Runs to test with: limits and terms, and nodes that do the protocol's part without training anything."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.client import CoordinatorClient, ProgramError, Pulse
from coordinator.state import Limits, Phase, Terms, float_bits

ROOT = b"\1" * 32
UPDATE_BYTES = 1234
LIMITS = Limits(
    init_min_members=2,
    min_members=2,
    max_members=8,
    witnesses=0,
    overlap=1,
    max_missed=2,
    join_grace=1,
    # Ten minutes each: a run goes on when its members have done their part, however slow the machine is.
    warmup_time=30_000,
    max_round_train_time=30_000,
    round_witness_time=30_000,
    cooldown_time=30_000,
    adaptive_grace=30_000,
    batch=8,
    rounds_per_epoch=2,
    total_rounds=3,
)
TERMS = Terms(
    model_root=ROOT,
    layout_digest=b"\2" * 32,
    data_manifest=b"\3" * 32,
    samples=100,
    sequence_length=16,
    update_bytes=UPDATE_BYTES,
    topk=32,
    lookahead=True,
    clip_votes=True,
    window=3,
    schedule=0,
    warmup_rounds=0,
    decay_rounds=0,
    decay_bits=float_bits(0.999),
    peak_lr_bits=float_bits(1e-3),
    final_lr_bits=0,
    weight_decay_bits=0,
    clip_norm_bits=0,
    model_source="",
    data_source="",
)


def limits(**changes: int) -> Limits:
    return replace(LIMITS, **changes)


async def joined(rpc: list[str], run: Pubkey) -> CoordinatorClient:
    """A new funded member."""
    wallet = Keypair()
    node = await CoordinatorClient.open(rpc, run, wallet)
    await node.airdrop(wallet.pubkey(), 10**9)
    await node.join(Keypair())
    return node


async def take_part(node: CoordinatorClient, until_round: int | None = None) -> list[Pulse]:
    """Do a member's part until the run is finished or in a round; the pulses seen."""
    wallet = node.wallet
    assert wallet is not None
    mine = next(member.slot for member in await node.members() if member.wallet == wallet.pubkey())
    done: set[tuple[str, int]] = set()
    seen: list[Pulse] = []
    async for pulse in node.watch():
        seen.append(pulse)
        run = pulse.run
        if run.phase is Phase.FINISHED or (until_round is not None and run.round >= until_round):
            return seen
        try:
            if pulse.header.due(pulse.slot):
                await node.tick()
            if run.phase is Phase.WARMUP and ("ready", 0) not in done:
                done.add(("ready", 0))
                await node.ready(ROOT)
            if run.phase is Phase.ROUND_TRAIN and ("commit", run.round) not in done:
                done.add(("commit", run.round))
                await node.commit(run.round, bytes([mine, run.round]) * 16, UPDATE_BYTES, 10 + mine, 7)
            if run.phase is Phase.COOLDOWN and ("checkpoint", run.round) not in done:
                done.add(("checkpoint", run.round))
                await node.checkpoint(run.final_rounds, b"\5" * 32)
            for record in await node.rounds():
                if record.closed and not record.final and ("attest", record.round) not in done:
                    done.add(("attest", record.round))
                    await node.attest(record.round, record.commitments)
        except ProgramError as error:
            # Several tick at once and all but one come too late; anything else is a mistake of this test.
            if error.name not in ("NOT_DUE", "WRONG_PHASE", "ROUND_FINAL", "WRONG_ROUND", "RUN_FINISHED"):
                raise
    raise AssertionError("watch ended by itself")


async def close(*clients: CoordinatorClient) -> None:
    await asyncio.gather(*(client.close() for client in clients))
