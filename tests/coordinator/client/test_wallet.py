"""Wallet files: Solana's format, for their owner alone."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from solders.keypair import Keypair

from coordinator.wallet import WalletError, create_keypair, load_keypair, load_or_create_keypair


def test_a_wallet_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "wallet.json"
    made = load_or_create_keypair(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_keypair(path) == made == load_keypair(path)
    assert json.loads(path.read_text()) == list(bytes(made))
    assert [one.name for one in path.parent.iterdir()] == ["wallet.json"]


def test_a_wallet_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "wallet.json"
    made = create_keypair(path)
    with pytest.raises(WalletError, match="exists already"):
        create_keypair(path)
    assert load_keypair(path) == made


def test_processes_that_start_at_once_agree(tmp_path: Path) -> None:
    path = tmp_path / "wallet.json"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: bytes(load_or_create_keypair(path)), range(32)))
    assert len(set(found)) == 1


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o602])
def test_a_wallet_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "wallet.json"
    create_keypair(path)
    os.chmod(path, mode)
    with pytest.raises(WalletError, match="chmod 600"):
        load_keypair(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[1,2,3]",
        b"[" * 5000,
        b"[256]",
        json.dumps([1.5] * 64).encode(),
        json.dumps([*bytes(Keypair())[:32], *bytes(Keypair())[32:]]).encode(),
        b"\xff\xfe",
    ],
)
def test_what_is_no_wallet_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wallet.json"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(WalletError, match="not a Solana keypair"):
        load_keypair(path)


def test_a_missing_wallet_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WalletError, match="keys new"):
        load_keypair(tmp_path / "none.json")
    with pytest.raises(WalletError):
        load_keypair(tmp_path)
