"""One connection to a chain: read accounts, send transactions. Knows nothing of runs; `client.py` does."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Self, TypeVar

from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.signature import Signature

from coordinator.failures import ProgramError, TransactionFailed
from coordinator.fees import DEFAULT_FEE_CAP, PriorityFee, PriorityFees
from coordinator.jsonrpc import NO_SHAPE, ChainError, Json, RpcError, Unusable, integer
from coordinator.rpc import PATIENCE_SECONDS, ChainUnavailable, Endpoints
from coordinator.subscriptions import Subscriptions
from coordinator.transactions import COMPUTE_UNITS, Sender
from coordinator.watch import Pace

__all__ = ["Account", "Chain", "ChainError", "ChainUnavailable", "ProgramError", "RpcError", "TransactionFailed"]

COMMITMENTS: Final = ("processed", "confirmed", "finalized")
_CONFIRM_SECONDS: Final = 90.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Account:
    """An account as read: `data` is the part that was asked for."""

    owner: Pubkey
    lamports: int
    data: bytes
    executable: bool


class Chain:
    """A connection to a chain through one or several RPC endpoints.

    Args:
        rpc_urls: RPC endpoints in order of preference; the next one takes over where one fails.
        wallet: pays for and signs what is sent; None to read only.
        program_id: the coordinator program, whose error numbers are then `ProgramError`s.
        commitment: the level at which state is read and transactions count as done.
        priority_fee: micro-lamports per compute unit, or "auto": what the cluster has lately asked for.
        priority_fee_cap: micro-lamports per compute unit that "auto" never goes above.
        patience: seconds that a call may take with all its attempts, before ChainUnavailable.
    """

    def __init__(
        self,
        rpc_urls: Sequence[str],
        wallet: Keypair | None = None,
        *,
        program_id: Pubkey | None = None,
        commitment: str = "confirmed",
        priority_fee: PriorityFee = 0,
        priority_fee_cap: int = DEFAULT_FEE_CAP,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        if commitment not in COMMITMENTS:
            raise ValueError(f"commitment {commitment!r} must be one of {', '.join(COMMITMENTS)}")
        self.rpc = Endpoints(rpc_urls, patience=patience, commitment=commitment)
        self.subscriptions = Subscriptions(rpc_urls)
        self.wallet = wallet
        self.commitment = commitment
        self._sender = Sender(
            self.rpc,
            self.subscriptions,
            program_id,
            commitment=commitment,
            fees=PriorityFees(self.rpc, priority_fee, priority_fee_cap),
            patience=max(_CONFIRM_SECONDS, patience),
            slot_seconds=lambda: self.slot_seconds,
        )
        self.pace = Pace()
        self._rent: tuple[int, int] | None = None

    @property
    def slot_seconds(self) -> float:
        """Seconds per slot, as measured; 0.4, a cluster's, before that."""
        return self.pace.slot_seconds

    async def close(self) -> None:
        await self.subscriptions.close()
        await self.rpc.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ------------------------------------------------------------------ reading

    async def slot(self) -> int:
        """The current slot."""
        slot = await self.rpc.ask("getSlot", [{"commitment": self.commitment}], integer)
        self.rpc.saw_slot(slot)
        return slot

    async def balance(self, key: Pubkey) -> int:
        """Lamports of an account; 0 where there is none."""
        return (await self._read("getBalance", str(key), {}, integer))[1]

    async def account(self, key: Pubkey, window: tuple[int, int] | None = None) -> Account | None:
        """An account, or None. `window` (offset, length) limits the data that is sent."""
        return (await self._read("getAccountInfo", str(key), _account_options(window), _account_or_none))[1]

    async def accounts(
        self, keys: Sequence[Pubkey], window: tuple[int, int] | None = None
    ) -> tuple[int, tuple[Account | None, ...]]:
        """Several accounts as of one slot, and that slot."""

        def read(answer: Json) -> tuple[Account | None, ...]:
            if not isinstance(answer, list) or len(answer) != len(keys):
                raise Unusable(NO_SHAPE)
            return tuple(_account_or_none(one) for one in answer)

        return await self._read("getMultipleAccounts", [str(key) for key in keys], _account_options(window), read)

    async def program_accounts(
        self, program: Pubkey, mark: bytes, window: tuple[int, int]
    ) -> list[tuple[Pubkey, Account]]:
        """The accounts of a program whose data begins with `mark`."""
        options = _account_options(window) | {"commitment": self.commitment}
        encoded = base64.b64encode(mark).decode()
        options["filters"] = [{"memcmp": {"offset": 0, "bytes": encoded, "encoding": "base64"}}]

        def read(answer: Json) -> list[tuple[Pubkey, Account]]:
            try:
                return [(Pubkey.from_string(one["pubkey"]), _account(one["account"])) for one in answer]
            except (TypeError, KeyError, ValueError) as error:
                raise Unusable(NO_SHAPE) from error

        return await self.rpc.ask("getProgramAccounts", [str(program), options], read)

    async def _read(
        self, method: str, what: Json, options: dict[str, Json], read: Callable[[Json], T]
    ) -> tuple[int, T]:
        """The `value` of a call whose answer has a context, and the slot that it is from.

        An endpoint that is behind what has been seen refuses; one that answers all the same is caught here.
        """
        least = self.rpc.seen_slot
        options = options | {"commitment": self.commitment}
        if least:
            options["minContextSlot"] = least

        def read_value(answer: Json) -> tuple[int, T]:
            if not isinstance(answer, dict) or not isinstance(answer.get("context"), dict) or "value" not in answer:
                raise Unusable(NO_SHAPE)
            slot = integer(answer["context"].get("slot"))
            if slot < least:
                raise Unusable(f"the answer is from slot {slot}, and slot {least} has been seen", behind=True)
            return slot, read(answer["value"])

        try:
            slot, value = await self.rpc.ask(method, [what, options], read_value)
        except ChainUnavailable as error:
            # Perhaps a slot was remembered that never was: a lying endpoint, or a ledger that started anew.
            if error.behind and self.rpc.seen_slot == least:
                self.rpc.seen_slot = 0
            raise
        self.rpc.saw_slot(slot)
        self.pace.see(self.rpc.seen_slot)
        return slot, value

    # ------------------------------------------------------------------ rent

    async def load_rent(self) -> None:
        """Learn what an account's deposit costs on this chain; `rent_exempt` can be used from then on."""
        if self._rent is None:
            method = "getMinimumBalanceForRentExemption"
            empty = await self.rpc.ask(method, [0], integer)
            larger = await self.rpc.ask(method, [1_000_000], integer)
            self._rent = (empty, (larger - empty) // 1_000_000)

    def rent_exempt(self, size: int) -> int:
        """Lamports that make an account of `size` bytes exempt from rent. Call `load_rent` first."""
        if self._rent is None:
            raise RuntimeError("the chain's rent is not known yet; await load_rent() first")
        return self._rent[0] + self._rent[1] * size

    # ------------------------------------------------------------------ writing

    async def send(
        self,
        *instructions: Instruction,
        extra_signers: Sequence[Keypair] = (),
        payer: Keypair | None = None,
        compute_units: int = COMPUTE_UNITS,
    ) -> Signature:
        """Sign with the wallet (or `payer`) and `extra_signers`, send, confirm; safe against loss and expiry.

        `compute_units` is what all instructions together may use; priority fees are paid on it.

        Raises:
            ProgramError: the coordinator program refused, with its number.
            TransactionFailed: another failure; the message names it.
            ChainUnavailable: not confirmed in the time allowed.
        """
        payer = payer or self.wallet
        if payer is None:
            raise ChainError("this connection has no wallet, so it can only read; open it with a wallet to send")
        return await self._sender.send(instructions, payer, extra_signers, compute_units)

    async def airdrop(self, to: Pubkey, lamports: int) -> Signature:
        """Ask the faucet of a test chain for lamports, and wait until they have arrived.

        Raises:
            RpcError: the chain has no faucet, or it refuses.
            ChainUnavailable: they did not arrive in time.
        """
        signature = await self.rpc.ask("requestAirdrop", [str(to), lamports], _signature)
        await self._sender.confirm(signature)
        return signature


def _account_options(window: tuple[int, int] | None) -> dict[str, Json]:
    options: dict[str, Json] = {"encoding": "base64"}
    if window is not None:
        options["dataSlice"] = {"offset": window[0], "length": window[1]}
    return options


def _signature(answer: Json) -> Signature:
    try:
        return Signature.from_string(answer)
    except (TypeError, ValueError) as error:
        raise Unusable(NO_SHAPE) from error


def _account_or_none(value: Json) -> Account | None:
    return None if value is None else _account(value)


def _account(value: Json) -> Account:
    try:
        text, encoding = value["data"]
        if encoding != "base64":
            raise ValueError(encoding)
        return Account(
            owner=Pubkey.from_string(value["owner"]),
            lamports=integer(value["lamports"]),
            data=base64.b64decode(text, validate=True),
            executable=bool(value["executable"]),
        )
    except (TypeError, KeyError, ValueError, binascii.Error) as error:
        raise Unusable(NO_SHAPE) from error
