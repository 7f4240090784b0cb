"""A real `psyche-ledger` process, shared by the tests of this folder."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from ledger_process import Ledger, start_ledger
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.chain import Chain
from coordinator.deploy import deploy
from coordinator.program import program_bytes


def _running(slot_ms: int) -> Iterator[Ledger]:
    process = start_ledger("--port", "0", "--slot-ms", str(slot_ms))
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["slot_ms"] == slot_ms
        yield Ledger(ready["rpc"], ready["ws"], process)
        assert process.poll() is None, "the ledger ended during the tests"
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 0
    assert "Traceback" not in errors, errors


@pytest.fixture(scope="session")
def ledger() -> Iterator[Ledger]:
    """Slots of 20 ms: blockhashes last 3 s."""
    yield from _running(20)


@pytest.fixture(scope="session")
def fast_ledger() -> Iterator[Ledger]:
    """Slots of 2 ms: blockhashes expire after 0.3 s."""
    yield from _running(2)


@pytest.fixture(scope="session")
def program(ledger: Ledger) -> tuple[Keypair, Pubkey]:
    """The coordinator program, deployed for the whole session: its authority's funded wallet, and its address."""
    owner, key = Keypair(), Keypair()

    async def run() -> None:
        async with Chain([ledger.rpc], owner) as chain:
            await chain.airdrop(owner.pubkey(), 1000 * 10**9)
            await deploy(chain, owner, key, program_bytes())

    asyncio.run(run())
    return owner, key.pubkey()
