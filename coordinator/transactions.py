"""Transactions: signing, sending, confirming, and sending again when a blockhash expires.

A transaction is signed once and its same bytes are sent as often as needed, which is safe: the chain executes them at
most once. Only when its blockhash has expired *and* the chain, at a slot after that, does not know it is a new one
signed. The first sending of each is simulated by the endpoint, so that one that must fail costs nothing.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
import math
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

from coordinator.failures import TransactionFailed, failure, refused
from coordinator.fees import PriorityFees
from coordinator.jsonrpc import ChainError, Json, RpcError, Unusable, integer
from coordinator.rpc import ChainUnavailable, Endpoints
from coordinator.subscriptions import Subscriptions

log = logging.getLogger(__name__)

MAX_TRANSACTION_BYTES: Final = 1232
# Enough for any instruction of the program and of the loader; priority fees are paid on it, so it is not generous.
COMPUTE_UNITS: Final = 120_000
_LEVELS: Final = ("processed", "confirmed", "finalized")
_DISTINCT: Final = 4096
_MAX_SIGNED: Final = 8
_PREFLIGHT_FAILURE: Final = -32002
_FIRST_POLL: Final = 0.05
_LONGEST_POLL: Final = 2.0
# Sent again after this many slots, and within these bounds in seconds.
_AGAIN_SLOTS: Final = 5
_LEAST_AGAIN: Final = 0.4
_MOST_AGAIN: Final = 2.0
_LOGS_PATIENCE: Final = 2.0


@dataclass(frozen=True, slots=True)
class _Signed:
    wire: bytes
    signature: Signature
    last_valid_height: int
    payer: Pubkey
    instructions: tuple[Instruction, ...]


class _Expired(Exception):
    """The blockhash is too old and the chain does not know the transaction: it can never land."""


class Sender:
    """Sends transactions for one wallet or several.

    Args:
        rpc, subscriptions: the way to the chain.
        program_id: whose errors are `ProgramError`s.
        commitment: the level at which a transaction counts as done: processed, confirmed or finalized.
        fees: the priority fee, on top of the base fee.
        patience: seconds for one transaction with all its attempts.
        slot_seconds: how long a slot takes, as far as it is known.
    """

    def __init__(
        self,
        rpc: Endpoints,
        subscriptions: Subscriptions,
        program_id: Pubkey | None,
        *,
        commitment: str,
        fees: PriorityFees,
        patience: float,
        slot_seconds: Callable[[], float],
    ) -> None:
        self._rpc = rpc
        self._subscriptions = subscriptions
        self._program_id = program_id
        self._commitment = commitment
        self._fees = fees
        self._patience = patience
        self._slot_seconds = slot_seconds
        # Two equal instructions in one slot would be one transaction to the chain, and the second would be taken for
        # a duplicate of the first. A few compute units more or less make every transaction its own.
        self._distinct = itertools.count(random.randrange(_DISTINCT))

    async def send(
        self, instructions: Sequence[Instruction], payer: Keypair, signers: Sequence[Keypair], compute_units: int
    ) -> Signature:
        """Send and confirm.

        Raises:
            ProgramError: the program refused.
            TransactionFailed: it failed otherwise, or is too large.
            ChainUnavailable: it could not be confirmed within the patience; it may still have its effect.
        """
        deadline = asyncio.get_running_loop().time() + self._patience
        given_up: list[_Signed] = []
        for expired in range(_MAX_SIGNED):
            signed = await self._sign(instructions, payer, signers, compute_units, expired)
            try:
                return await self._land(signed, deadline)
            except _Expired:
                log.warning("transaction %s expired before it landed; signing it again", signed.signature)
                given_up.append(signed)
            except TransactionFailed:
                # It may have failed because an earlier one did land after all, by an endpoint that was behind.
                for earlier in given_up:
                    if await self._landed(earlier, history=True):
                        return earlier.signature
                raise
        raise ChainUnavailable(
            f"a transaction expired {_MAX_SIGNED} times before the chain took it; the cluster is congested: "
            "set a priority fee or a higher one"
        )

    async def _sign(
        self,
        instructions: Sequence[Instruction],
        payer: Keypair,
        signers: Sequence[Keypair],
        compute_units: int,
        expired: int,
    ) -> _Signed:
        options: dict[str, Json] = {"commitment": self._commitment}
        if self._rpc.seen_slot:
            options["minContextSlot"] = self._rpc.seen_slot
        blockhash, height = await self._rpc.ask("getLatestBlockhash", [options], _blockhash)
        budget = [set_compute_unit_limit(compute_units + next(self._distinct) % _DISTINCT)]
        written = {str(meta.pubkey) for one in instructions for meta in one.accounts if meta.is_writable}
        if price := await self._fees.price(sorted(written), expired):
            budget.append(set_compute_unit_price(price))
        everything = (*budget, *instructions)
        message = Message.new_with_blockhash(everything, payer.pubkey(), blockhash)
        keys = {payer.pubkey(): payer, **{signer.pubkey(): signer for signer in signers}}
        needed = message.account_keys[: message.header.num_required_signatures]
        missing = [str(key) for key in needed if key not in keys]
        if missing:
            raise refused(f"no key is at hand to sign for {', '.join(missing)}; open the client with its wallet")
        transaction = Transaction([keys[key] for key in needed], message, blockhash)
        wire = bytes(transaction)
        if len(wire) > MAX_TRANSACTION_BYTES:
            raise refused(
                f"the transaction has {len(wire)} bytes, over the limit of {MAX_TRANSACTION_BYTES}; "
                "send fewer instructions at once"
            )
        return _Signed(wire, transaction.signatures[0], height, payer.pubkey(), everything)

    # ------------------------------------------------------------------ confirming

    async def _land(self, signed: _Signed, deadline: float) -> Signature:
        """Broadcast until it has landed. Raises for one that the chain refused, or executed and failed."""
        loop = asyncio.get_running_loop()
        pushed: asyncio.Future[Json] = loop.create_future()
        handle = self._subscribe(signed.signature, pushed)
        simulated, sent_at, poll = False, -math.inf, _FIRST_POLL
        try:
            while True:
                try:
                    if not simulated:
                        simulated = await self._simulate_and_send(signed)
                        sent_at = loop.time()
                    elif loop.time() - sent_at >= self._again_seconds():
                        await self._send_again(signed)
                        sent_at = loop.time()
                    if await self._confirmed(signed, pushed, min(self._pause(poll), deadline - loop.time())):
                        return signed.signature
                    await self._check_expiry(signed)
                except ChainUnavailable as error:
                    # What has been sent may land all the same, and an outage may end before the patience does.
                    log.warning("transaction %s: not known yet whether it has landed: %s", signed.signature, error)
                    # With every endpoint in a pause it is known at once.
                    await asyncio.sleep(min(poll, max(deadline - loop.time(), 0.0)))
                poll = min(poll * 1.5, _LONGEST_POLL)
                if loop.time() >= deadline:
                    raise self._unconfirmed(signed.signature)
        finally:
            self._subscriptions.unsubscribe(handle)

    async def confirm(self, signature: Signature) -> None:
        """Wait for a transaction that another has sent. Raises TransactionFailed, ChainUnavailable."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        signed = _Signed(b"", signature, 0, Pubkey.default(), ())
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
            # One that makes no sense is none: it must not end the pauses between two looks.
            if _is_status(value) and not pushed.done():
                pushed.set_result(value)

        return self._subscriptions.subscribe("signature", [str(signature), {"commitment": self._commitment}], push)

    def _again_seconds(self) -> float:
        return min(max(_AGAIN_SLOTS * self._slot_seconds(), _LEAST_AGAIN), _MOST_AGAIN)

    def _pause(self, poll: float) -> float:
        """With a WebSocket the push ends the wait; the poll is then only there in case it is lost."""
        return max(poll, min(self._again_seconds(), 1.0)) if self._subscriptions.connected else poll

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
        slot, error = pushed.result()["context"]["slot"], pushed.result()["value"]["err"]
        if error is not None:
            raise self._failure(signed, error, await self._logs(signed), signed.signature)
        if isinstance(slot, int):
            self._rpc.saw_slot(slot)
        return True

    # ------------------------------------------------------------------ broadcasting

    async def _simulate_and_send(self, signed: _Signed) -> bool:
        """Have one endpoint simulate it and, if that succeeds, send it. False where it cannot say yet."""
        options: dict[str, Json] = {
            "encoding": "base64",
            "skipPreflight": False,
            "preflightCommitment": self._commitment,
        }
        if self._rpc.seen_slot:
            # On an older state than the one that this transaction was made for it might fail and not deserve it.
            options["minContextSlot"] = self._rpc.seen_slot
        try:
            await self._rpc.call("sendTransaction", [_encoded(signed), options])
        except RpcError as error:
            if error.code != _PREFLIGHT_FAILURE or not isinstance(error.data, dict):
                raise refused(f"transaction refused: {error.message}") from error
            cause = error.data.get("err")
            if cause == "BlockhashNotFound":
                return False  # this endpoint is behind the one that gave the blockhash
            if cause == "AlreadyProcessed":
                return True  # sent before, by an attempt whose answer was lost
            logs = error.data.get("logs")
            raise self._failure(signed, cause, logs if isinstance(logs, list) else (), None) from error
        return True

    async def _send_again(self, signed: _Signed) -> None:
        """To every endpoint: the one that took it may have lost it."""
        await self._rpc.spread("sendTransaction", [_encoded(signed), {"encoding": "base64", "skipPreflight": True}])

    # ------------------------------------------------------------------ asking

    async def _landed(self, signed: _Signed, *, history: bool = False) -> bool:
        """Whether it is confirmed, by asking. Raises for one that the chain executed and that failed."""
        _, status = await self._status(signed.signature, history=history)
        if status is None:
            return False
        reached = status.get("confirmationStatus")
        if reached not in _LEVELS or _LEVELS.index(reached) < _LEVELS.index(self._commitment):
            return False
        if status.get("err") is not None:
            raise self._failure(signed, status["err"], await self._logs(signed), signed.signature)
        if isinstance(status.get("slot"), int):
            self._rpc.saw_slot(status["slot"])
        return True

    async def _status(self, signature: Signature, *, history: bool) -> tuple[int, dict[str, Json] | None]:
        """The slot as of which the chain was asked, and what it knows of the transaction."""
        method = "getSignatureStatuses"
        try:
            options = {"searchTransactionHistory": history}
            return await self._rpc.ask(method, [[str(signature)], options], _first_status)
        except RpcError:
            if not history:
                raise
            # No endpoint keeps a history: what it remembers without one is two and a half minutes, for a cluster.
            return await self._rpc.ask(method, [[str(signature)]], _first_status)

    async def _check_expiry(self, signed: _Signed) -> None:
        # Never by a processed block: it may be of a fork that dies, and on the one that lives the transaction can land.
        level = "confirmed" if self._commitment == "processed" else self._commitment
        slot, height = await self._rpc.ask("getEpochInfo", [{"commitment": level}], _slot_and_height)
        if height <= signed.last_valid_height:
            return
        # It may have landed between the two looks, and now it cannot any more. The second look may be at another
        # endpoint: what that does not know counts only if it is as far as the first.
        as_of, status = await self._status(signed.signature, history=True)
        if status is None and as_of >= slot:
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
        return failure(
            error,
            logs,
            payer=signed.payer,
            instructions=signed.instructions,
            program_id=self._program_id,
            signature=signature,
        )


def _encoded(signed: _Signed) -> str:
    return base64.b64encode(signed.wire).decode()


def _blockhash(answer: Json) -> tuple[Hash, int]:
    try:
        return Hash.from_string(answer["value"]["blockhash"]), integer(answer["value"]["lastValidBlockHeight"])
    except (TypeError, KeyError, ValueError) as error:
        raise Unusable("the answer has no blockhash") from error


def _is_status(value: Json) -> bool:
    """Whether a push says how a transaction ended."""
    parts = (value.get("value"), value.get("context")) if isinstance(value, dict) else (None, None)
    return all(isinstance(part, dict) and key in part for part, key in zip(parts, ("err", "slot"), strict=True))


def _first_status(answer: Json) -> tuple[int, dict[str, Json] | None]:
    try:
        slot, status = integer(answer["context"]["slot"]), answer["value"][0]
    except (TypeError, KeyError, IndexError) as error:
        raise Unusable("the answer has no status") from error
    return slot, status if isinstance(status, dict) else None


def _slot_and_height(answer: Json) -> tuple[int, int]:
    try:
        return integer(answer["absoluteSlot"]), integer(answer["blockHeight"])
    except (TypeError, KeyError) as error:
        raise Unusable("the answer has no slot and height") from error
