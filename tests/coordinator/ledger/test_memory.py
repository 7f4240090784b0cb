"""No client takes more memory than an answer or a queue may have, however large the accounts are that it asks for."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from solders.account import Account
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.ledger import endpoint  # noqa: F401  (it registers the methods)
from coordinator.ledger.bank import Bank
from coordinator.ledger.dispatch import MAX_RESPONSE_BYTES, Rpc

LARGE = 10 * 2**20
OWNER = Keypair().pubkey()


@pytest.fixture(scope="module")
def large() -> tuple[Bank, list[Pubkey]]:
    """A bank with nine accounts of the largest size: more than fits into an answer."""
    bank = Bank(bytes(32), 0)
    keys = [Keypair().pubkey() for _ in range(9)]
    for key in keys:
        bank._vm.set_account(key, Account(10**12, b"\x07" * LARGE, OWNER))
    return bank, keys


@pytest.fixture
def bounded() -> Iterator[None]:
    """What the test allocates in Python stays within a few copies of the largest answer."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * MAX_RESPONSE_BYTES


def ask(bank: Bank, method: str, *params: object) -> Any:
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    return json.loads(Rpc(bank).answer(json.dumps(body).encode()))


@pytest.mark.usefixtures("bounded")
def test_accounts_over_the_limit_are_refused_before_they_are_encoded(large: tuple[Bank, list[Pubkey]]) -> None:
    bank, keys = large
    whole = {"encoding": "base64"}
    for method, first in (
        ("getMultipleAccounts", [str(keys[0])] * 100),
        ("getMultipleAccounts", [str(key) for key in keys]),
        ("getProgramAccounts", str(OWNER)),
    ):
        error = ask(bank, method, first, whole)["error"]
        assert str(MAX_RESPONSE_BYTES) in error["message"]
        assert "dataSlice" in error["message"]


@pytest.mark.usefixtures("bounded")
def test_accounts_within_the_limit_and_slices_of_larger_ones_are_given(large: tuple[Bank, list[Pubkey]]) -> None:
    bank, keys = large
    some = ask(bank, "getMultipleAccounts", [str(key) for key in keys[:4]], {"encoding": "base64"})
    assert all(len(one["data"][0]) > LARGE for one in some["result"]["value"])
    for offset in (5, LARGE - 3, LARGE + 5):
        sliced = {"encoding": "base64", "dataSlice": {"offset": offset, "length": 3}}
        wanted = "BwcH" if offset < LARGE else ""
        found = ask(bank, "getMultipleAccounts", [str(keys[0])] * 100, sliced)
        assert [one["data"][0] for one in found["result"]["value"]] == [wanted] * 100
        assert [one["account"]["data"][0] for one in ask(bank, "getProgramAccounts", str(OWNER), sliced)["result"]] == [
            wanted
        ] * 9
