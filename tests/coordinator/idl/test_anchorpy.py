"""An Anchor client of others (anchorpy) reads the program by its IDL: instructions, accounts, errors, events."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from ledger_process import Ledger
from runs import LIMITS, TERMS
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator import idl
from coordinator import instructions as ix
from coordinator.addresses import run_addresses
from coordinator.client import CoordinatorClient, ProgramError
from coordinator.errors import ERROR_TEXT, ErrorCode
from coordinator.events import events_in
from coordinator.state import Phase

HERE = Path(__file__).resolve().parent
NO_INDEX = re.compile(
    r"No matching distribution|Could not find a version|ConnectionError|Max retries|Temporary failure"
)


@pytest.fixture(scope="module")
def anchorpy() -> Path:
    """The Python of an environment with anchorpy, made once and kept in the user's cache."""
    requirements = HERE / "requirements.txt"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "psyche-node"
    folder = cache / f"anchorpy-{sys.version_info.major}.{sys.version_info.minor}"
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if stamp.exists() and stamp.read_text() == requirements.read_text():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    if done.returncode != 0 and NO_INDEX.search(done.stderr):
        pytest.skip("no package index here has anchorpy, and it is not in the cache yet")
    assert done.returncode == 0, done.stderr
    stamp.write_text(requirements.read_text())
    return python


def ask(python: Path, program: Pubkey, **questions: Any) -> Any:
    shape = {"instructions": [], "accounts": [], "refusals": [], "logs": [], **questions}
    text = (idl.FOLDER / "coordinator.legacy.json").read_text(encoding="utf-8")
    command = [str(python), str(HERE / "anchorpy_client.py")]
    given = json.dumps({"idl": text, "program": str(program), **shape})
    # It must not find this project's packages: the versions differ.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def snake(name: str) -> str:
    return re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()


def snaked(value: Any) -> Any:
    if isinstance(value, dict):
        return {snake(key): snaked(one) for key, one in value.items()}
    return [snaked(one) for one in value] if isinstance(value, list) else value


def test_anchorpy_builds_the_same_instructions(anchorpy: Path) -> None:
    owner, program, node, key = (Keypair().pubkey() for _ in range(4))
    at = run_addresses(program, owner, "anchor")
    of_run = {name: str(getattr(at, name)) for name in ("run", "members", "rounds")}
    digest = bytes(range(32))
    commit = ix.commit(at, program, owner, 3, digest, 4, 5, 6)
    join = ix.join(at, program, owner, node, 9, key)
    config = ix.set_config(at, program, owner, LIMITS, key)
    limits = {snake(name): value for name, value in asdict(LIMITS).items()}
    asked = [
        {
            "name": "commit",
            "args": [3, 0, digest.hex(), 4, 5, 6],
            "accounts": {"wallet": str(owner), **of_run},
            "more": [],
        },
        {
            "name": "join",
            "args": [9, 0],
            "accounts": {"wallet": str(owner), "node_key": str(node), **of_run},
            "more": [[str(key), False, False]],
        },
        {
            "name": "set_config",
            "args": [{"type": "Limits", "fields": limits}, str(key)],
            "accounts": {"owner": str(owner), **of_run},
            "more": [],
        },
    ]
    made = ask(anchorpy, program, instructions=asked)["instructions"]
    for answer, built in zip(made, (commit, join, config), strict=True):
        assert answer["data"] == bytes(built.data).hex()
        assert answer["accounts"] == [[str(one.pubkey), one.is_signer, one.is_writable] for one in built.accounts]


def test_anchorpy_reads_accounts_events_and_errors(
    anchorpy: Path, ledger: Ledger, program: tuple[Keypair, Pubkey]
) -> None:
    owner, node = program[0], Keypair()

    async def play() -> tuple[Any, list[bytes], list[str], ProgramError]:
        async with CoordinatorClient([ledger.rpc], program[1], None, owner) as client:
            run = (await client.create_run(f"anchor-{Keypair().pubkey()}"[:32], LIMITS, TERMS)).run
        async with await CoordinatorClient.open([ledger.rpc], run, owner) as client:
            joined = await client.join(node, 77)
            with pytest.raises(ProgramError) as refused:
                await client.tick()
            found = await client.rpc.call("getTransaction", [str(joined), {"encoding": "base64"}])
            addresses = client.addresses
            accounts = [await client.account(key) for key in (addresses.run, addresses.members, addresses.rounds)]
            pulse, members = await client.pulse(), await client.members()
            data = [one.data for one in accounts if one is not None]
            return (addresses, pulse, members), data, found["meta"]["logMessages"], refused.value

    (addresses, pulse, members), data, logs, refused = asyncio.run(asyncio.wait_for(play(), 60))
    assert refused.logs
    answers = ask(
        anchorpy,
        program[1],
        accounts=[{"data": base64.b64encode(one).decode()} for one in data],
        refusals=[{"index": 1, "code": refused.code, "logs": list(refused.logs)}],
        logs=logs,
    )

    run, table, rounds = answers["accounts"]
    assert [one["name"] for one in answers["accounts"]] == ["Run", "Members", "Rounds"]
    fields = snaked(run["fields"])
    assert fields["owner"] == str(owner.pubkey())
    assert bytes.fromhex(fields["run_id"]).rstrip(b"\0").decode() == pulse.run.run_id
    assert Phase(fields["phase"]) is Phase.WAITING_FOR_MEMBERS
    assert fields["limits"] == asdict(LIMITS)
    assert fields["terms"]["model_root"] == TERMS.model_root.hex()
    assert fields["checkpoint_root"] == TERMS.model_root.hex()
    first = snaked(table["fields"])["member"][0]
    assert (first["wallet"], first["node_key"]) == (str(owner.pubkey()), str(node.pubkey()))
    assert (first["next_share"], members[0].next_share) == (77, 77)
    header = snaked(rounds["fields"])["header"]
    assert (header["run"], header["members"]) == (str(addresses.run), 1)

    assert answers["errors"] == [[ErrorCode.NOT_DUE, ERROR_TEXT[ErrorCode.NOT_DUE]]]
    (ours,) = events_in(logs, program[1])
    (event,) = answers["events"]
    told = snaked(event["fields"])
    assert event["name"] == ours.name == "MemberJoined"
    assert (told["wallet"], told["share"], told["run"]) == (ours.fields["wallet"], 77, str(addresses.run))
    assert told["node_key"] == str(node.pubkey())
