"""`psyche-admin` against a real ledger, program and run: wallets, runs, how they are created and shown."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from admin_harness import HEX, admin, admin_json
from endpoints import endpoint, failure
from ledger_process import SOL, Ledger
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.addresses import run_addresses
from coordinator.admin.health import EndpointHealth, probe
from coordinator.base58 import peer_id
from coordinator.client import CoordinatorClient
from coordinator.wallet import load_keypair


def test_wallets_are_made_shown_and_funded(ledger: Ledger, wallet: Path) -> None:
    address = str(load_keypair(wallet).pubkey())
    assert admin("keys", "show", wallet).strip() == address
    assert json.loads(admin("keys", "show", wallet, "--rpc", ledger.rpc, "--json")) == {
        "address": address,
        "lamports": 50 * SOL,
    }
    planned = admin_json("ledger", "airdrop", address, "1.5", "--rpc", ledger.rpc, "--dry-run")
    assert planned == {"address": str(address), "dry_run": True, "lamports": 51_500_000_000}
    assert "51.5 SOL" in admin("ledger", "airdrop", address, "1.5", "--rpc", ledger.rpc)
    assert "exists already" in admin("keys", "new", wallet, status=11)
    wallet.chmod(0o644)
    assert "chmod 600" in admin("keys", "show", wallet, status=11)


@pytest.mark.parametrize("amount", ["0", "-1", "x", "0.0000000001", "1e30", "NaN", "Infinity"])
def test_amounts_are_checked(ledger: Ledger, wallet: Path, amount: str) -> None:
    assert "SOL" in admin("ledger", "airdrop", wallet, "--rpc", ledger.rpc, "--", amount, status=10)


def test_a_negative_amount_is_no_unknown_option(ledger: Ledger, wallet: Path, run: dict[str, Any]) -> None:
    rpc = ("--rpc", ledger.rpc)
    assert "-5 SOL cannot be sent: an amount must be above 0" in admin(
        "run", "fund", run["address"], "-5", "--payer", wallet, *rpc, status=10
    )
    assert "above 0" in admin("ledger", "airdrop", wallet, "-.5", *rpc, status=10)
    shares = admin("member", "share", run["address"], "-3", "--payer", wallet, *rpc, status=2)
    assert "No such option" not in shares
    assert "No such option: --pyaer" in admin("run", "fund", run["address"], "5", "--pyaer", wallet, *rpc, status=2)


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
        assert shown["terms"]["schedule"] == "cosine"

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
    said = admin("run", "create", "only-one", *options)
    assert "batch 8" in said
    assert "join_grace 1 (" in said, "in seconds, too"
    assert "passes" in said
    assert json.loads(admin("run", "show", "only-one", *rpc))["run_id"] == "only-one"
    assert "already" in admin("run", "create", "only-one", *options, status=10)
    unknown = admin("run", "show", "zebra", *rpc, status=26)
    assert "no run is called 'zebra' on this chain; there are:" in unknown
    assert all(one in unknown for one in ("only-one", "from-a-file", run["address"]))
    assert "there are no runs at all" in admin("run", "show", "zebra", "--program", run["owner"], *rpc, status=26)
    assert "not a run" in admin("run", "show", run["owner"], *rpc, status=26)
    assert "neither an address nor" in admin("run", "show", "x" * 40, *rpc, status=26)


def test_runs_of_one_name_are_told_apart(
    ledger: Ledger, program: tuple[Keypair, Pubkey], tmp_path: Path, config: Path
) -> None:
    wallets = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in wallets:
        admin("keys", "new", path)
        admin("ledger", "airdrop", path, "--rpc", ledger.rpc)
        admin(
            "run", "create", "twin", "--payer", path, "--program", program[1], "--config", config, "--rpc", ledger.rpc
        )
    message = admin("run", "show", "twin", "--rpc", ledger.rpc, status=26)
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
        ("limits.batsch=3", "limits.batsch: there is no such key (--set); did you mean batch?"),
        ("btach=8", "btach: there is no such key (--set); did you mean limits.batch?"),
        ("colour=blue", "colour: there is no such key (--set)"),
        ("limits.batch=0", "limits.batch: it is 0 (--set); it must be at least 1"),
        ("batch=many", "limits.batch: it is 'many' (--set); it must be a whole number"),
        ("limits.witnesses=3", "witnesses must be at most min_members"),
        ("limits.min_members=3", "min_members <= init_min_members"),
        ("terms.model_root=ab", "terms.model_root: it is 'ab' (--set); it must be 32 bytes in hex"),
        ("terms.peak_lr=nan", "terms.peak_lr"),
        ("schedule=steps", "terms.schedule: it is 'steps' (--set); it must be 'constant', 'linear'"),
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
    assert message in admin("run", "create", *options, "--set", override, status=10)


def test_settings_can_come_without_a_file(ledger: Ledger, program: tuple[Keypair, Pubkey], wallet: Path) -> None:
    options = ["--payer", wallet, "--program", str(program[1]), "--rpc", ledger.rpc]
    missing = admin("run", "create", "flags", *options, status=10)
    assert "limits: it is missing" in missing
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
    assert shown["terms"]["peak_lr"] == 0.5


def test_a_recipe_sets_what_model_and_data_do_not(
    ledger: Ledger, program: tuple[Keypair, Pubkey], wallet: Path
) -> None:
    options = ["--payer", wallet, "--program", str(program[1]), "--rpc", ledger.rpc, "--recipe", "hermes-sft"]
    assert "terms.model_root: it is missing" in admin("run", "create", "sft", *options, status=10)
    assert "there is no recipe 'soup'" in admin("run", "create", "sft", *options[:-1], "soup", status=10)
    for name in ("model_root", "layout_digest", "data_manifest"):
        options += ["--set", f"terms.{name}={HEX}"]
    options += ["--set", "terms.samples=10", "--set", "terms.update_bytes=9", "--set", "terms.ramp_batch=24"]
    created = admin_json("run", "create", "sft", *options, "--set", "terms.ramp_rounds=100")
    shown = admin_json("run", "show", created["address"], "--rpc", ledger.rpc)
    # One name and one kind of value for a setting, wherever it is written.
    assert (shown["terms"]["peak_lr"], shown["terms"]["schedule"], shown["terms"]["warmup_rounds"]) == (
        2.5e-5,
        "cosine",
        300,
    )
    assert (shown["limits"]["batch"], shown["limits"]["total_rounds"]) == (384, 9000)
    assert "growing from 24 until round 100" in admin("run", "show", created["address"], "--rpc", ledger.rpc)


def test_what_a_folder_would_give_is_told_where_it_is_missing(wallet: Path) -> None:
    told = admin("run", "create", "x", "--recipe", "demo", "--program", "1" * 32, "--payer", wallet, status=10)
    assert "terms.samples: it is missing" in told
    assert "--data FOLDER works out data_manifest, samples" in told
    assert "--model FOLDER works out model_root, layout_digest, update_bytes" in told


def test_folders_are_read_when_all_else_is_right(
    ledger: Ledger, program: tuple[Keypair, Pubkey], wallet: Path, config: Path, tmp_path: Path
) -> None:
    options = ["run", "create", "slow", "--config", config, "--rpc", ledger.rpc, "--program", program[1], "--payer"]
    folder = ["--model", tmp_path / "nowhere"]
    told = admin(*options, wallet, *folder, "--data", tmp_path, "--set", "batsch=3", status=10)
    for said in ("batsch: there is no such key", "nowhere: there is no such folder", "there is no manifest.json"):
        assert said in told, "what can be seen at once is seen first, all of it"
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "config.json").write_text("{}")
    assert "nowhere" in admin(*options, wallet, *folder, status=10)
    admin(*options, wallet)
    admin("keys", "new", tmp_path / "poor.json")
    for words, said, status in (
        ([*options, wallet], "already", 10),
        ([*options, tmp_path / "poor.json"], "has 0 SOL", 21),
        ([*options, wallet, "--set", "run_id=other", "--set", "batsch=3"], "batsch: there is no such key (--set)", 10),
    ):
        told = admin(*words, *folder, status=status)
        assert said in told
        assert "nowhere" not in told


def test_no_endpoint_and_no_program_have_their_own_exit_status(
    ledger: Ledger, wallet: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.admin.session.PATIENCE", 0.3)
    message = admin("run", "show", Keypair().pubkey(), "--rpc", "http://127.0.0.1:9", status=20)
    assert "127.0.0.1:9" in message
    assert "must look like" in admin("run", "show", "x", "--rpc", "nonsense", status=10)
    admin("run", "show", "x", "--no-such-option", status=2)
    options = ("--payer", wallet, "--program", Keypair().pubkey(), "--config", config, "--rpc", ledger.rpc)
    for more in ((), ("--dry-run",)):
        message = admin("run", "create", *options, *more, status=21)
        assert "ProgramAccountNotFound" in message or "InvalidProgramForExecution" in message


def test_runs_are_listed(ledger: Ledger, program: tuple[Keypair, Pubkey], run: dict[str, Any]) -> None:
    listed = admin_json("run", "list", "--program", program[1], "--owner", run["owner"], "--rpc", ledger.rpc)
    assert [(one["run_id"], one["address"], one["round"]) for one in listed] == [("from-a-file", run["address"], 2)]
    text = admin("run", "list", "--rpc", ledger.rpc)
    assert run["address"] in text
    assert "from-a-file" in text
    assert admin("run", "list", "--owner", Keypair().pubkey(), "--rpc", ledger.rpc) == "no runs\n"


def test_a_dry_run_sends_nothing_and_knows_the_cost(
    ledger: Ledger, program: tuple[Keypair, Pubkey], wallet: Path, config: Path
) -> None:
    options = ("--payer", wallet, "--program", program[1], "--config", config, "--rpc", ledger.rpc)
    before = admin_json("keys", "show", wallet, "--rpc", ledger.rpc)
    for fee in ("0", "1000000"):
        planned = admin_json("run", "create", "dry", *options, "--priority-fee", fee, "--dry-run")
    assert admin_json("keys", "show", wallet, "--rpc", ledger.rpc) == before
    assert admin_json("run", "list", "--owner", before["address"], "--rpc", ledger.rpc) == []
    assert planned["dry_run"] is True
    (transaction,) = planned["transactions"]
    assert [one["name"].split()[0] for one in transaction["instructions"]] == ["system"] * 3 + ["coordinator"]
    assert transaction["signers"] == [before["address"]]
    assert 0 < transaction["bytes"] <= 1232
    assert transaction["compute_units"] > 1000
    text = admin("run", "create", "dry", *options, "--dry-run")
    assert "nothing was sent" in text
    planned = admin_json("run", "create", "dry", *options, "--dry-run")
    done = admin_json("run", "create", "dry", *options)
    assert (done["lamports"], done["address"]) == (planned["lamports"], planned["address"])
    assert "already" in admin("run", "create", "dry", *options, "--dry-run", status=10)


def test_endpoints_are_looked_at_one_by_one(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(request: dict[str, Any]) -> tuple[int, bytes, str]:
        return failure(request, -32601, "Method not found")

    async def look() -> tuple[EndpointHealth, ...]:
        async with endpoint(refuse) as bad:
            return await probe([ledger.rpc, bad], 30)

    good, bad = asyncio.run(look())
    assert (good.healthy, bad.healthy) == (True, False)
    assert good.slot > 0
    assert "Method not found" in str(bad.problem)
    (shown,) = admin_json("ledger", "show", "--rpc", ledger.rpc)["endpoints"]
    assert (shown["healthy"], shown["genesis_hash"]) == (True, good.genesis)
    monkeypatch.setattr("coordinator.admin.ledgers.PATIENCE", 0.3)
    hint = admin("ledger", "show", "--rpc", "http://127.0.0.1:9", status=20)
    assert "psyche-ledger run" in hint


def test_a_name_whose_address_is_taken_is_refused(
    ledger: Ledger, program: tuple[Keypair, Pubkey], wallet: Path, config: Path
) -> None:
    members = run_addresses(program[1], load_keypair(wallet).pubkey(), "blocked").members
    admin("ledger", "airdrop", members, "1", "--rpc", ledger.rpc)
    options = ("--payer", wallet, "--program", program[1], "--config", config, "--rpc", ledger.rpc)
    assert "choose another name" in admin("run", "create", "blocked", *options, status=10)


def test_a_wallet_that_cannot_pay_is_told_how_much_and_how(
    ledger: Ledger, program: tuple[Keypair, Pubkey], config: Path, tmp_path: Path
) -> None:
    poor = tmp_path / "poor.json"
    address = json.loads(admin("keys", "new", poor, "--json"))["address"]
    words = ("run", "create", "--payer", poor, "--program", program[1], "--config", config, "--rpc", ledger.rpc)
    for extra in ((), ("--dry-run",)):
        said = admin(*words, *extra, status=21)
        found = re.search(
            rf"wallet {address} has 0 SOL, and this takes ([\d.]+) SOL: send it \1 SOL, here with: (.*)", said
        )
        assert found is not None, said
    name, *airdrop = found[2].split()
    assert name == "psyche-admin"
    admin(*airdrop)
    before = json.loads(admin("keys", "show", poor, "--rpc", ledger.rpc, "--json"))["lamports"]
    admin(*words)
    after = json.loads(admin("keys", "show", poor, "--rpc", ledger.rpc, "--json"))["lamports"]
    assert before - after == round(float(found[1]) * 10**9), "what was told is what it took"
