"""`psyche-admin` against a real ledger, program and run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from ledger_process import SOL, Ledger
from runs import UPDATE_BYTES, close, joined, take_part
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from typer.testing import CliRunner

from coordinator.admin import app
from coordinator.base58 import peer_id
from coordinator.client import CoordinatorClient
from coordinator.wallet import load_keypair

HEX = "01" * 32
CONFIG = f"""
run_id = "from-a-file"
[limits]
init_min_members = 2
min_members = 2
max_members = 8
join_grace = 1
batch = 8
rounds_per_epoch = 4
total_rounds = 4
[terms]
model_root = "{HEX}"
layout_digest = "{HEX}"
data_manifest = "{HEX}"
samples = 100
sequence_length = 16
update_bytes = {UPDATE_BYTES}
peak_lr = 1e-3
schedule = "cosine"
model_source = "hub:demo/model"
"""


def admin(*arguments: str | Path, status: int = 0) -> str:
    """What a command prints; its errors where it is expected to fail."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.stderr if status else result.stdout


@pytest.fixture
def wallet(tmp_path: Path, ledger: Ledger) -> Path:
    path = tmp_path / "owner.json"
    admin("wallet", "new", path)
    admin("airdrop", path, "50", "--rpc", ledger.rpc)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run(ledger: Ledger, program: tuple[Keypair, Pubkey], wallet: Path, config: Path) -> dict[str, Any]:
    """A run that has come to round 2."""
    made = admin(
        "run",
        "create",
        "--payer",
        wallet,
        "--program",
        str(program[1]),
        "--config",
        config,
        "--rpc",
        ledger.rpc,
        "--json",
    )
    created: dict[str, Any] = json.loads(made)

    async def play() -> None:
        nodes = [await joined([ledger.rpc], Pubkey.from_string(created["address"])) for _ in range(2)]
        await asyncio.gather(*(take_part(node, until_round=2) for node in nodes))
        await close(*nodes)

    asyncio.run(asyncio.wait_for(play(), 60))
    return created


def test_wallets_are_made_shown_and_funded(ledger: Ledger, wallet: Path) -> None:
    address = str(load_keypair(wallet).pubkey())
    assert admin("wallet", "show", wallet).strip() == address
    assert json.loads(admin("wallet", "show", wallet, "--rpc", ledger.rpc, "--json")) == {
        "address": address,
        "lamports": 50 * SOL,
    }
    assert "51.5 SOL" in admin("airdrop", address, "1.5", "--rpc", ledger.rpc)
    assert "exists already" in admin("wallet", "new", wallet, status=1)
    wallet.chmod(0o644)
    assert "chmod 600" in admin("wallet", "show", wallet, status=1)


@pytest.mark.parametrize("amount", ["0", "-1", "x", "0.0000000001", "1e30", "NaN", "Infinity"])
def test_amounts_are_checked(ledger: Ledger, wallet: Path, amount: str) -> None:
    assert "SOL" in admin("airdrop", wallet, "--rpc", ledger.rpc, "--", amount, status=1)


def test_the_program_is_deployed_with_a_key_of_its_own(ledger: Ledger, wallet: Path) -> None:
    first = json.loads(admin("program", "deploy", "--payer", wallet, "--rpc", ledger.rpc, "--json"))
    key = wallet.with_name("owner.program.json")
    assert first["program"] == str(load_keypair(key).pubkey())
    assert first["lamports"] > 0
    again = json.loads(
        admin("program", "deploy", "--payer", wallet, "--rpc", ledger.rpc, "--program-keypair", key, "--json")
    )
    assert again == first | {"lamports": 0}
    assert "cannot be read" in admin("program", "deploy", "/none.so", "--payer", wallet, "--rpc", ledger.rpc, status=1)


def test_show_says_what_the_chain_says(ledger: Ledger, run: dict[str, Any]) -> None:
    shown = json.loads(admin("run", "show", run["address"], "--rpc", ledger.rpc, "--json"))

    async def read() -> None:
        async with await CoordinatorClient.open([ledger.rpc], run["address"]) as client:
            pulse, members, rounds = await client.pulse(), await client.members(), await client.rounds()
        assert shown["state"] == pulse.run.phase.name
        assert shown["round"] == pulse.run.round == 2
        assert shown["run_id"] == "from-a-file"
        assert shown["owner"] == run["owner"]
        assert [one["wallet"] for one in shown["members"]] == [str(member.wallet) for member in members]
        assert [one["node_id"] for one in shown["members"]] == [peer_id(member.node_key) for member in members]
        assert shown["credit"]["total"] == sum(member.credit for member in members) == pulse.run.tokens > 0
        assert [one["round"] for one in shown["rounds"]] == [entry.round for entry in rounds]
        first = shown["rounds"][0]
        assert [one["member"] for one in first["commitments"]] == [0, 1]
        assert first["commitments"][1]["digest"] == rounds[0].commitments[1].digest.hex() == "0100" * 16
        assert first["included"] == [0, 1]
        assert shown["inclusion_sets"][0] == {"round": 0, "members": [0, 1], "void": False}
        assert shown["terms"]["schedule"] == 2

    asyncio.run(read())
    text = admin("run", "show", run["address"], "--rpc", ledger.rpc)
    assert max(map(len, text.splitlines())) <= 100
    for word in ("from-a-file", run["address"], run["owner"], shown["state"], "hub:demo/model"):
        assert word in text
    for member in shown["members"]:
        assert member["wallet"] in text, "addresses are shown whole, to be copied"
        assert member["node_id"] in text
    assert shown["rounds"][0]["commitments"][0]["digest"][:16] in text


def test_a_run_is_found_by_its_name(
    ledger: Ledger, program: tuple[Keypair, Pubkey], run: dict[str, Any], wallet: Path, config: Path
) -> None:
    rpc = ("--rpc", ledger.rpc, "--json")
    by_owner = admin("run", "show", "from-a-file", "--owner", run["owner"], *rpc)
    assert json.loads(by_owner)["address"] == run["address"]
    direct = admin("run", "show", "from-a-file", "--owner", run["owner"], "--program", str(program[1]), *rpc)
    assert json.loads(direct)["address"] == run["address"]
    options = ("--payer", wallet, "--program", str(program[1]), "--config", config, "--rpc", ledger.rpc)
    admin("run", "create", "only-one", *options)
    assert json.loads(admin("run", "show", "only-one", *rpc))["run_id"] == "only-one"
    assert "already" in admin("run", "create", "only-one", *options, status=1)
    assert "no run is called 'none'" in admin("run", "show", "none", *rpc, status=1)
    assert "not a run" in admin("run", "show", run["owner"], *rpc, status=1)
    assert "neither an address nor" in admin("run", "show", "x" * 40, *rpc, status=1)


def test_runs_of_one_name_are_told_apart(
    ledger: Ledger, program: tuple[Keypair, Pubkey], tmp_path: Path, config: Path
) -> None:
    wallets = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in wallets:
        admin("wallet", "new", path)
        admin("airdrop", path, "--rpc", ledger.rpc)
        admin(
            "run", "create", "twin", "--payer", path, "--program", program[1], "--config", config, "--rpc", ledger.rpc
        )
    message = admin("run", "show", "twin", "--rpc", ledger.rpc, status=1)
    for path in wallets:
        assert str(load_keypair(path).pubkey()) in message
    owner = load_keypair(wallets[0]).pubkey()
    shown = json.loads(admin("run", "show", "twin", "--owner", owner, "--rpc", ledger.rpc, "--json"))
    assert shown["owner"] == str(owner)
    assert (shown["members"], shown["rounds"], shown["state"]) == ([], [], "WAITING_FOR_MEMBERS")
    assert "WAITING_FOR_MEMBERS" in admin("run", "show", "twin", "--owner", owner, "--rpc", ledger.rpc)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("limits.batsch=3", "limits.batsch: Extra inputs are not permitted"),
        ("colour=blue", "colour: Extra inputs are not permitted"),
        ("limits.batch=0", "limits.batch"),
        ("limits.batch=many", "limits.batch"),
        ("limits.witnesses=3", "witnesses must be at most min_members"),
        ("limits.min_members=3", "min_members <= init_min_members"),
        ("terms.model_root=12", "terms.model_root"),
        ("terms.peak_lr=nan", "terms.peak_lr"),
        ("terms.schedule=steps", "terms.schedule"),
        ("run_id.x=1", "is not a section"),
        ("limits", "must look like"),
    ],
)
def test_settings_are_checked_before_anything_is_sent(wallet: Path, config: Path, override: str, message: str) -> None:
    # There is nothing at this endpoint: the command must end before it asks.
    options = (
        "--payer",
        wallet,
        "--program",
        str(Keypair().pubkey()),
        "--config",
        config,
        "--rpc",
        "http://127.0.0.1:9",
    )
    assert message in admin("run", "create", *options, "--set", override, status=1)


def test_settings_can_come_without_a_file(ledger: Ledger, program: tuple[Keypair, Pubkey], wallet: Path) -> None:
    options = ["--payer", wallet, "--program", str(program[1]), "--rpc", ledger.rpc]
    missing = admin("run", "create", "flags", *options, status=1)
    assert "limits: Field required" in missing
    for setting in (
        "limits.init_min_members=1",
        "limits.min_members=1",
        "limits.batch=4",
        "limits.rounds_per_epoch=2",
        "limits.total_rounds=9",
        f"terms.model_root={HEX}",
        f"terms.layout_digest={HEX}",
        f"terms.data_manifest={HEX}",
        "terms.samples=10",
        "terms.sequence_length=8",
        "terms.update_bytes=9",
        "terms.peak_lr=0.5",
    ):
        options += ["--set", setting]
    created = json.loads(admin("run", "create", "flags", *options, "--json"))
    shown = json.loads(admin("run", "show", created["address"], "--rpc", ledger.rpc, "--json"))
    assert shown["limits"]["total_rounds"] == 9
    assert shown["terms"]["peak_lr_bits"] == 0x3F000000


def test_no_endpoint_and_no_program_have_their_own_exit_status(
    ledger: Ledger, wallet: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.admin._PATIENCE", 0.3)
    message = admin("run", "show", str(Keypair().pubkey()), "--rpc", "http://127.0.0.1:9", status=3)
    assert "127.0.0.1:9" in message
    assert "must look like" in admin("run", "show", "x", "--rpc", "nonsense", status=1)
    admin("run", "show", "x", "--no-such-option", status=2)
    nowhere = str(Keypair().pubkey())
    message = admin(
        "run", "create", "--payer", wallet, "--program", nowhere, "--config", config, "--rpc", ledger.rpc, status=1
    )
    assert "ProgramAccountNotFound" in message or "InvalidProgramForExecution" in message
