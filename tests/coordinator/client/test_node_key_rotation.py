"""A member goes on under a new node key: on a real ledger, by the node's own way to join."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from ledger_process import SOL, Ledger
from runs import LIMITS, TERMS, limits, take_part
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.client import CoordinatorClient
from coordinator.state import MemberStatus, Phase
from coordinator.wallet import load_or_create_keypair
from psyche_node.identity import load_or_create_node_key, rotate_node_key
from psyche_node.ipc import Message, Ok
from psyche_node.network.messages import Rejected, SetMembers, Why
from psyche_node.node.config import NodeConfig
from psyche_node.node.journal import Journal, JournalReader
from psyche_node.node.membership import Membership
from psyche_node.node.roster import Roster
from psyche_node.node.standing import JoinRefused, RunFinished
from psyche_node.node.view import ChainView

_names = itertools.count()
Program = tuple[Keypair, Pubkey]


class Network:
    """Where a node would reach its network process: the member lists that it is given."""

    def __init__(self) -> None:
        self.lists: list[dict[int, str]] = []
        self.endpoint = self

    async def call(self, message: Message, expect: type[Ok]) -> Ok:
        assert isinstance(message, SetMembers)
        self.lists.append({entry.slot: entry.node_key for entry in message.members})
        return Ok()


class Stage:
    """A node of a folder, with the real chain and nothing else behind it."""

    def __init__(self, folder: Path, rpc: str, run: Pubkey) -> None:
        config = NodeConfig(run=str(run), rpc=(rpc,), folder=folder, model=folder, data=folder)
        self.config, self.network = config, Network()
        folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(folder / "journal.jsonl")
        self.chain: CoordinatorClient
        self.view: ChainView
        self.roster: Roster
        self.membership: Membership

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Stage]:
        wallet = load_or_create_keypair(self.config.wallet_path)
        chain = await CoordinatorClient.open(self.config.rpc, self.config.run, wallet)
        if await chain.balance(wallet.pubkey()) < SOL // 2:
            await chain.airdrop(wallet.pubkey(), SOL)
        view = ChainView(chain)
        task = asyncio.create_task(view.follow())
        self.chain, self.view = chain, view
        run = (await view.until(lambda pulse: True)).run
        key = load_or_create_node_key(self.config.node_key_path)
        self.roster = Roster(chain, view, self.network, wallet.pubkey(), key)
        self.membership = Membership(chain, view, self.roster, self.journal, key, self.config.share, run)
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await chain.close()
            self.journal.close()

    async def join(self) -> int:
        return await self.membership.join()


@contextlib.asynccontextmanager
async def new_run(ledger: Ledger, program: Program, **changes: int) -> AsyncIterator[CoordinatorClient]:
    wallet, address = program
    async with CoordinatorClient([ledger.rpc], address, None, wallet) as owner:
        addresses = await owner.create_run(f"rotation-{next(_names)}", limits(**changes), TERMS)
    async with CoordinatorClient([ledger.rpc], address, addresses, wallet) as owner:
        yield owner


async def keys_of(owner: CoordinatorClient) -> dict[int, str]:
    return {member.slot: member.node_key.hex() for member in await owner.members()}


def test_a_member_goes_on_under_a_new_node_key(ledger: Ledger, program: Program, tmp_path: Path) -> None:
    async def run() -> None:
        async with new_run(ledger, program, init_min_members=4) as owner:
            address = owner.addresses.run
            other = Stage(tmp_path / "other", ledger.rpc, address)
            first = Stage(tmp_path / "node", ledger.rpc, address)
            async with other.running(), first.running():
                await other.join()
                slot = await first.join()
                await first.chain.set_share(77)
                following = [asyncio.create_task(stage.roster.follow()) for stage in (first, other)]
                before, after = rotate_node_key(first.config.node_key_path)
                assert before is not None
                async with asyncio.timeout(90):
                    while other.network.lists[-1:] != [await keys_of(owner)]:
                        await asyncio.sleep(0.01)

                second = Stage(tmp_path / "node", ledger.rpc, address)
                async with second.running():
                    assert await second.join() == slot
                    member = (await owner.members())[slot]
                    assert member.node_key == after.public
                    assert (member.status, member.next_share) == (MemberStatus.PENDING, 77)
                    assert len([m for m in await owner.members() if m.live]) == 2
                    # It starts as any member does that was there before.
                    assert await second.join() == slot

                # The table alone shows the new key. Whoever refuses it as a stranger's looks there.
                unknown = Rejected(
                    what="call", peer=after.node_id, member=None, reason="no member", why=Why.NOT_A_MEMBER
                )
                for stage in (first, other):
                    stage.roster.on_event(unknown)
                with pytest.raises(JoinRefused, match="goes on under another node key"):
                    await asyncio.wait_for(following[0], 300)
                async with asyncio.timeout(90):
                    while other.network.lists[-1] != await keys_of(owner):
                        await asyncio.sleep(0.01)
                assert other.network.lists[-1][slot] == after.public.hex()
                following[1].cancel()
                await asyncio.gather(*following, return_exceptions=True)
            rotated = JournalReader(tmp_path / "node" / "journal.jsonl").read()
            assert [(line["old"], line["new"]) for line in rotated if line["kind"] == "rotated"] == [
                (before.node_id, after.node_id)
            ]

    asyncio.run(asyncio.wait_for(run(), 300))


def test_a_key_rotates_while_the_run_trains_and_not_when_it_is_finished(
    ledger: Ledger, program: Program, tmp_path: Path
) -> None:
    async def run() -> None:
        async with new_run(ledger, program) as owner:
            stages = [Stage(tmp_path / name, ledger.rpc, owner.addresses.run) for name in "ab"]
            async with stages[0].running() as a, stages[1].running() as b:
                slots = [await a.join(), await b.join()]
                training = [asyncio.create_task(take_part(stage.chain)) for stage in stages]
                await a.view.until(lambda pulse: pulse.run.phase is Phase.ROUND_TRAIN)
                _, new = rotate_node_key(a.config.node_key_path)
                in_training = Stage(tmp_path / "a", ledger.rpc, owner.addresses.run)
                async with in_training.running():
                    assert await in_training.join() == slots[0]
                member = (await owner.members())[slots[0]]
                assert (member.node_key, member.status) == (new.public, MemberStatus.ACTIVE)
                await asyncio.gather(*training)
                members = await owner.members()
                assert members[slots[0]].credit > 0
                assert members[slots[0]].updates_included == LIMITS.total_rounds

                a.config.node_key_path.with_name("node.key.old").unlink()
                rotate_node_key(a.config.node_key_path)
                too_late = Stage(tmp_path / "a", ledger.rpc, owner.addresses.run)
                async with too_late.running():
                    with pytest.raises(RunFinished, match="a finished run takes no other key"):
                        await too_late.join()

    asyncio.run(asyncio.wait_for(run(), 300))


def test_a_rotated_key_keeps_the_old_one_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    assert rotate_node_key(path)[0] is None
    first = load_or_create_node_key(path)
    old, new = rotate_node_key(path)
    assert old == first
    assert load_or_create_node_key(path) == new != first
    assert load_or_create_node_key(tmp_path / "node.key.old") == first
    assert path.stat().st_mode & 0o777 == 0o600
