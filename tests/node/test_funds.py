"""A node's wallet is looked at before a model is loaded: what is lacking, and how to get it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from solders.pubkey import Pubkey

from coordinator.funds import Unfunded, sol
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


LIMITS = SimpleNamespace(total_rounds=1000, rounds_per_epoch=100, init_min_members=4, witnesses=0)
RUN: Any = SimpleNamespace(round=10, limits=LIMITS, member_count=2)
DEPOSIT = 890_880


def check(lamports: int, url: str = "http://127.0.0.1:8899") -> None:
    asyncio.run(check_funds(Chain(lamports, url), RUN, WALLET, "auto"))  # type: ignore[arg-type]


def test_a_member_pays_its_even_part_of_what_a_run_costs() -> None:
    """A whole run of this kind was counted: docs/two-daemons.md, two members, 20 rounds, two epochs; 139 signatures."""
    assert 2 * member_fees(2, 20, 10) == 670_000 == pytest.approx(139 * 5000, rel=0.05)
    assert member_fees(64, 1000, 100, witnesses=8) < member_fees(64, 1000, 100) < member_fees(2, 1000, 100)


def test_an_empty_wallet_ends_the_node_with_the_amount_the_address_and_the_command() -> None:
    with pytest.raises(Unfunded) as raised:
        check(0)
    fees = member_fees(4, 990, 100)
    said = (
        f"wallet {WALLET} has 0 SOL, and being a member for the 990 rounds of this run (about {sol(fees)} SOL in fees"
    )
    assert said in str(raised.value)
    assert f"takes {sol(fees + DEPOSIT)} SOL: send it {sol(fees + DEPOSIT)} SOL" in str(raised.value)
    assert f"psyche-admin ledger airdrop {WALLET} 1 --rpc http://127.0.0.1:8899" in str(raised.value)
    assert exit_for(raised.value) is Exit.TRANSACTION_FAILED


def test_where_funds_are_worth_something_nobody_gives_them_away() -> None:
    with pytest.raises(Unfunded, match=r"send it 0\.0\d+ SOL$"):
        check(0, "https://api.mainnet-beta.solana.com")
    with pytest.raises(Unfunded, match="airdrop"):
        check(0, "https://api.devnet.solana.com")


def test_a_wallet_that_will_be_empty_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    whole = member_fees(4, 990, 100) + DEPOSIT
    check(whole)
    assert not caplog.records
    check(whole - 1)
    assert f"990 rounds that are left take {sol(whole)} SOL" in caplog.text
