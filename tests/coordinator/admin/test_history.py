"""Records and endpoints that have forgotten something, or whose history others write into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from admin_harness import admin, admin_json
from ledger_process import Ledger
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.admin import records
from coordinator.rpc import Endpoints

Alter = Callable[[str, list[Any], Any], Any]


@pytest.fixture
def altered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Alter], None]:
    """Makes all endpoints answer as `alter(method, params, answer)` says."""
    honest = Endpoints.call

    def use(alter: Alter) -> None:
        async def call(self: Endpoints, method: str, params: Any = (), **options: Any) -> Any:
            return alter(method, list(params), await honest(self, method, params, **options))

        monkeypatch.setattr(Endpoints, "call", call)

    return use


class Run:
    """A run that waits for members, whose owner has changed its batch twice; `funded` and `changed` are the
    transactions of a transfer to it in between, and of the last change."""

    def __init__(self, ledger: Ledger, program: Pubkey, wallet: Path, config: Path) -> None:
        self.rpc, self.wallet = ("--rpc", ledger.rpc), wallet
        paid = ("--payer", wallet, *self.rpc)
        made = ("run", "create", "--program", program, "--config", config)
        self.address = admin_json(*made, *paid)["address"]
        self.act = lambda *words: admin_json("run", words[0], self.address, *words[1:], *paid)["signature"]
        self.act("set", "batch=16")
        self.funded = self.act("fund", "0.1", "--yes")
        self.changed = self.act("set", "batch=24")

    def export(self, out: Path, *more: str, status: int = 0) -> str:
        return admin(
            "run", "export", self.address, "--out", out, "--wallet", self.wallet, *self.rpc, *more, status=status
        )

    def verify(self, record: Path, status: int = 0) -> str:
        return admin("run", "verify", record, *self.rpc, status=status)


@pytest.fixture
def run(ledger: Ledger, program: tuple[Keypair, Pubkey], wallet: Path, config: Path) -> Run:
    return Run(ledger, program[1], wallet, config)


def cut_log(signature: str, **changes: Any) -> Alter:
    def alter(method: str, params: list[Any], answer: Any) -> Any:
        if method == "getTransaction" and params[0] == signature:
            answer["meta"] |= {"logMessages": [*answer["meta"]["logMessages"][:1], "Log truncated"]} | changes
        return answer

    return alter


def test_a_log_that_is_cut_off_matters_only_where_the_program_was_called(
    run: Run, altered: Callable[[Alter], None], tmp_path: Path
) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    altered(cut_log(run.funded))
    run.export(whole)
    assert "the chain says the same; 0 events" in run.verify(whole)

    altered(cut_log(run.changed))
    message = run.export(part, status=83)
    assert "cut off" in message
    assert "--partial" in message
    assert "cut off" in run.verify(whole, status=83)
    assert "not from the beginning" in run.export(part, "--partial")
    assert not [line for line in part.read_text().splitlines() if '"kind":"event"' in line]
    altered(cut_log(run.changed, innerInstructions=None))
    run.export(tmp_path / "again.jsonl", status=83)

    run.act("set", "batch=32")
    later = tmp_path / "later.jsonl"
    run.export(later, "--partial")
    assert [line for line in later.read_text().splitlines() if '"kind":"event"' in line]
    assert "the chain says the same; 0 events" in run.verify(later)

    def unlike_solana(method: str, params: list[Any], answer: Any) -> Any:
        if method == "getTransaction":
            answer["transaction"], answer["meta"]["logMessages"] = ["AAAA", "base64"], None
        return answer

    altered(unlike_solana)
    assert "Solana's shape" in run.export(tmp_path / "none.jsonl", status=20)


def test_an_endpoint_that_has_forgotten_cannot_say_that_a_record_is_wrong(
    run: Run, altered: Callable[[Alter], None], tmp_path: Path
) -> None:
    record = tmp_path / "run.jsonl"
    run.export(record)

    def only(kept: int) -> Alter:
        return lambda method, _, answer: answer[:kept] if method == "getSignaturesForAddress" else answer

    for kept in (0, 1, 2):
        altered(only(kept))
        assert "reaches back so far" in run.verify(record, status=83)
    altered(lambda method, _, answer: None if method == "getTransaction" else answer)
    assert "no longer has transaction" in run.verify(record, status=83)
    altered(lambda _, __, answer: answer)
    assert "0 events" in run.verify(record)


def test_a_run_that_goes_on_while_its_record_is_compared(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = tmp_path / "run.jsonl"
    run.export(record)
    honest = records.read_past

    async def after_a_change(client: Any, *, partial: bool) -> Any:
        past = await honest(client, partial=partial)
        assert len(past.events) == 4, "RunCreated and three changes"
        return past

    first = records.signatures_of

    async def before_a_change(*arguments: Any) -> Any:
        found = await first(*arguments)
        return found[:-1]  # what the endpoint had a moment ago

    run.act("set", "batch=32")
    monkeypatch.setattr(records, "signatures_of", before_a_change)
    monkeypatch.setattr(records, "read_past", after_a_change)
    assert "the chain says the same; 1 events have happened since" in run.verify(record)
