"""Many members of one run without any training: real clients, wallets and ledger, and what a round costs each of them.

A member does what `psyche-node` does on chain, with its own view, ticker and witness: join, ready, commit, attest,
checkpoint, tick. What it leaves out is training, which it only waits for, and the exchange of updates, which it takes
for done when a commitment is known.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ledger_process import SOL, start_ledger
from runs import LIMITS, ROOT, TERMS, UPDATE_BYTES
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer

from coordinator.client import CoordinatorClient, ProgramError, Pulse
from coordinator.deploy import deploy
from coordinator.program import program_bytes
from coordinator.state import Commitment, Phase
from coordinator.ticking import tick_delay
from psyche_node.node.changes import Changes
from psyche_node.node.ticker import keep_ticking
from psyche_node.node.view import ChainView
from psyche_node.node.witness import Witness

FUNDED_AT_ONCE = 18
"""Transfers that fit into one transaction."""
JOINING_AT_ONCE = 16
BUDGET_BYTES = 64 * 1024
CLUSTER_SLOT_SECONDS = 0.4


@dataclass(frozen=True, slots=True)
class Setting:
    """`round_slots` is how long training takes: of the members, the fastest needs 70 % of it and the slowest all."""

    clients: int
    rounds: int
    slot_ms: int
    round_slots: int
    overlap: int = 1
    dead: int = 0
    """Members that go silent after the first round and are never heard of again."""
    seed: int = 0
    faults: tuple[str, ...] = ()
    """What goes wrong at the members' endpoints, the preferred one first."""


@dataclass(slots=True)
class Counts:
    """What all members together have done since the measurement began."""

    ticks_paid: int = 0
    ticks_refused: int = 0
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of one run, per measured round: every round but the first."""

    setting: Setting
    rounds: int
    seconds: float
    transitions: int
    ticks_paid: int
    """Tick transactions that a fee was paid for, be they of any use or too late."""
    ticks_refused: int
    """Ticks that the endpoint's simulation refused: they cost nothing."""
    bytes_mean: float
    """Bytes that one client received per round, WebSocket and HTTP together, headers included."""
    bytes_most: float
    pushed_mean: float
    requests_mean: float
    lamports_mean: float
    """What one client paid per round."""
    void_rounds: int

    @property
    def ticks_per_transition(self) -> float:
        return self.ticks_paid / self.transitions

    def lamports_per_day(self, members: int, round_seconds: float = 30.0) -> float:
        """Fees of one node: a commitment, its share of the attestations of 32 witnesses, and of the ticks."""
        fee = 5000
        transitions = self.transitions / self.rounds
        per_round = fee * (1 + min(32, members) / members + transitions * self.ticks_per_transition / members)
        return per_round * 86400 / round_seconds


@dataclass(slots=True)
class _Held:
    """Stands in for the exchange of updates: everything that is known to be committed is here and valid."""

    known: dict[int, set[int]] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)

    async def follow(self, round_number: int, commitments: Iterable[Commitment]) -> None:
        self.known.setdefault(round_number, set()).update(one.member for one in commitments)

    def held(self, round_number: int) -> frozenset[int]:
        return frozenset(self.known.get(round_number, ()))

    def settled(self, round_number: int, committed: Iterable[int]) -> bool:
        return self.held(round_number).issuperset(committed)


class _Member:
    def __init__(self, client: CoordinatorClient, counts: Counts, setting: Setting, index: int) -> None:
        self.client = client
        self.dies = index >= setting.clients - setting.dead
        self._counts, self._setting = counts, setting
        self._random = random.Random(setting.seed * 1000 + index)
        self._slot: int | None = None
        self._view = ChainView(client)
        self.at_start = (0, 0, 0, 0)

    async def run(self, started: asyncio.Event) -> None:
        """Take part until the run is finished."""
        self._count_ticks()
        await self.client.join(Keypair())
        wallet = self.client.wallet
        assert wallet is not None
        self._slot = next(one.slot for one in await self.client.members() if one.wallet == wallet.pubkey())
        witness = Witness(self.client, self._view, _Held(), self._slot)  # type: ignore[arg-type]
        tasks = [
            asyncio.create_task(self._view.follow(self._delay)),
            asyncio.create_task(keep_ticking(self.client, self._view, self._delay)),
        ]
        try:
            await self._view.until(lambda pulse: True)
            tasks.append(asyncio.create_task(witness.run()))
            await self._take_part(witness, started)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _delay(self, pulse: Pulse) -> int:
        return tick_delay(self._slot, pulse.run.round, pulse.header.members)

    def _count_ticks(self) -> None:
        tick = self.client.tick

        async def counted() -> object:
            try:
                done = await tick()
            except ProgramError as error:
                if error.signature is None:
                    self._counts.ticks_refused += 1
                else:
                    self._counts.ticks_paid += 1
                raise
            self._counts.ticks_paid += 1
            return done

        self.client.tick = counted  # type: ignore[method-assign, assignment]

    async def _take_part(self, witness: Witness, started: asyncio.Event) -> None:
        trained, checkpointed, epoch = -1, -1, -1

        def work(pulse: Pulse) -> bool:
            run = pulse.run
            return (
                run.phase is Phase.FINISHED
                or (run.phase is Phase.ROUND_TRAIN and run.round > trained)
                or (run.phase is Phase.COOLDOWN and run.round > checkpointed)
                or (run.phase is Phase.WARMUP and run.epoch > epoch)
            )

        while True:
            run = (await self._view.until(work)).run
            if run.phase is Phase.FINISHED:
                return
            if run.phase is Phase.WARMUP:
                epoch = run.epoch
                await self.client.ready(ROOT)
            elif run.phase is Phase.COOLDOWN:
                checkpointed = run.round
                await self._quietly(self.client.checkpoint(run.final_rounds, b"\5" * 32))
            else:
                trained = run.round
                if trained == 1:
                    if self.dies:
                        return
                    self.at_start = await self._meter()
                    if not started.is_set():
                        self._counts.ticks_paid = self._counts.ticks_refused = 0
                        self._counts.revision = run.revision
                        started.set()
                await self._train(trained, witness)

    async def _train(self, number: int, witness: Witness) -> None:
        assert self._slot is not None
        record = await witness.record(number, closed=False)
        if record is None or not record.positions(self._slot):
            return
        slots = self._setting.round_slots * self._random.uniform(0.7, 1.0)
        await asyncio.sleep(slots * self._setting.slot_ms / 1000)
        digest = self._slot.to_bytes(4, "little") + number.to_bytes(28, "little")
        await self._quietly(self.client.commit(number, digest, UPDATE_BYTES, 1, 7))

    async def _quietly(self, sending: object) -> None:
        try:
            await sending  # type: ignore[misc]
        except ProgramError as error:
            # Too late, as it can happen to a node.
            if error.name not in ("WRONG_PHASE", "WRONG_ROUND", "MEMBER_NOT_ACTIVE", "RUN_FINISHED"):
                raise

    async def _meter(self) -> tuple[int, int, int, int]:
        """Bytes by HTTP, bytes by WebSocket, requests, lamports."""
        assert self.client.wallet is not None
        balance = await self.client.balance(self.client.wallet.pubkey())
        traffic = self.client.rpc.traffic
        return traffic.received, self.client.subscriptions.received, traffic.requests, balance

    async def used(self) -> tuple[int, int, int, int]:
        now = await self._meter()
        then = self.at_start
        return now[0] - then[0], now[1] - then[1], now[2] - then[2], then[3] - now[3]


async def measure(setting: Setting) -> Measured:
    """Run it on a ledger of its own. Takes about `rounds x round_slots x slot_ms`, and the start."""
    faults = [part for text in (*setting.faults, "") for part in ("--faults", text)]
    process = start_ledger("--port", "0", "--slot-ms", str(setting.slot_ms), *faults)
    try:
        assert process.stdout is not None
        endpoints = [str(one["rpc"]) for one in json.loads(process.stdout.readline())["endpoints"]]
        # The last one is for who founds the run, and without faults.
        return await _measure(setting, endpoints[-1], endpoints[:-1] or endpoints)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()


async def _measure(setting: Setting, rpc: str, members_rpc: list[str]) -> Measured:
    owner, program = Keypair(), Keypair()
    count = setting.clients
    limits = replace(
        LIMITS,
        init_min_members=count,
        min_members=max(1, (count - setting.dead) // 2),
        max_members=256,
        overlap=setting.overlap,
        batch=4 * count,
        warmup_time=6000,
        max_round_train_time=100 * setting.round_slots,
        round_witness_time=100 * setting.round_slots,
        adaptive_grace=setting.round_slots,
        rounds_per_epoch=setting.rounds,
        total_rounds=setting.rounds,
    )
    terms = replace(TERMS, samples=100_000)
    wallets = [Keypair() for _ in range(count)]
    async with CoordinatorClient([rpc], program.pubkey(), None, owner) as founder:
        await founder.airdrop(owner.pubkey(), 1000 * SOL)
        await deploy(founder, owner, program, program_bytes())
        addresses = await founder.create_run("many", limits, terms)
        await _fund(founder, owner.pubkey(), wallets)
    clients = [await CoordinatorClient.open(members_rpc, addresses.run, wallet) for wallet in wallets]
    counts, started = Counts(), asyncio.Event()
    members = [_Member(client, counts, setting, index) for index, client in enumerate(clients)]
    gate = asyncio.Semaphore(JOINING_AT_ONCE)
    try:
        async with asyncio.TaskGroup() as tasks:
            for member in members:
                await gate.acquire()
                task = tasks.create_task(member.run(started))
                asyncio.get_running_loop().call_later(0.2, gate.release)
                del task
            await started.wait()
            began = asyncio.get_running_loop().time()
        seconds = asyncio.get_running_loop().time() - began
        used = [await member.used() for member in members if not member.dies]
    finally:
        await asyncio.gather(*(client.close() for client in clients))
    async with await CoordinatorClient.open([rpc], addresses.run) as observer:
        final = await observer.pulse()
    rounds = setting.rounds - 1
    received = [(http + pushed) / rounds for http, pushed, _, _ in used]
    return Measured(
        setting=setting,
        rounds=rounds,
        seconds=seconds,
        transitions=final.run.revision - counts.revision,
        ticks_paid=counts.ticks_paid,
        ticks_refused=counts.ticks_refused,
        bytes_mean=statistics.fmean(received),
        bytes_most=max(received),
        pushed_mean=statistics.fmean(pushed for _, pushed, _, _ in used) / rounds,
        requests_mean=statistics.fmean(requests for _, _, requests, _ in used) / rounds,
        lamports_mean=statistics.fmean(lamports for _, _, _, lamports in used) / rounds,
        void_rounds=sum(kept.void for kept in final.run.inclusion),
    )


async def _fund(founder: CoordinatorClient, owner: Pubkey, wallets: list[Keypair]) -> None:
    for first in range(0, len(wallets), FUNDED_AT_ONCE):
        some = wallets[first : first + FUNDED_AT_ONCE]
        made = [
            transfer(TransferParams(from_pubkey=owner, to_pubkey=wallet.pubkey(), lamports=SOL // 20))
            for wallet in some
        ]
        await founder.send(*made)
