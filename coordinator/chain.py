"""One connection to a chain: read accounts, send transactions. Knows nothing of runs; `client.py` does."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.signature import Signature

from coordinator.rpc import PATIENCE_SECONDS, ChainError, ChainUnavailable, Endpoints, Json, RpcError
from coordinator.subscriptions import Subscriptions
from coordinator.transactions import ProgramError, Sender, TransactionFailed

__all__ = ["Account", "Chain", "ChainError", "ChainUnavailable", "ProgramError", "RpcError", "TransactionFailed"]

COMMITMENTS: Final = ("processed", "confirmed", "finalized")
_CONFIRM_SECONDS: Final = 90.0


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
        priority_fee: micro-lamports per compute unit; raise it when transactions expire on a busy cluster.
        patience: seconds that a call may take with all its attempts, before ChainUnavailable.
    """

    def __init__(
        self,
        rpc_urls: Sequence[str],
        wallet: Keypair | None = None,
        *,
        program_id: Pubkey | None = None,
        commitment: str = "confirmed",
        priority_fee: int = 0,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        if commitment not in COMMITMENTS:
            raise ValueError(f"commitment {commitment!r} must be one of {', '.join(COMMITMENTS)}")
        self.rpc = Endpoints(rpc_urls, patience=patience)
        self.subscriptions = Subscriptions(rpc_urls)
        self.wallet = wallet
        self.commitment = commitment
        self._sender = Sender(
            self.rpc,
            self.subscriptions,
            program_id,
            commitment=commitment,
            priority_fee=priority_fee,
            patience=max(_CONFIRM_SECONDS, patience),
            saw_slot=self._saw_slot,
        )
        # Reads never go back behind what was seen, also when another endpoint, further behind, takes over.
        self._seen_slot = 0
        self._rent: tuple[int, int] | None = None

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
        return _integer("getSlot", await self.rpc.call("getSlot", [{"commitment": self.commitment}]))

    async def balance(self, key: Pubkey) -> int:
        """Lamports of an account; 0 where there is none."""
        answer = await self._read("getBalance", str(key), {})
        return _integer("getBalance", answer)

    async def account(self, key: Pubkey, window: tuple[int, int] | None = None) -> Account | None:
        """An account, or None. `window` (offset, length) limits the data that is sent."""
        answer = await self._read("getAccountInfo", str(key), _account_options(window))
        return None if answer is None else _account("getAccountInfo", answer)

    async def accounts(
        self, keys: Sequence[Pubkey], window: tuple[int, int] | None = None
    ) -> tuple[int, tuple[Account | None, ...]]:
        """Several accounts as of one slot, and that slot."""
        method = "getMultipleAccounts"
        answer = await self._read(method, [str(key) for key in keys], _account_options(window))
        if not isinstance(answer, list) or len(answer) != len(keys):
            raise _unusable(method)
        return self._seen_slot, tuple(None if one is None else _account(method, one) for one in answer)

    async def program_accounts(
        self, program: Pubkey, mark: bytes, window: tuple[int, int]
    ) -> list[tuple[Pubkey, Account]]:
        """The accounts of a program whose data begins with `mark`."""
        method = "getProgramAccounts"
        options = _account_options(window) | {"commitment": self.commitment}
        encoded = base64.b64encode(mark).decode()
        options["filters"] = [{"memcmp": {"offset": 0, "bytes": encoded, "encoding": "base64"}}]
        answer = await self.rpc.call(method, [str(program), options])
        try:
            return [(Pubkey.from_string(one["pubkey"]), _account(method, one["account"])) for one in answer]
        except (TypeError, KeyError, ValueError) as error:
            raise _unusable(method) from error

    async def _read(self, method: str, what: Json, options: dict[str, Json]) -> Json:
        """The `value` of a call whose answer has a context; its slot is remembered."""
        options = options | {"commitment": self.commitment}
        if self._seen_slot:
            options["minContextSlot"] = self._seen_slot
        try:
            answer = await self.rpc.call(method, [what, options])
        except ChainUnavailable:
            # Perhaps a slot was remembered that never was: a lying endpoint, or a ledger that started anew.
            self._seen_slot = 0
            raise
        if not isinstance(answer, dict) or not isinstance(answer.get("context"), dict) or "value" not in answer:
            raise _unusable(method)
        self._saw_slot(_integer(method, answer["context"].get("slot")))
        return answer["value"]

    def _saw_slot(self, slot: int) -> None:
        self._seen_slot = max(self._seen_slot, slot)

    # ------------------------------------------------------------------ rent

    async def load_rent(self) -> None:
        """Learn what an account's deposit costs on this chain; `rent_exempt` can be used from then on."""
        if self._rent is None:
            method = "getMinimumBalanceForRentExemption"
            empty = _integer(method, await self.rpc.call(method, [0]))
            larger = _integer(method, await self.rpc.call(method, [1_000_000]))
            self._rent = (empty, (larger - empty) // 1_000_000)

    def rent_exempt(self, size: int) -> int:
        """Lamports that make an account of `size` bytes exempt from rent. Call `load_rent` first."""
        if self._rent is None:
            raise RuntimeError("the chain's rent is not known yet; await load_rent() first")
        return self._rent[0] + self._rent[1] * size

    # ------------------------------------------------------------------ writing

    async def send(
        self, *instructions: Instruction, extra_signers: Sequence[Keypair] = (), payer: Keypair | None = None
    ) -> Signature:
        """Sign with the wallet (or `payer`) and `extra_signers`, send, confirm; safe against loss and expiry.

        Raises:
            ProgramError: the coordinator program refused, with its number.
            TransactionFailed: another failure; the message names it.
            ChainUnavailable: not confirmed in the time allowed.
        """
        payer = payer or self.wallet
        if payer is None:
            raise ChainError("this connection has no wallet, so it can only read; open it with a wallet to send")
        return await self._sender.send(instructions, payer, extra_signers)

    async def airdrop(self, to: Pubkey, lamports: int) -> Signature:
        """Ask the faucet of a test chain for lamports, and wait until they have arrived.

        Raises:
            RpcError: the chain has no faucet, or it refuses.
            ChainUnavailable: they did not arrive in time.
        """
        answer = await self.rpc.call("requestAirdrop", [str(to), lamports])
        try:
            signature = Signature.from_string(answer)
        except (TypeError, ValueError) as error:
            raise _unusable("requestAirdrop") from error
        await self._sender.confirm(signature)
        return signature


def _account_options(window: tuple[int, int] | None) -> dict[str, Json]:
    options: dict[str, Json] = {"encoding": "base64"}
    if window is not None:
        options["dataSlice"] = {"offset": window[0], "length": window[1]}
    return options


def _unusable(method: str) -> ChainUnavailable:
    return ChainUnavailable(f"{method}: the RPC endpoint's answer does not have Solana's shape; is the URL right?")


def _integer(method: str, value: Json) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise _unusable(method)
    return value


def _account(method: str, value: Json) -> Account:
    try:
        text, encoding = value["data"]
        if encoding != "base64":
            raise ValueError(encoding)
        return Account(
            owner=Pubkey.from_string(value["owner"]),
            lamports=_integer(method, value["lamports"]),
            data=base64.b64decode(text, validate=True),
            executable=bool(value["executable"]),
        )
    except (TypeError, KeyError, ValueError, binascii.Error) as error:
        raise _unusable(method) from error
