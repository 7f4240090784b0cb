"""A payment over endpoints under test, and what a ledger behind them says of it."""

from __future__ import annotations

from typing import Any

from ledger_process import SOL, Ledger
from solders.keypair import Keypair
from solders.system_program import TransferParams, transfer

from coordinator.chain import Chain


async def pays_once(ledger: Ledger, urls: list[str], **options: Any) -> None:
    """One SOL is sent over `urls`, and has left the payer and arrived once. `options` are the sending chain's."""
    payer, to = Keypair(), Keypair().pubkey()
    async with Chain([ledger.rpc]) as direct:
        await direct.airdrop(payer.pubkey(), 10 * SOL)
        async with Chain(urls, payer, **options) as chain:
            await chain.send(transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=to, lamports=SOL)))
        assert await direct.balance(to) == SOL
        assert await direct.balance(payer.pubkey()) == 9 * SOL - 5000
