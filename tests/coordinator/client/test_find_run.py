"""A run is named in one way everywhere: by its address or its name; what is nearly right is shown what it may mean."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import typer
from endpoints import endpoint, forwarding, result
from ledger_process import Ledger
from runs import LIMITS, TERMS
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from typer.testing import CliRunner

from coordinator.admin.app import app as admin
from coordinator.chain import RpcError
from coordinator.client import CoordinatorClient, RunNotFound
from coordinator.find_run import all_runs, open_run
from psyche_node.cli import app as node
from psyche_node.commands.ending import failures
from psyche_node.evaluation import Results
from psyche_node.exits import Exit

Program = tuple[Keypair, Pubkey]
NAME = "hermes-sft"


@pytest.fixture(scope="module")
def run(ledger: Ledger, program: Program) -> Pubkey:
    owner, program_id = program

    async def create() -> Pubkey:
        async with CoordinatorClient([ledger.rpc], program_id, None, owner) as client:
            return (await client.create_run(NAME, LIMITS, TERMS)).run

    return asyncio.run(create())


def test_a_client_is_opened_by_name_or_address(ledger: Ledger, program: Program, run: Pubkey, quick: None) -> None:
    owner, program_id = program

    async def look() -> None:
        for name, options in (
            (str(run), {}),
            (NAME, {}),
            (NAME, {"program": program_id}),
            (NAME, {"program": program_id, "owner": owner.pubkey()}),
        ):
            async with await open_run([ledger.rpc], name, **options) as client:
                assert client.addresses.run == run
        with pytest.raises(RunNotFound, match=f"no run of owner {program_id} is called {NAME!r}.*did you mean"):
            await open_run([ledger.rpc], NAME, owner=program_id)
        with pytest.raises(RunNotFound, match=f"there is no account (.|\n)*did you mean (.|\n)*owner {owner.pubkey()}"):
            await open_run([ledger.rpc], NAME, program=program_id, owner=program_id)

    asyncio.run(look())


@pytest.mark.parametrize("typed", ["hermes-stf", "Hermes-SFT", "ADDRESS"])
def test_every_command_names_what_is_nearly_the_same(
    ledger: Ledger, run: Pubkey, tmp_path: Path, typed: str, quick: None
) -> None:
    """An address that lacks a character is as good as a name with one too many."""
    typed = str(run)[:-1] if typed == "ADDRESS" else typed
    results = tmp_path / "results.json"
    results.write_bytes(Results(model_root="ab" * 32, round=3).canonical())
    place = ["--rpc", ledger.rpc]
    for file in (tmp_path / "model" / "config.json", tmp_path / "data" / "manifest.json"):
        file.parent.mkdir()
        file.touch()
    folders = [word for name in ("folder", "model", "data") for word in (f"--{name}", str(tmp_path / name))]
    for app, words in (
        (admin, ["run", "show", typed, *place]),
        (node, ["eval", "--verify", str(results), "--run", typed, *place]),
        (node, ["run", "--run", typed, *place, *folders]),
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == Exit.RUN_NOT_FOUND, done.output
        said = "".join(done.output.split())
        assert f"didyoumeanoneofthese?{NAME}{run}owner" in said.replace("\\n", ""), done.output


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.looks._PAUSE", 0.0)
    monkeypatch.setattr("coordinator.find_run._HINT_SECONDS", 60.0)


def test_an_endpoint_that_is_behind_does_not_hide_a_run(
    ledger: Ledger, program: Program, run: Pubkey, quick: None
) -> None:
    """It lists no accounts yet: the next one is asked, at the commitment that the caller reads at."""
    asked: list[str] = []

    async def behind(request: dict[str, Any]) -> tuple[int, bytes, str] | None:
        if request["method"] != "getProgramAccounts":
            return None
        asked.append(request["params"][1]["commitment"])
        return result(request, [])

    async def look() -> None:
        async with endpoint(forwarding(ledger.rpc, behind)) as late:
            for options in ({}, {"program": program[1]}):
                async with await open_run([late, ledger.rpc], NAME, commitment="processed", **options) as client:
                    assert client.addresses.run == run
            assert set(asked) == {"processed"}
            asked.clear()
            with pytest.raises(RunNotFound, match=f"no run is called '{NAME}'"):
                await open_run([late], NAME, program=program[1])
            assert len(asked) == 3

    asyncio.run(look())


@pytest.mark.parametrize("typed", [str(Pubkey.default()), "x" * 40])
def test_what_is_wrong_is_said_also_where_the_runs_are_not_listed(
    ledger: Ledger, quick: None, typed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Public endpoints throttle the listing of accounts, and what is nearly the same is only a hint."""
    monkeypatch.setattr("coordinator.find_run._HINT_SECONDS", 0.5)

    async def throttled(request: dict[str, Any]) -> tuple[int, bytes, str] | None:
        return (429, b"", "") if request["method"] == "getProgramAccounts" else None

    async def look() -> None:
        async with endpoint(forwarding(ledger.rpc, throttled)) as public:
            with pytest.raises(RunNotFound, match=r"is not a run of this version|neither an address nor"):
                await open_run([public], typed, patience=60.0)

    asyncio.run(look())


def test_an_endpoint_that_lists_no_accounts_says_what_to_give() -> None:
    class Chain:
        async def program_accounts(self, *_: object) -> None:
            raise RpcError("getProgramAccounts", -32010, "excluded from account secondary indexes")

    with pytest.raises(RunNotFound, match="give the address of the run's account, or its name with --program"):
        asyncio.run(all_runs(Chain(), Pubkey.default()))  # type: ignore[arg-type]


def test_no_name_that_a_stranger_has_chosen_reaches_a_terminal_as_it_is(ledger: Ledger, program: Program) -> None:
    """The program takes any name without NUL: one could rewrite the screen, or forge a line of what is said."""
    owner, program_id = program
    name = "free\x1b]0;x\x07\u202e\nrun  forged"

    async def create() -> Pubkey:
        async with CoordinatorClient([ledger.rpc], program_id, None, owner) as client:
            return (await client.create_run(name, LIMITS, TERMS)).run

    address, place = asyncio.run(create()), ["--rpc", ledger.rpc]
    for words in (["list"], ["show", str(address)], ["show", str(address)[:-1]]):
        done = CliRunner().invoke(admin, ["run", *words, *place])
        assert "free\ufffd]0;x\ufffd\ufffd\ufffdrun  forged" in done.output, words
        assert not {"\x1b", "\x07", "\u202e"} & set(done.output), words


def test_nor_does_what_an_error_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), failures(RunNotFound):
        raise RunNotFound("did you mean\n  \x1b[2J")
    assert capsys.readouterr().err == "did you mean\n  \ufffd[2J\n"
