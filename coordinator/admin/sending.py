"""Sending what a command has to send, or, with --dry-run, finding out what that would do and cost."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from solders.compute_budget import set_compute_unit_limit, set_compute_unit_price
from solders.hash import Hash
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.message import Message
from solders.pubkey import Pubkey
from solders.transaction import Transaction

from coordinator.admin.output import confirm, show
from coordinator.chain import Chain, ChainUnavailable, TransactionFailed
from coordinator.failures import failure
from coordinator.funds import lamports_needed, require_funds, sol
from coordinator.run_costs import fee_of
from coordinator.transactions import COMPUTE_UNITS, MAX_TRANSACTION_BYTES


@dataclass(frozen=True, slots=True)
class Step:
    """One transaction: what it does in a few words, its instructions, and who signs besides the payer."""

    what: str
    instructions: Sequence[Instruction]
    signers: Sequence[Keypair] = ()


@dataclass(frozen=True, slots=True)
class Manner:
    """How a command that writes was told to behave. `priority_fee` is micro-lamports per compute unit."""

    payer: Keypair
    program: Pubkey | None
    dry_run: bool
    yes: bool
    as_json: bool
    priority_fee: int = 0


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a transaction would do. `lamports` leave the payer, `fee` of them for signatures and priority."""

    bytes: int
    units: int
    fee: int
    lamports: int
    signers: tuple[Pubkey, ...]


async def rehearse(chain: Chain, manner: Manner, step: Step) -> None:
    """Find out whether a transaction could be sent now, before what it needs takes long to work out.

    Raises:
        Unfunded, ProgramError, TransactionFailed, ChainUnavailable.
    """
    payer = manner.payer.pubkey()
    await require_funds(chain, payer, lamports_needed(step.instructions, payer, manner.priority_fee), "this")
    await simulate(chain, manner, step)


async def carry_out(
    chain: Chain, manner: Manner, step: Step, result: dict[str, Any], done: str, caution: str | None = None
) -> None:
    """Send one transaction and print `result` (JSON) or `done` (text); simulate it instead in a dry run.

    Args:
        caution: a sentence on what cannot be undone; asked about before it is sent.

    Raises:
        NotConfirmed, Unfunded, ProgramError, TransactionFailed, ChainUnavailable.
    """
    payer = manner.payer.pubkey()
    await require_funds(chain, payer, lamports_needed(step.instructions, payer, manner.priority_fee), "this")
    if manner.dry_run:
        simulated = await simulate(chain, manner, step)
        show_dry_run(manner, [(step, simulated)], simulated.lamports, result)
        return
    if caution is not None:
        if not manner.yes:  # nobody is asked about what the program would refuse
            await simulate(chain, manner, step)
        confirm(caution, yes=manner.yes)
    before = await chain.balance(manner.payer.pubkey())
    signature = await chain.send(*step.instructions, extra_signers=step.signers, payer=manner.payer)
    cost = before - await chain.balance(manner.payer.pubkey())
    spent = f"cost {sol(cost)} SOL" if cost >= 0 else f"{sol(-cost)} SOL came back"
    show(result | {"signature": str(signature), "lamports": cost}, manner.as_json, f"{done} [dim]({spent})[/dim]")


async def simulate(chain: Chain, manner: Manner, step: Step) -> Simulated:
    """Have the chain execute a transaction without effect.

    Raises:
        ProgramError, TransactionFailed: it would fail, and how.
    """
    payer = manner.payer.pubkey()
    budget = [set_compute_unit_limit(COMPUTE_UNITS)]
    if manner.priority_fee:
        budget.append(set_compute_unit_price(manner.priority_fee))
    everything = [*budget, *step.instructions]
    message = Message.new_with_blockhash(everything, payer, Hash.default())
    wire = bytes(Transaction.new_unsigned(message))
    if len(wire) > MAX_TRANSACTION_BYTES:
        raise TransactionFailed(
            f"the transaction has {len(wire)} bytes, over the limit of {MAX_TRANSACTION_BYTES}", None, (), None
        )
    before = await chain.balance(payer)
    options = {
        "encoding": "base64",
        "sigVerify": False,
        "replaceRecentBlockhash": True,
        "commitment": chain.commitment,
        "accounts": {"encoding": "base64", "addresses": [str(payer)]},
    }
    answer = await chain.rpc.call("simulateTransaction", [base64.b64encode(wire).decode(), options])
    value = answer.get("value") if isinstance(answer, dict) else None
    if not isinstance(value, dict):
        raise ChainUnavailable("simulateTransaction: the endpoint's answer does not have Solana's shape")
    if value.get("err") is not None:
        logs = value.get("logs")
        raise failure(
            value["err"],
            logs if isinstance(logs, list) else [],
            payer=payer,
            instructions=everything,
            program_id=manner.program,
            signature=None,
        )
    signatures = message.header.num_required_signatures
    units = value.get("unitsConsumed")
    fee = fee_of(signatures, manner.priority_fee)
    after = _lamports_after(value)
    return Simulated(
        bytes=len(wire),
        units=units if isinstance(units, int) else 0,
        fee=fee,
        # Some endpoints do not give accounts: then at least the fee is known.
        lamports=fee if after is None else before - after,
        signers=tuple(message.account_keys[:signatures]),
    )


def show_dry_run(
    manner: Manner, steps: Sequence[tuple[Step, Simulated]], lamports: int, result: dict[str, Any]
) -> None:
    """Print what was simulated; `lamports` is what all of it would take from the payer."""
    shape = {
        **result,
        "dry_run": True,
        "lamports": lamports,
        "transactions": [_step_json(step, simulated, manner.program) for step, simulated in steps],
    }
    lines = ["[bold]dry run[/bold]: nothing was sent; this would be:"]
    for step, simulated in steps:
        lines.append(f"  {escape(step.what)}")
        for one in step.instructions:
            lines.append(
                f"    [dim]{_program_name(one, manner.program)}: {len(one.data)} bytes, "
                f"{len(one.accounts)} accounts[/dim]"
            )
        lines.append(
            f"    [dim]{simulated.bytes} bytes, {simulated.units:,} compute units, signed by "
            f"{', '.join(map(str, simulated.signers))}[/dim]"
        )
    verb = "takes" if lamports >= 0 else "gives back"
    lines.append(f"The simulation succeeded. It {verb} {sol(abs(lamports))} SOL ({abs(lamports):,} lamports).")
    show(shape, manner.as_json, "\n".join(lines))


def _step_json(step: Step, simulated: Simulated, program: Pubkey | None) -> dict[str, Any]:
    return {
        "what": step.what,
        "instructions": [
            {
                "program": str(one.program_id),
                "name": _program_name(one, program),
                "accounts": [
                    {"address": str(meta.pubkey), "signer": meta.is_signer, "writable": meta.is_writable}
                    for meta in one.accounts
                ],
                "data": bytes(one.data).hex(),
            }
            for one in step.instructions
        ],
        "bytes": simulated.bytes,
        "compute_units": simulated.units,
        "fee": simulated.fee,
        "lamports": simulated.lamports,
        "signers": [str(key) for key in simulated.signers],
    }


def _program_name(instruction: Instruction, program: Pubkey | None) -> str:
    if instruction.program_id == program:
        return f"coordinator program {instruction.program_id}"
    return "system program" if instruction.program_id == Pubkey.default() else f"program {instruction.program_id}"


def _lamports_after(value: dict[str, Any]) -> int | None:
    accounts = value.get("accounts")
    try:
        lamports = accounts[0]["lamports"]  # type: ignore[index]
    except (TypeError, KeyError, IndexError):
        return None
    return lamports if isinstance(lamports, int) else None
