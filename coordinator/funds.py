"""Whether a wallet can pay for what is about to be sent, and what to do where it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Final
from urllib.parse import urlsplit

from solders.instruction import Instruction
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM_PROGRAM

from coordinator.chain import Chain
from coordinator.jsonrpc import ChainError
from coordinator.run_costs import fee_of

LAMPORTS_PER_SOL: Final = 1_000_000_000
# Of the system program, as 32-bit numbers in front of their arguments.
_CREATE_ACCOUNT: Final = 0
_TRANSFER: Final = 2
_CREATE_ACCOUNT_WITH_SEED: Final = 3


class Unfunded(ChainError):
    """A wallet has too little for what it is to pay; nothing was sent."""


def sol(lamports: int) -> str:
    """`1.5` for 1,500,000,000 lamports."""
    text = f"{Decimal(lamports) / LAMPORTS_PER_SOL:,.9f}"
    return text.rstrip("0").rstrip(".")


def lamports_needed(instructions: Sequence[Instruction], payer: Pubkey, priority_fee: int = 0) -> int:
    """Lamports that a transaction takes from its payer: deposits and transfers of the system program, and its fee.

    `priority_fee` is micro-lamports per compute unit.
    """
    signers = {payer} | {meta.pubkey for one in instructions for meta in one.accounts if meta.is_signer}
    return fee_of(len(signers), priority_fee) + sum(_taken(one, payer) for one in instructions)


async def require_funds(chain: Chain, wallet: Pubkey, needed: int, purpose: str) -> None:
    """Raises Unfunded if the wallet has less than `needed` lamports; the message says how to get them."""
    there = await chain.balance(wallet)
    if there >= needed:
        return
    lacking = needed - there
    text = f"wallet {wallet} has {sol(there)} SOL, and {purpose} takes {sol(needed)} SOL: send it {sol(lacking)} SOL"
    faucet = next((url for url in chain.rpc.urls if _has_faucet(urlsplit(url).hostname or "")), None)
    if faucet is not None:
        whole = max(1, -(-lacking // LAMPORTS_PER_SOL))
        text += f", here with: psyche-admin ledger airdrop {wallet} {whole} --rpc {faucet}"
    raise Unfunded(text)


def _has_faucet(host: str) -> bool:
    """Whether a chain is for tests: one's own, which gives SOL to whoever asks, or a public one that does."""
    return host in ("localhost", "::1") or host.startswith("127.") or "devnet" in host or "testnet" in host


def _taken(one: Instruction, payer: Pubkey) -> int:
    data = bytes(one.data)
    if one.program_id != SYSTEM_PROGRAM or not one.accounts or one.accounts[0].pubkey != payer or len(data) < 12:
        return 0
    kind = int.from_bytes(data[:4], "little")
    if kind == _CREATE_ACCOUNT_WITH_SEED:
        start = 44 + int.from_bytes(data[36:44], "little")  # behind the base's key and the seed
        return int.from_bytes(data[start : start + 8], "little")
    return int.from_bytes(data[4:12], "little") if kind in (_CREATE_ACCOUNT, _TRANSFER) else 0
