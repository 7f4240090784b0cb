"""Transactions: signing, sending, confirming, and sending again when a blockhash expires.

A transaction is signed once and its same bytes are sent as often as needed, which is safe: the chain executes them at
most once. Only when its blockhash has expired *and* the chain does not know it is a new one signed.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from solders.compute_budget import set_compute_unit_limit, set_compute_unit_price
from solders.hash import Hash
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.message import Message
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.transaction import Transaction

from coordinator.errors import ERROR_TEXT, ErrorCode
from coordinator.rpc import ChainError, ChainUnavailable, Endpoints, Json, RpcError
from coordinator.subscriptions import Subscriptions

log = logging.getLogger(__name__)

MAX_TRANSACTION_BYTES: Final = 1232
# Enough for any instruction of the program and of the loader; priority fees are paid on it, so it is not generous.
COMPUTE_UNITS: Final = 120_000
_LEVELS: Final = ("processed", "confirmed", "finalized")
_DISTINCT: Final = 4096
_MAX_SIGNED: Final = 4
_PREFLIGHT_FAILURE: Final = -32002
_FIRST_POLL: Final = 0.05
_LONGEST_POLL: Final = 2.0
_REBROADCAST_SECONDS: Final = 2.0
_LOGS_PATIENCE: Final = 2.0


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
        super().__init__(f"{self.name} ({code}): {text}", error, logs, signature)


@dataclass(frozen=True, slots=True)
class _Signed:
    wire: bytes
    signature: Signature
    last_valid_height: int
    instructions: tuple[Instruction, ...]


class _Expired(Exception):
    """The blockhash is too old and the chain does not know the transaction: it can never land."""


class Sender:
    """Sends transactions for one wallet or several.

    Args:
        rpc, subscriptions: the way to the chain.
        program_id: whose errors are `ProgramError`s.
        commitment: the level at which a transaction counts as done: processed, confirmed or finalized.
        priority_fee: micro-lamports per compute unit, on top of the base fee.
        patience: seconds for one transaction with all its attempts.
        saw_slot: told the slot in which a transaction was found to have landed.
    """

    def __init__(
        self,
        rpc: Endpoints,
        subscriptions: Subscriptions,
        program_id: Pubkey | None,
        *,
        commitment: str,
        priority_fee: int,
        patience: float,
        saw_slot: Callable[[int], None],
    ) -> None:
        self._rpc = rpc
        self._subscriptions = subscriptions
        self._program_id = program_id
        self._commitment = commitment
        self._priority_fee = priority_fee
        self._patience = patience
        self._saw_slot = saw_slot
        # Two equal instructions in one slot would be one transaction to the chain, and the second would be taken for
        # a duplicate of the first. A few compute units more or less make every transaction its own.
        self._distinct = itertools.count(random.randrange(_DISTINCT))

    async def send(self, instructions: Sequence[Instruction], payer: Keypair, signers: Sequence[Keypair]) -> Signature:
        """Send and confirm.

        Raises:
            ProgramError: the program refused.
            TransactionFailed: it failed otherwise, or is too large.
            ChainUnavailable: it could not be confirmed within the patience; it may still have its effect.
        """
        deadline = asyncio.get_running_loop().time() + self._patience
        given_up: list[_Signed] = []
        for _ in range(_MAX_SIGNED):
            signed = await self._sign(instructions, payer, signers)
            try:
                return await self._land(signed, deadline)
            except _Expired:
                log.warning("transaction %s expired before it landed; signing it again", signed.signature)
                given_up.append(signed)
            except TransactionFailed:
                # It may have failed because an earlier one did land after all, by an endpoint that was behind.
                for earlier in given_up:
                    if await self._status(earlier.signature) is not None:
                        return earlier.signature
                raise
        raise ChainUnavailable(
            f"a transaction expired {_MAX_SIGNED} times before the chain took it; the cluster is congested: "
            "set a priority fee or a higher one"
        )

    async def _sign(self, instructions: Sequence[Instruction], payer: Keypair, signers: Sequence[Keypair]) -> _Signed:
        answer = await self._rpc.call("getLatestBlockhash", [{"commitment": self._commitment}])
        try:
            blockhash = Hash.from_string(answer["value"]["blockhash"])
            height = int(answer["value"]["lastValidBlockHeight"])
        except (TypeError, KeyError, ValueError) as error:
            raise ChainUnavailable("getLatestBlockhash: the endpoint's answer has no blockhash") from error
        budget = [set_compute_unit_limit(COMPUTE_UNITS + next(self._distinct) % _DISTINCT)]
        if self._priority_fee:
            budget.append(set_compute_unit_price(self._priority_fee))
        everything = (*budget, *instructions)
        message = Message.new_with_blockhash(everything, payer.pubkey(), blockhash)
        keys = {payer.pubkey(): payer, **{signer.pubkey(): signer for signer in signers}}
        needed = message.account_keys[: message.header.num_required_signatures]
        missing = [str(key) for key in needed if key not in keys]
        if missing:
            raise TransactionFailed(f"no key is at hand to sign for {', '.join(missing)}", None, (), None)
        transaction = Transaction([keys[key] for key in needed], message, blockhash)
        wire = bytes(transaction)
        if len(wire) > MAX_TRANSACTION_BYTES:
            raise TransactionFailed(
                f"the transaction has {len(wire)} bytes, over the limit of {MAX_TRANSACTION_BYTES}; "
                "send fewer instructions at once",
                None,
                (),
                None,
            )
        return _Signed(wire, transaction.signatures[0], height, everything)

    # ------------------------------------------------------------------ confirming

    async def _land(self, signed: _Signed, deadline: float) -> Signature:
        """Broadcast until it has landed. Raises for one that the chain refused or executed and failed."""
        loop = asyncio.get_running_loop()
        pushed: asyncio.Future[Json] = loop.create_future()
        handle = self._subscribe(signed.signature, pushed)
        try:
            await self._broadcast(signed, first=True)
            sent_at, poll = loop.time(), _FIRST_POLL
            while not await self._confirmed(signed, pushed, min(self._pause(poll), deadline - loop.time())):
                poll = min(poll * 1.5, _LONGEST_POLL)
                if loop.time() >= deadline:
                    raise self._unconfirmed(signed.signature)
                await self._check_expiry(signed)
                if loop.time() - sent_at > _REBROADCAST_SECONDS:
                    await self._broadcast(signed, first=False)
                    sent_at = loop.time()
        finally:
            self._subscriptions.unsubscribe(handle)
        return signed.signature

    async def confirm(self, signature: Signature) -> None:
        """Wait for a transaction that another has sent. Raises TransactionFailed, ChainUnavailable."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        signed = _Signed(b"", signature, 0, ())
        pushed: asyncio.Future[Json] = loop.create_future()
        handle = self._subscribe(signature, pushed)
        try:
            poll = _FIRST_POLL
            while not await self._confirmed(signed, pushed, min(self._pause(poll), deadline - loop.time())):
                poll = min(poll * 1.5, _LONGEST_POLL)
                if loop.time() >= deadline:
                    raise self._unconfirmed(signature)
        finally:
            self._subscriptions.unsubscribe(handle)

    def _subscribe(self, signature: Signature, pushed: asyncio.Future[Json]) -> int:
        def push(value: Json) -> None:
            if value is not None and not pushed.done():
                pushed.set_result(value)

        return self._subscriptions.subscribe("signature", [str(signature), {"commitment": self._commitment}], push)

    def _pause(self, poll: float) -> float:
        """With a WebSocket the push ends the wait; the poll is then only there in case it is lost."""
        return max(poll, 1.0) if self._subscriptions.connected else poll

    def _unconfirmed(self, signature: Signature) -> ChainUnavailable:
        return ChainUnavailable(
            f"transaction {signature} was not confirmed within {self._patience:.0f} s; "
            "it may still have its effect, look before you send it again"
        )

    async def _confirmed(self, signed: _Signed, pushed: asyncio.Future[Json], seconds: float) -> bool:
        """Wait for the push, at most `seconds`; without one, ask."""
        await asyncio.wait((pushed,), timeout=max(seconds, 0.0))
        if not pushed.done():
            return await self._landed(signed)
        try:
            slot, error = pushed.result()["context"]["slot"], pushed.result()["value"]["err"]
        except (TypeError, KeyError):
            return await self._landed(signed)
        if error is not None:
            raise self._failure(signed, error, await self._logs(signed), signed.signature)
        if isinstance(slot, int):
            self._saw_slot(slot)
        return True

    async def _broadcast(self, signed: _Signed, *, first: bool) -> None:
        options = {
            "encoding": "base64",
            "skipPreflight": not first,
            "preflightCommitment": self._commitment,
        }
        text = base64.b64encode(signed.wire).decode()
        try:
            await self._rpc.call("sendTransaction", [text, options])
        except RpcError as error:
            if error.code != _PREFLIGHT_FAILURE or not isinstance(error.data, dict):
                raise TransactionFailed(f"transaction refused: {error.message}", None, (), None) from error
            cause = error.data.get("err")
            if cause in ("AlreadyProcessed", "BlockhashNotFound"):
                # Sent before, by an attempt whose answer was lost; or this endpoint is behind the one that gave the
                # blockhash. Either way it is for the loop to see what becomes of it.
                return
            logs = error.data.get("logs")
            raise self._failure(signed, cause, logs if isinstance(logs, list) else (), None) from error

    async def _landed(self, signed: _Signed) -> bool:
        """Whether it is confirmed, by asking. Raises for one that the chain executed and that failed."""
        status = await self._status(signed.signature)
        if status is None:
            return False
        reached = status.get("confirmationStatus")
        if reached not in _LEVELS or _LEVELS.index(reached) < _LEVELS.index(self._commitment):
            return False
        if status.get("err") is not None:
            raise self._failure(signed, status["err"], await self._logs(signed), signed.signature)
        if isinstance(status.get("slot"), int):
            self._saw_slot(status["slot"])
        return True

    async def _status(self, signature: Signature) -> dict[str, Json] | None:
        options = {"searchTransactionHistory": False}
        answer = await self._rpc.call("getSignatureStatuses", [[str(signature)], options])
        try:
            status = answer["value"][0]
        except (TypeError, KeyError, IndexError) as error:
            raise ChainUnavailable("getSignatureStatuses: the endpoint's answer has no status") from error
        return status if isinstance(status, dict) else None

    async def _check_expiry(self, signed: _Signed) -> None:
        height = await self._rpc.call("getBlockHeight", [{"commitment": self._commitment}])
        if not isinstance(height, int) or height <= signed.last_valid_height:
            return
        # It may have landed between the two looks, and now it cannot any more.
        if not await self._landed(signed):
            raise _Expired

    async def _logs(self, signed: _Signed) -> list[str]:
        options = {"encoding": "base64", "commitment": "confirmed", "maxSupportedTransactionVersion": 0}
        try:
            found = await self._rpc.call("getTransaction", [str(signed.signature), options], patience=_LOGS_PATIENCE)
            logs = found["meta"]["logMessages"]
        except (ChainError, TypeError, KeyError):
            return []  # the failure itself is known; its logs are a help, not more
        return [str(line) for line in logs] if isinstance(logs, list) else []

    def _failure(
        self, signed: _Signed, error: Json, logs: Sequence[Json], signature: Signature | None
    ) -> TransactionFailed:
        lines = [str(line)[:1000] for line in list(logs)[:200]]
        if isinstance(error, dict) and isinstance(error.get("InstructionError"), list):
            parts = error["InstructionError"]
            index, cause = parts if len(parts) == 2 else (None, None)
            if isinstance(index, int) and 0 <= index < len(signed.instructions):
                program = signed.instructions[index].program_id
                code = cause.get("Custom") if isinstance(cause, dict) else None
                if isinstance(code, int) and program == self._program_id:
                    return ProgramError(code, lines, error, signature)
                return TransactionFailed(f"program {program} failed: {cause}{_last(lines)}", error, lines, signature)
        if error in ("AccountNotFound", "InsufficientFundsForFee"):
            payer = Message.from_bytes(signed.wire[1 + 64 * signed.wire[0] :]).account_keys[0]
            text = f"wallet {payer} cannot pay the fee ({error}); send it some SOL"
            return TransactionFailed(text, error, lines, signature)
        return TransactionFailed(f"transaction failed: {error}{_last(lines)}", error, lines, signature)


def _last(lines: list[str]) -> str:
    return f" (last log line: {lines[-1]})" if lines else ""
