"""A node's wallet is looked at before a model is loaded: what is lacking, and how to get it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from solders.pubkey import Pubkey

from coordinator.funds import Unfunded
from coordinator.run_costs import member_fees
from psyche_node.exits import Exit, exit_for
from psyche_node.node.funds import check_funds

WALLET = Pubkey.from_bytes(bytes(range(32)))


class Chain:
    """One with a wallet of so many lamports, where an account's deposit is what it is on Solana."""

    def __init__(self, lamports: int, url: str) -> None:
        self.lamports = lamports
        self.rpc = SimpleNamespace(urls=(url,))

    async def balance(self, key: Pubkey) -> int:
        assert key == WALLET
        return self.lamports

    async def load_rent(self) -> None:
        pass

    def rent_exempt(self, size: int) -> int:
        return 890_880 + 6_960 * size


RUN: Any = SimpleNamespace(round=10, limits=SimpleNamespace(total_rounds=1000))


def check(lamports: int, url: str = "http://127.0.0.1:8899") -> None:
    asyncio.run(check_funds(Chain(lamports, url), RUN, WALLET, "auto"))  # type: ignore[arg-type]


def test_an_empty_wallet_ends_the_node_with_the_amount_the_address_and_the_command() -> None:
    with pytest.raises(Unfunded) as raised:
        check(0)
    assert f"wallet {WALLET} has 0 SOL, and joining a run (of which 0.00089088 SOL stay" in str(raised.value)
    assert f"psyche-admin ledger airdrop {WALLET} 1 --rpc http://127.0.0.1:8899" in str(raised.value)
    assert exit_for(raised.value) is Exit.TRANSACTION_FAILED


def test_where_funds_are_worth_something_nobody_gives_them_away() -> None:
    with pytest.raises(Unfunded, match=r"takes 0\.00091588 SOL: send it 0\.00091588 SOL$"):
        check(0, "https://api.mainnet-beta.solana.com")
    with pytest.raises(Unfunded, match="airdrop"):
        check(0, "https://api.devnet.solana.com")


def test_a_wallet_that_will_be_empty_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check(member_fees(990) + 890_880)
    assert not caplog.records
    check(member_fees(990) + 890_879)
    assert "990 rounds take about 0.01080588 SOL with its deposit" in caplog.text
