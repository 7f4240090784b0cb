"""A funded owner and a run that nodes have taken part in."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from admin_harness import CONFIG, admin, admin_json
from ledger_process import Ledger
from runs import close, joined, take_part
from solders.keypair import Keypair
from solders.pubkey import Pubkey


@pytest.fixture
def wallet(tmp_path: Path, ledger: Ledger) -> Path:
    path = tmp_path / "owner.json"
    admin("keys", "new", path)
    admin("ledger", "airdrop", path, "50", "--rpc", ledger.rpc)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def run(ledger: Ledger, program: tuple[Keypair, Pubkey], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that has come to round 2, of an owner of its own, to be looked at only."""
    folder = tmp_path_factory.mktemp("run")
    owner, settings = folder / "owner.json", folder / "run.toml"
    settings.write_text(CONFIG)
    admin("keys", "new", owner)
    admin("ledger", "airdrop", owner, "50", "--rpc", ledger.rpc)
    created: dict[str, Any] = admin_json(
        "run", "create", "--payer", owner, "--program", program[1], "--config", settings, "--rpc", ledger.rpc
    )

    async def play() -> None:
        nodes = [await joined([ledger.rpc], Pubkey.from_string(created["address"])) for _ in range(2)]
        await asyncio.gather(*(take_part(node, until_round=2) for node in nodes))
        await close(*nodes)

    asyncio.run(asyncio.wait_for(play(), 300))
    return created


@pytest.fixture
def root_vectors() -> Path:
    """Checked-in files that several packages are tested against."""
    return Path(__file__).resolve().parents[2] / "vectors"
