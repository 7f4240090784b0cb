"""Digests of evaluations on a real ledger: recorded as memos, found by the run's address, and not to be forged."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from ledger_process import Ledger
from runs import LIMITS, TERMS
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from typer.testing import CliRunner

from coordinator.admin.app import app as admin
from coordinator.client import CoordinatorClient
from coordinator.evaluations import MEMO_PROGRAM, evaluations_address, record_instructions, recorded_evaluations
from psyche_node.cli import app as node
from psyche_node.evaluation import Results
from psyche_node.exits import Exit

Program = tuple[Keypair, Pubkey]
RUN, WALLET = Pubkey(bytes([7] * 32)), Pubkey(bytes([9] * 32))


def test_the_memo_is_a_format() -> None:
    transfer, memo = record_instructions(RUN, WALLET, 12, b"\xab" * 32)
    assert memo.program_id == MEMO_PROGRAM
    assert memo.data.decode() == f"psyche evaluation run={RUN} round=12 sha256={'ab' * 32}"
    assert memo.accounts == [AccountMeta(WALLET, is_signer=True, is_writable=False)]
    assert transfer.data == bytes([2, 0, 0, 0, *[0] * 8])  # the system program's transfer, of no lamports
    assert transfer.accounts[2] == AccountMeta(evaluations_address(RUN), is_signer=False, is_writable=False)
    with pytest.raises(ValueError, match="32 bytes"):
        record_instructions(RUN, WALLET, 12, b"\xab" * 31)


def test_what_a_member_records_is_found_and_verified(ledger: Ledger, program: Program, tmp_path: Path) -> None:
    owner, program_id = program
    results, member = Results(model_root="ab" * 32, round=3), Keypair()

    async def record() -> str:
        async with CoordinatorClient([ledger.rpc], program_id, None, owner) as client:
            addresses = await client.create_run("evaluations", LIMITS, TERMS)
        async with await CoordinatorClient.open([ledger.rpc], addresses.run, member) as client:
            await client.airdrop(member.pubkey(), 10**9)
            assert await recorded_evaluations(client, addresses.run) == []
            await client.join(Keypair())
            before = await client.transaction_counts()
            await client.record_evaluation(3, results.digest)
            # Others may name the address, too: what is no memo of this form does not count.
            transfer, memo = record_instructions(addresses.run, member.pubkey(), 3, results.digest)
            await client.send(transfer, Instruction(MEMO_PROGRAM, b"hello", memo.accounts))
            await client.send(transfer, Instruction(MEMO_PROGRAM, memo.data, []))
            await client.send(transfer, record_instructions(WALLET, member.pubkey(), 3, results.digest)[1])
            (found,) = await recorded_evaluations(client, addresses.run)
            assert (found.round, found.digest, found.wallet) == (3, results.digest, member.pubkey())
            assert await client.transaction_counts() == before  # none of them names the run's own account
        return str(addresses.run)

    run, file = asyncio.run(record()), tmp_path / "results.json"
    file.write_text(json.dumps(json.loads(results.canonical()), indent=1))
    flags = ["--run", run, "--rpc", ledger.rpc]
    done = CliRunner().invoke(node, ["eval", "--verify", str(file), *flags, "--json"])
    assert done.exit_code == 0, done.output
    (recorded,) = json.loads(done.output)["recorded"]
    assert (recorded["round"], recorded["wallet"], recorded["member"]) == (3, str(member.pubkey()), 0)
    assert "(member 0)" in CliRunner().invoke(node, ["eval", "--verify", str(file), *flags]).output
    file.write_text(file.read_text().replace("ab", "cd"))
    assert CliRunner().invoke(node, ["eval", "--verify", str(file), *flags]).exit_code == Exit.EVALUATION
    file.write_bytes(Results(model_root="ab" * 32).canonical())
    done = CliRunner().invoke(node, ["eval", "--verify", str(file), *flags])
    assert (done.exit_code, "is of `psyche-node eval`" in done.output) == (Exit.EVALUATION, True)
    listed = CliRunner().invoke(admin, ["run", "evaluations", run, "--rpc", ledger.rpc, "--json"])
    assert [row["sha256"] for row in json.loads(listed.output)["evaluations"]] == [results.digest.hex()]
