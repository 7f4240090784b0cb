"""What a failed transaction means and what to do about it: Solana's JSON for it, turned into exceptions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from solders.instruction import Instruction
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.system_program import ID as SYSTEM_PROGRAM

from coordinator.errors import ERROR_TEXT, ErrorCode
from coordinator.jsonrpc import ChainError, Json

_MAX_LOG_LINES: Final = 200
_MAX_LOG_CHARACTERS: Final = 1000
_ADVICE: Final = {
    "BlockhashNotFound": "the endpoint does not know its blockhash; is it on the same chain as the others?",
    "ProgramAccountNotFound": "a program that it calls is not on this chain; deploy it, or use the right endpoint",
    "AccountInUse": "another transaction holds an account that it writes; send it again",
    "ComputationalBudgetExceeded": "it needs more compute units than this client allows; is the program a newer one?",
    "ProgramFailedToComplete": "the program was stopped by the machine; is it built for this cluster?",
    "InvalidProgramForExecution": "what it calls is no program; check the program's address and the RPC endpoint",
    "UnsupportedProgramId": "what it calls is no program; check the program's address and the RPC endpoint",
    "InvalidAccountData": "an account is not of the kind that the program wants; check its address",
}
_SYSTEM_ADVICE: Final = {
    0: "an account that it makes exists already",
    1: "the wallet has too few lamports for it; send it some SOL",
}


class TransactionFailed(ChainError):
    """The chain refused or failed a transaction. `error` is Solana's JSON for it, `logs` the programs' log lines.

    `signature` is None where the transaction was refused before it entered the chain, and cost nothing.
    """

    def __init__(self, text: str, error: Json, logs: Sequence[str], signature: Signature | None) -> None:
        super().__init__(text)
        self.error = error
        self.logs = tuple(logs)
        self.signature = signature


class ProgramError(TransactionFailed):
    """The coordinator program refused an instruction, and nothing changed: `code` is its number, `name` its name."""

    def __init__(self, code: int, logs: Sequence[str], error: Json = None, signature: Signature | None = None) -> None:
        known = ErrorCode(code) if code in ErrorCode._value2member_map_ else None
        self.code = code
        self.name = known.name if known is not None else "UNKNOWN"
        text = (
            ERROR_TEXT[known] if known is not None else "this version does not know the error; is psyche-node too old?"
        )
        super().__init__(f"{text} ({self.name}, error {code})", error, logs, signature)


def refused(text: str) -> TransactionFailed:
    """A transaction that was never sent, or that the endpoint did not take."""
    return TransactionFailed(text, None, (), None)


def failure(
    error: Json,
    logs: Sequence[Json],
    *,
    payer: Pubkey,
    instructions: Sequence[Instruction],
    program_id: Pubkey | None,
    signature: Signature | None,
) -> TransactionFailed:
    """The exception for a transaction's error. `signature` is None where it was only simulated."""
    lines = [str(line)[:_MAX_LOG_CHARACTERS] for line in list(logs)[:_MAX_LOG_LINES]]
    verb = "would fail" if signature is None else "failed"
    if error in ("AccountNotFound", "InsufficientFundsForFee"):
        text = f"wallet {payer} cannot pay the fee ({error}); send it some SOL"
        return TransactionFailed(text, error, lines, signature)
    if isinstance(error, dict) and "InsufficientFundsForRent" in error:
        text = f"an account would be left with less than its deposit for rent; send wallet {payer} some SOL"
        return TransactionFailed(text, error, lines, signature)
    index, cause = _instruction_error(error)
    if index is not None and 0 <= index < len(instructions):
        program = instructions[index].program_id
        code = cause.get("Custom") if isinstance(cause, dict) else None
        if isinstance(code, int) and program == program_id:
            return ProgramError(code, lines, error, signature)
        advice = _SYSTEM_ADVICE.get(code) if isinstance(code, int) and program == SYSTEM_PROGRAM else _advice(cause)
        text = f"program {program} {verb}: {cause}{_more(advice, lines)}"
        return TransactionFailed(text, error, lines, signature)
    return TransactionFailed(f"the transaction {verb}: {error}{_more(_advice(error), lines)}", error, lines, signature)


def _instruction_error(error: Json) -> tuple[int | None, Json]:
    parts = error.get("InstructionError") if isinstance(error, dict) else None
    if not isinstance(parts, list) or len(parts) != 2 or not isinstance(parts[0], int):
        return None, None
    return parts[0], parts[1]


def _advice(error: Json) -> str | None:
    return _ADVICE.get(error) if isinstance(error, str) else None


def _more(advice: str | None, lines: list[str]) -> str:
    return (f"; {advice}" if advice else "") + (f" (last log line: {lines[-1]})" if lines else "")
