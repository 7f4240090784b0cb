"""What owners, join authorities and members do with a run by `psyche-admin`, on a real ledger."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from admin_harness import admin, admin_json
from ledger_process import SOL, Ledger
from runs import LIMITS, TERMS, close, joined, take_part
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator import instructions as ix
from coordinator import layout
from coordinator.addresses import run_addresses
from coordinator.admin.changes import change_of
from coordinator.base58 import peer_id
from coordinator.client import CoordinatorClient
from coordinator.state import MemberStatus, Phase, Run
from coordinator.wallet import load_keypair


@pytest.fixture
def create(ledger: Ledger, program: tuple[Keypair, Pubkey], wallet: Path, config: Path) -> Callable[..., str]:
    def make(*settings: str) -> str:
        options = ["--payer", wallet, "--program", program[1], "--config", config, "--rpc", ledger.rpc]
        for setting in settings:
            options += ["--set", setting]
        address: str = admin_json("run", "create", *options)["address"]
        return address

    return make


@pytest.fixture
def another(ledger: Ledger, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a funded wallet."""

    def make(name: str) -> Path:
        path = tmp_path / f"{name}.json"
        admin("keys", "new", path)
        admin("ledger", "airdrop", path, "5", "--rpc", ledger.rpc)
        return path

    return make


def do(ledger: Ledger, run: str, wallet: Path, act: Callable[[CoordinatorClient], Coroutine[Any, Any, Any]]) -> Any:
    async def play() -> Any:
        async with await CoordinatorClient.open([ledger.rpc], run, load_keypair(wallet)) as client:
            return await act(client)

    return asyncio.run(asyncio.wait_for(play(), 300))


def key_file(path: Path, keypair: Keypair) -> Path:
    path.write_text(json.dumps(list(bytes(keypair))))
    path.chmod(0o600)
    return path


def test_an_owner_changes_and_ends_a_run(
    ledger: Ledger, create: Callable[..., str], another: Callable[[str], Path], wallet: Path
) -> None:
    run = create("limits.init_min_members=4")
    paid = (run, "--payer", wallet, "--rpc", ledger.rpc)
    show = ("run", "show", run, "--rpc", ledger.rpc)

    async def join_both() -> list[CoordinatorClient]:
        nodes = [await joined([ledger.rpc], Pubkey.from_string(run)) for _ in range(2)]
        await close(*nodes)
        return nodes

    asyncio.run(asyncio.wait_for(join_both(), 300))
    members = admin_json(*show)["members"]

    # settings
    change = ("batch=16", "limits.max_members=5", "reward_rate=1000", "terms.peak_lr=0.5")
    set_ = ("run", "set", run, *change, "--payer", wallet, "--rpc", ledger.rpc)
    planned = admin_json(*set_, "--dry-run")
    assert admin_json(*show)["limits"]["batch"] == 8
    done = admin_json(*set_)
    assert done["lamports"] == planned["lamports"] == 5000
    # no round is open, so the limits hold at once
    assert "max_members: 5 -> 6, now" in admin("run", "set", run, "max_members=6", *set_[-4:])
    admin("run", "set", run, "max_members=5", *set_[-4:])
    assert done["changed"]["batch"] == [8, 16]
    assert done["checkpoint_round"] == 0, "the learning rate is changed at the checkpoint there is"
    assert done["changed"]["terms.peak_lr"] == [pytest.approx(1e-3), 0.5]
    shown = admin_json(*show)
    assert (shown["limits"]["batch"], shown["limits"]["max_members"]) == (16, 5)
    assert shown["rewards"]["lamports_per_million_tokens"] == 1000
    assert shown["terms"]["peak_lr"] == 0.5
    for wrong, message in (
        ("batsch=3", "batsch: there is no such key; did you mean limits.batch?"),
        ("peka_lr=1e-4", "peka_lr: there is no such key; did you mean terms.peak_lr?"),
        ("run_id=x", "run_id: a run keeps the name it has"),
        ("batch=1", "batch must be at least min_members"),
        ("terms.topk=0", "terms.topk"),
        ("reward_rate=-1", "reward_rate"),
        ("join_authority=nobody", "join_authority"),
        ("batch", "must look like"),
        ("limits=5", "limits=5 must name a setting"),
        ("terms=3", "terms=3 must name a setting"),
        ("batch=16", "nothing changes: the run has batch=16 already"),
        ("reward_rate=1000", "nothing changes"),
        ("terms.peak_lr=0.5", "nothing changes"),
        ("join_authority=anyone", "nothing changes"),
    ):
        assert message in admin("run", "set", run, wrong, "--payer", wallet, "--rpc", ledger.rpc, status=10)
    data = f"terms.data_manifest={'22' * 32}"
    assert "positions begin at 0 again" in admin("run", "set", run, data, *paid[1:], status=80)

    # pause, and what is not the owner's
    stranger = another("stranger")
    message = admin("run", "pause", run, "--payer", stranger, "--rpc", ledger.rpc, status=22)
    assert "NOT_OWNER" in message
    assert "NOT_OWNER" in admin("run", "pause", run, "--payer", stranger, "--rpc", ledger.rpc, "--dry-run", status=22)
    admin("run", "pause", *paid)
    assert admin_json(*show)["state"] == "PAUSED", "nothing is in flight, so it needs no node to bring it about"
    assert "ALREADY_REQUESTED" in admin("run", "pause", *paid, status=22)
    admin("run", "resume", *paid)
    assert "NOT_PAUSED" in admin("run", "resume", *paid, status=22)

    # members
    assert "--yes" in admin("run", "kick", run, "0", *paid[1:], status=80)
    assert admin_json("run", "kick", run, "0", *paid[1:], "--yes")["wallet"] == members[0]["wallet"]
    assert "no member 7" in admin("run", "kick", run, "7", *paid[1:], "--yes", status=10)
    node = members[1]["node_id"]
    assert node == peer_id(bytes.fromhex(members[1]["node_key"]))
    admin("run", "ban", run, node, *paid[1:], "--yes")
    shown = admin_json(*show)
    assert [one["status"] for one in shown["members"]] == ["EJECTED", "EJECTED"]
    assert shown["banned"] == [str(Pubkey.from_bytes(bytes.fromhex(members[1]["node_key"])))]
    assert "ALREADY_BANNED" in admin("run", "ban", run, members[1]["node_key"], *paid[1:], "--yes", status=22)
    admin("run", "ban", run, node, "--lift", *paid[1:])
    assert admin_json(*show)["banned"] == []
    assert "is not an address" in admin("run", "ban", run, "12D3KooWxyz", *paid[1:], "--yes", status=10)

    assert "12D3KooW" in admin("run", "ban", run, "nobody", *paid[1:], "--yes", status=10)

    # the end
    assert "NOT_FINISHED" in admin("run", "close", *paid, status=22), "nobody is asked about what would be refused"
    admin("run", "fund", run, "1.5", "--payer", stranger, "--rpc", ledger.rpc, "--yes")
    assert "REFUSED" not in admin("run", "close", *paid, "--dry-run", status=22)
    assert "ends for good" in admin("run", "finish", *paid, status=80)
    admin("run", "finish", *paid, "--yes")
    assert admin_json(*show)["state"] == "FINISHED"
    assert "RUN_FINISHED" in admin("run", "tick", run, "--payer", stranger, "--rpc", ledger.rpc, status=22)
    assert "`run export` keeps a record" in admin("run", "close", *paid, status=80)
    admin("run", "set", run, f"join_authority={load_keypair(stranger).pubkey()}", *paid[1:], status=22)
    record = wallet.with_name("record.jsonl")
    admin("run", "export", run, "--out", record, "--wallet", stranger, "--rpc", ledger.rpc)
    closed = admin_json("run", "close", *paid, "--yes")
    assert closed["lamports"] < -2 * SOL, "deposits and what was funded come back to the owner"
    assert "no account" in admin(*show, status=26)
    assert "1 events have happened since" in admin("run", "verify", record, "--rpc", ledger.rpc)

    # another run of the same name has the same address, and a history of its own
    assert create("limits.init_min_members=4") == run
    again = wallet.with_name("again.jsonl")
    exported = admin_json("run", "export", run, "--out", again, "--wallet", stranger, "--rpc", ledger.rpc)
    assert (exported["events"], exported["complete"]) == (1, True)
    for path, since in ((record, 2), (again, 0)):
        assert admin_json("run", "verify", path, "--rpc", ledger.rpc)["events_since"] == since


def test_a_join_authority_lets_in_whom_it_wants(
    ledger: Ledger,
    program: tuple[Keypair, Pubkey],
    create: Callable[..., str],
    another: Callable[[str], Path],
    wallet: Path,
) -> None:
    authority, grantee, other = another("authority"), another("grantee"), another("other")
    keys = [load_keypair(path).pubkey() for path in (authority, grantee, other)]
    run = create(f"join_authority={keys[0]}")
    rpc = ("--rpc", ledger.rpc)
    listed = ("auth", "list", run, *rpc)
    assert admin_json(*listed) == {"join_authority": str(keys[0]), "grants": []}

    def join(path: Path, grant: str | None) -> None:
        async def act(client: CoordinatorClient) -> None:
            node = Keypair()
            made = ix.join(
                client.addresses,
                client.program_id,
                load_keypair(path).pubkey(),
                node.pubkey(),
                grant=None if grant is None else Pubkey.from_string(grant),
            )
            await client.send(made, extra_signers=(node,))

        do(ledger, run, path, act)

    assert "NOT_AUTHORITY" in admin("auth", "grant", run, grantee, "--payer", other, *rpc, status=22)
    granted = admin_json("auth", "grant", run, grantee, "--payer", authority, *rpc)
    assert "may join already" in admin("auth", "grant", run, grantee, "--payer", authority, *rpc, status=10)
    admin("auth", "delegate", run, other, "--payer", grantee, *rpc)
    assert "ALREADY_A_DELEGATE" in admin("auth", "delegate", run, other, "--payer", grantee, *rpc, status=22)
    (found,) = admin_json(*listed)["grants"]
    assert (found["address"], found["grantee"], found["delegates"]) == (granted["grant"], str(keys[1]), [str(keys[2])])
    assert found["in_force"] is True
    text = admin(*listed)
    assert str(keys[1]) in text
    assert str(keys[2]) in text
    join(other, granted["grant"])
    admin("auth", "delegate", run, other, "--remove", "--payer", grantee, *rpc)
    assert admin_json(*listed)["grants"][0]["delegates"] == []

    options = ("--payer", authority, *rpc)
    assert "1 members are put out" in admin("auth", "revoke", run, grantee, "--eject", *options, status=80)
    revoked = admin_json("auth", "revoke", run, grantee, "--eject", "--yes", *options)
    assert revoked["ejected"] == 1
    assert revoked["lamports"] == 5000 - granted["lamports"] + 5000, "the deposit comes back"
    (member,) = admin_json("run", "show", run, *rpc)["members"]
    assert member["status"] == "EJECTED"
    everybody = admin_json("auth", "grant", run, "--anyone", *options)
    assert "anyone" in admin(*listed)
    join(other, everybody["grant"])
    assert "NOT_CLOSED" in admin("run", "reclaim", run, "--program", program[1], *options, status=22)
    admin("auth", "revoke", run, "--anyone", *options)
    assert "has granted anyone nothing" in admin("auth", "revoke", run, "--anyone", *options, status=10)
    assert "no grant or receipt" in admin("run", "reclaim", run, "--program", program[1], *options, status=10)
    admin("auth", "grant", run, *options, status=2)
    admin("run", "set", run, "join_authority=anyone", "--payer", wallet, *rpc)
    assert "anyone may join" in admin(*listed)
    assert "no join authority" in admin("auth", "delegate", run, other, "--payer", grantee, *rpc, status=10)


def test_members_claim_share_archive_and_restore(
    ledger: Ledger, create: Callable[..., str], wallet: Path, tmp_path: Path
) -> None:
    # The two that stay have two thirds of the data, so that a round without the third one goes on.
    run = create("limits.batch=9")
    rpc = ("--rpc", ledger.rpc)
    admin("run", "set", run, "reward_rate=10000000000", "--payer", wallet, *rpc)

    async def play() -> list[Keypair]:
        nodes = [await joined([ledger.rpc], Pubkey.from_string(run)) for _ in range(3)]
        await asyncio.gather(*(take_part(node, until_round=2) for node in nodes))
        await close(*nodes)
        return [node.wallet for node in nodes if node.wallet is not None]

    wallets = asyncio.run(asyncio.wait_for(play(), 300))
    paths = [key_file(tmp_path / f"member-{slot}.json", one) for slot, one in enumerate(wallets)]
    members = {one["wallet"]: one for one in admin_json("run", "show", run, *rpc)["members"]}
    first = members[str(wallets[0].pubkey())]
    own = (run, "--payer", paths[0], *rpc)
    assert first["reward"] == first["credit"] * 10_000

    assert "REWARDS_UNFUNDED" in admin("member", "claim", *own, status=22)
    admin("run", "fund", run, "1", "--payer", wallet, *rpc, "--yes")
    assert admin_json("member", "claim", *own)["lamports"] == 5000 - first["reward"]
    assert "nothing to claim" in admin("member", "claim", *own, status=10)

    admin("member", "share", run, "500", "--payer", paths[0], *rpc)
    admin("member", "leave", run, "--payer", paths[2], *rpc)
    archive = ("member", "archive", run, str(members[str(wallets[2].pubkey())]["slot"]), "--payer", wallet, *rpc)

    assert "SLOT_IN_USE" in admin(*archive, status=22)
    paused = ("run", "pause", run, "--payer", wallet, *rpc)
    admin(*paused)

    async def pause(client: CoordinatorClient) -> None:
        nodes = [await CoordinatorClient.open([ledger.rpc], run, one) for one in wallets[:2]]
        done = set[tuple[str, int]]()
        async for pulse in client.watch():
            if pulse.run.phase is Phase.PAUSED:
                break
            await play_on(nodes, pulse.run.round, pulse.run.phase, done)
            if pulse.header.due(pulse.slot):
                await client.tick()
        await close(*nodes)

    do(ledger, run, wallet, pause)
    gone = admin_json("run", "show", run, *rpc)
    (credit,) = [one["credit"] for one in gone["members"] if one["wallet"] == str(wallets[2].pubkey())]
    assert admin_json(*archive)["credit"] == credit > 0
    shown = admin_json("run", "show", run, *rpc)
    assert shown["credit"]["archived"] == credit
    assert shown["credit"]["total"] == shown["tokens"] == gone["credit"]["total"]
    assert "empty already" in admin(*archive, status=10)

    def export(name: str) -> None:
        record = tmp_path / f"{name}.jsonl"
        admin("run", "export", run, "--out", record, "--wallet", wallet, *rpc)
        assert "the chain says the same" in admin("run", "verify", record, *rpc)

    export("archived")
    restore = ("member", "restore", run, "--payer", paths[2], *rpc)
    assert "NOT_A_MEMBER" in admin(*restore, status=22)
    claimed = admin_json("member", "claim", run, "--payer", paths[2], *rpc)
    assert claimed["owed"] == credit * 10_000, "from the receipt"

    async def rejoin(client: CoordinatorClient) -> None:
        await client.join(Keypair())

    do(ledger, run, paths[2], rejoin)
    restored = admin_json(*restore)
    assert (restored["receipts"], restored["credit"]) == (1, credit)
    assert restored["lamports"] == 5000, "the deposit goes back to who paid it"
    assert admin_json("run", "show", run, *rpc)["credit"]["archived"] == 0
    assert "no receipts" in admin(*restore, status=10)
    export("restored")
    # the same model again, then other data: positions go on, and begin again
    for number, change in enumerate(("terms.peak_lr=0.5", f"terms.data_manifest={'22' * 32}")):
        admin("run", "set", run, change, "--payer", wallet, *rpc, "--yes")
        export(f"changed-{number}")


async def play_on(nodes: list[CoordinatorClient], round: int, phase: Phase, done: set[tuple[str, int]]) -> None:
    """Members' part of a step, once."""
    for node in nodes:
        assert node.wallet is not None
        me = next(one for one in await node.members() if one.wallet == node.wallet.pubkey())
        if me.status is not MemberStatus.ACTIVE:
            continue
        if phase is Phase.ROUND_TRAIN and (f"commit {me.slot}", round) not in done:
            done.add((f"commit {me.slot}", round))
            entry = next(one for one in await node.rounds() if one.round == round)
            if me.slot in entry.expected and me.slot not in entry.commitments:
                await node.commit(round, bytes(32), TERMS.update_bytes, 5, 7)
        for entry in await node.rounds():
            if entry.closed and not entry.final and (f"attest {me.slot}", entry.round) not in done:
                done.add((f"attest {me.slot}", entry.round))
                if me.slot in entry.witnesses and entry.witnesses.index(me.slot) not in entry.attestations:
                    await node.attest(entry.round, entry.commitments)
        if phase is Phase.COOLDOWN and (f"checkpoint {me.slot}", round) not in done:
            done.add((f"checkpoint {me.slot}", round))
            await node.checkpoint((await node.pulse()).run.final_rounds, b"\5" * 32)


def test_a_live_run_moves_to_the_next_version(ledger: Ledger, wallet: Path, root_vectors: Path) -> None:
    """Deployed and created by version 1; upgraded and migrated by `psyche-admin`."""
    rpc = ("--rpc", ledger.rpc)
    paid = ("--payer", wallet, *rpc)
    program = admin_json("program", "deploy", root_vectors / "coordinator-v1.so", *paid)["program"]
    program_id, owner = Pubkey.from_string(program), load_keypair(wallet)
    run = run_addresses(program_id, owner.pubkey(), "old").run

    async def make(client: CoordinatorClient) -> None:
        await client.load_rent()
        *accounts, init = ix.create_run_instructions(
            program_id, owner.pubkey(), "old", LIMITS, TERMS, client.rent_exempt
        )
        # Version 1 knew no join authority.
        await client.send(*accounts, Instruction(init.program_id, init.data[: -32 - layout.COURSE.size], init.accounts))

    async def connect() -> None:
        async with CoordinatorClient([ledger.rpc], program_id, None, owner) as client:
            await make(client)

    asyncio.run(connect())
    assert "layout version 1" in admin("run", "show", run, *rpc, status=26)
    assert "UNKNOWN_INSTRUCTION" in admin("run", "migrate", run, *paid, "--yes", status=22)
    admin("program", "upgrade", program, *paid, "--yes")
    planned = admin_json("run", "migrate", run, *paid, "--dry-run")
    assert planned["lamports"] == 5000
    assert "cannot read them" in admin("run", "migrate", run, *paid, status=80)
    assert "layout version 1" in admin("run", "show", run, *rpc, status=26)
    admin("run", "migrate", run, *paid, "--yes")
    shown = admin_json("run", "show", run, *rpc)
    assert (shown["run_id"], shown["state"], shown["terms"]["samples"]) == ("old", "WAITING_FOR_MEMBERS", TERMS.samples)
    assert "no run at" in admin("run", "migrate", owner.pubkey(), *paid, status=26)


def test_limits_hold_at_once_unless_a_round_is_open(run: dict[str, Any], ledger: Ledger) -> None:
    async def read() -> Run:
        async with await CoordinatorClient.open([ledger.rpc], run["address"]) as client:
            return (await client.pulse()).run

    now = asyncio.run(read())
    for phase in Phase:
        (text,) = change_of(replace(now, phase=phase, next_limits=None), ["batch=7"]).text(replace(now, phase=phase))
        open_ = phase in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS)
        assert text == f"batch: 8 -> 7, {'from the next round on' if open_ else 'now'}"
