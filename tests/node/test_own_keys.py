"""A node that makes keys says so: the folder that lacks them may be a slip of whoever typed it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from coordinator.wallet import WalletError, load_keypair
from psyche_node.node.config import NodeConfig
from psyche_node.node.folder import held
from psyche_node.node.keys import own_keys


def config_of(folder: Path, **settings: object) -> NodeConfig:
    return NodeConfig(run="1" * 32, rpc=("http://127.0.0.1:1",), folder=folder, model=folder, data=folder, **settings)


def said(folder: Path, caplog: pytest.LogCaptureFixture, **settings: object) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO), held(folder):
        own_keys(config_of(folder, **settings))
    return [record.getMessage() for record in caplog.records]


def test_a_new_folder_is_told_with_its_wallet_and_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "typo"
    wallet, key = said(folder, caplog)
    address = load_keypair(folder / "wallet.json").pubkey()
    assert wallet.startswith(f"{folder} is a new folder: made a new wallet, {address}, in {folder / 'wallet.json'}")
    assert wallet.endswith("this is the wrong --folder: name the one that holds it, and remove this one")
    assert key.endswith(str(folder / "node.key"))
    assert said(folder, caplog) == [], "the second start finds both"


def test_a_folder_that_was_used_is_not_to_be_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "journal.jsonl").touch()
    wallet = said(tmp_path, caplog)[0]
    assert wallet.startswith(f"there was no wallet in {tmp_path}: made a new wallet")
    assert "remove" not in wallet


def test_a_wallet_that_is_named_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(WalletError, match=r"there is no wallet .*psyche-admin keys new"):
        own_keys(config_of(tmp_path, wallet=tmp_path / "none.json"))
    assert not (tmp_path / "none.json").exists()
