"""`psyche-admin program`: deployed, upgraded with a confirmation, and verified by its hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from admin_harness import admin, admin_json
from ledger_process import Ledger
from solders.keypair import Keypair

from coordinator.program import program_bytes
from coordinator.wallet import load_keypair


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another program that the loader takes: the same, with bytes behind its end, and larger."""
    path = tmp_path / "other.so"
    path.write_bytes(program_bytes() + b"\1" * 4000)
    return path


def test_it_is_deployed_verified_and_upgraded(ledger: Ledger, wallet: Path, other: Path, tmp_path: Path) -> None:
    rpc = ("--rpc", ledger.rpc)
    paid = ("--payer", wallet, *rpc)
    planned = admin_json("program", "deploy", *paid, "--dry-run")
    assert not wallet.with_name("owner.program.json").exists(), "a dry run makes no key"
    first = admin_json("program", "deploy", *paid)
    key = wallet.with_name("owner.program.json")
    address, owner = first["program"], str(load_keypair(wallet).pubkey())
    assert address == str(load_keypair(key).pubkey())
    assert first["lamports"] == planned["lamports"] == planned["deposit"] + planned["fees"]
    assert admin_json("program", "deploy", *paid, "--program-keypair", key)["lamports"] == 0
    assert admin_json("program", "deploy", *paid, "--dry-run")["lamports"] == 0

    verified = admin_json("program", "verify", address, *rpc)
    assert verified["same"] is True
    assert verified["upgrade_authority"] == owner
    assert verified["sha256"] == hashlib.sha256(program_bytes().rstrip(b"\0")).hexdigest()
    assert owner in admin("program", "verify", key, *rpc)
    assert "not the one built here" in admin("program", "verify", address, other, *rpc, status=81)

    assert "program upgrade" in admin("program", "deploy", other, *paid, status=81)
    assert "--yes" in admin("program", "upgrade", address, other, *paid, status=80)
    assert admin_json("program", "verify", address, *rpc)["same"] is True
    planned = admin_json("program", "upgrade", address, other, *paid, "--dry-run")
    assert admin_json("program", "verify", address, *rpc)["same"] is True
    done = admin_json("program", "upgrade", address, other, *paid, "--yes")
    assert done["lamports"] == planned["lamports"]
    assert admin_json("program", "verify", address, other, *rpc)["same"] is True
    assert admin_json("program", "verify", address, *rpc, status=81)["same"] is False

    stranger = tmp_path / "stranger.json"
    admin("keys", "new", stranger)
    admin("ledger", "airdrop", stranger, *rpc)
    for more in (("--yes",), ("--dry-run",)):
        message = admin("program", "upgrade", address, "--payer", stranger, *rpc, *more, status=81)
        assert f"only be upgraded by {owner}" in message


def test_what_cannot_be_deployed(ledger: Ledger, wallet: Path, tmp_path: Path) -> None:
    paid = ("--payer", wallet, "--rpc", ledger.rpc)
    assert "cannot be read" in admin("program", "deploy", "/none.so", *paid, status=13)
    text = tmp_path / "text.so"
    text.write_text("#!/bin/sh")
    assert "not a Solana program" in admin("program", "deploy", text, *paid, status=10)
    assert not wallet.with_name("owner.program.json").exists(), "no key is made for it"
    assert "not a Solana program" in admin("program", "verify", Keypair().pubkey(), text, *paid[2:], status=10)
    poor = tmp_path / "poor.json"
    admin("keys", "new", poor)
    admin("ledger", "airdrop", poor, "0.01", "--rpc", ledger.rpc)
    assert "has 0.01 SOL" in admin("program", "deploy", "--payer", poor, "--rpc", ledger.rpc, "--dry-run", status=21)
    nowhere = load_keypair(poor).pubkey()
    assert "is no program, but an account of" in admin("program", "verify", nowhere, "--rpc", ledger.rpc, status=81)


def test_a_confirmation_is_asked_for_at_a_terminal(
    ledger: Ledger, wallet: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coordinator.admin import output
    from coordinator.admin.failures import NotConfirmed

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answers = iter([False, True])
    monkeypatch.setattr(output.typer, "confirm", lambda *_, **__: next(answers))
    with pytest.raises(NotConfirmed, match="nothing was sent"):
        output.confirm("It is lost.", yes=False)
    output.confirm("It is lost.", yes=False)
    output.confirm("It is lost.", yes=True)


@pytest.mark.parametrize("more", [(), ("--legacy",)])
def test_an_idl_in_one_line(more: tuple[str, ...]) -> None:
    program = Keypair().pubkey()
    text = admin("program", "idl", program, *more, "--json")
    assert text.count("\n") == 1
    assert json.loads(text) == json.loads(admin("program", "idl", program, *more))
    assert str(program) in text
