"""Deploying the real program through the upgradeable loader."""

from __future__ import annotations

import asyncio

import pytest
from ledger_process import SOL, Ledger
from runs import LIMITS, TERMS
from solders.keypair import Keypair

from coordinator.chain import Chain
from coordinator.client import ChainError, ChainUnavailable, CoordinatorClient
from coordinator.deploy import LOADER, DeployError, deploy, program_data_address
from coordinator.program import program_bytes
from coordinator.run_config import ConfigError


def test_it_is_deployed_left_alone_and_upgraded(ledger: Ledger) -> None:
    async def run() -> None:
        owner, program = Keypair(), Keypair()
        so = program_bytes()
        async with CoordinatorClient([ledger.rpc], program.pubkey(), None, owner) as client:
            await client.airdrop(owner.pubkey(), 100 * SOL)
            assert await deploy(client, owner, program, so) == program.pubkey()
            await client.create_run("before", LIMITS, TERMS)
            account = await client.account(program.pubkey())
            assert account is not None
            assert (account.owner, account.executable) == (LOADER, True)
            balance = await client.balance(owner.pubkey())
            await deploy(client, owner, program, so)
            assert await client.balance(owner.pubkey()) == balance, "the same bytes cost nothing"
            # Bytes after the program's own are ignored by the VM: a larger program that works the same.
            larger = so + b"\0" * 900 + b"\1"
            await deploy(client, owner, program, larger)
            stored = await client.account(program_data_address(program.pubkey()))
            assert stored is not None
            assert stored.data[45 : 45 + len(larger)] == larger
            await client.create_run("after", LIMITS, TERMS)
            await deploy(client, owner, program, so)
            stored = await client.account(program_data_address(program.pubkey()))
            assert stored is not None
            assert not any(stored.data[45 + len(so) :])

    asyncio.run(asyncio.wait_for(run(), 300))


def test_only_the_authority_upgrades(ledger: Ledger) -> None:
    async def run() -> None:
        owner, other, program = Keypair(), Keypair(), Keypair()
        async with Chain([ledger.rpc]) as chain:
            for wallet in (owner, other):
                await chain.airdrop(wallet.pubkey(), 10 * SOL)
            await deploy(chain, owner, program, program_bytes())
            with pytest.raises(DeployError, match=str(owner.pubkey())):
                await deploy(chain, other, program, program_bytes() + b"\1")
            assert await chain.balance(other.pubkey()) == 10 * SOL

    asyncio.run(asyncio.wait_for(run(), 300))


def test_an_address_in_use_and_files_that_are_no_programs_are_refused(ledger: Ledger) -> None:
    async def run() -> None:
        owner = Keypair()
        async with Chain([ledger.rpc]) as chain:
            await chain.airdrop(owner.pubkey(), 10 * SOL)
            with pytest.raises(DeployError, match="is no program, but an account of"):
                await deploy(chain, owner, owner, program_bytes())
            with pytest.raises(ConfigError, match="not a Solana program"):
                await deploy(chain, owner, Keypair(), b"#!/bin/sh")
            assert await chain.balance(owner.pubkey()) == 10 * SOL

    asyncio.run(run())


def test_the_deposit_comes_back_when_the_loader_refuses(ledger: Ledger) -> None:
    async def run() -> None:
        owner, program = Keypair(), Keypair()
        async with Chain([ledger.rpc]) as chain:
            await chain.airdrop(owner.pubkey(), 10 * SOL)
            with pytest.raises(ChainError):
                await deploy(chain, owner, program, b"\x7fELF" + bytes(20_000))
            assert await chain.account(program.pubkey()) is None
            await chain.load_rent()
            lost = 10 * SOL - await chain.balance(owner.pubkey())
            assert lost < chain.rent_exempt(20_000) // 100, "fees only"

    asyncio.run(asyncio.wait_for(run(), 300))


def test_a_chain_that_stands_still_after_a_deployment(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    async def still(self: Chain) -> int:
        return 7

    async def run() -> None:
        owner = Keypair()
        async with Chain([ledger.rpc]) as chain:
            await chain.airdrop(owner.pubkey(), 10 * SOL)
            monkeypatch.setattr(Chain, "slot", still)
            monkeypatch.setattr("coordinator.deploy._VISIBLE_SECONDS", 0.2)
            with pytest.raises(ChainUnavailable, match="stand still"):
                await deploy(chain, owner, Keypair(), program_bytes())

    asyncio.run(run())
