"""What a ledger's state consists of, apart from the virtual machine: plain values for history and snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from solders.account import Account
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.transaction_metadata import TransactionMetadata

from coordinator.ledger.encoding import Json

MAX_BLOCKHASH_AGE: Final = 150
"""Slots for which a transaction that names a blockhash is accepted, as on a cluster."""


@dataclass(slots=True)
class Record:
    """A transaction that entered the ledger: it succeeded, or it failed and paid its fee.

    `keys` are all accounts in message order, `writable` those that the transaction may change. `error` is Solana's
    JSON for a TransactionError, or None. Balances are lamports, in the order of `keys`.
    """

    signature: Signature
    slot: int
    unix_time: int
    transaction: bytes
    keys: tuple[Pubkey, ...]
    loaded_from: int
    writable: tuple[Pubkey, ...]
    error: Json
    meta: TransactionMetadata
    balances_before: tuple[int, ...]
    balances_after: tuple[int, ...]


class Block(NamedTuple):
    """A slot that is over. `parent` is the slot before it, `blockhash` what its end is known by."""

    slot: int
    parent: int
    height: int
    unix_time: int
    blockhash: bytes
    previous: bytes


@dataclass(slots=True, kw_only=True)
class Chain:
    """Everything about slots and blockhashes. `blockhashes`: (hash, block height, messages seen with it), oldest first.

    `slot_hashes` are the entries of the sysvar, newest first; `blocks` the latest slots that are over, oldest first.
    """

    genesis_hash: bytes
    slot: int
    block_height: int
    unix_time: int
    transaction_count: int
    airdrops: int
    entry: bytes
    bank_hash: bytes
    mixin: bytes
    slot_hashes: tuple[bytes, ...]
    blockhashes: tuple[tuple[bytes, int, set[bytes]], ...]
    blocks: tuple[Block, ...]


@dataclass(slots=True, kw_only=True)
class State(Chain):
    """A whole state, as it is read from a snapshot. `records` are oldest first."""

    accounts: Iterable[tuple[Pubkey, Account]]
    records: Iterable[Record]


class Capture:
    """A bank's state at one moment, read piece by piece while the bank goes on.

    The bank calls `keep` before it changes accounts; what has not been read by then is put aside.

    Args:
        chain: slots and blockhashes, copied.
        records: the history, oldest first.
        accounts: the addresses to read; it is this object's from here on.
        read: reads an account now.
    """

    def __init__(
        self,
        chain: Chain,
        records: tuple[Record, ...],
        accounts: dict[Pubkey, None],
        read: Callable[[Pubkey], Account | None],
    ) -> None:
        self.chain = chain
        self.records = records
        self._unread = accounts
        self._kept: dict[Pubkey, Account | None] = {}
        self._read = read

    def keep(self, keys: Iterable[Pubkey]) -> None:
        """These accounts are about to change."""
        for key in keys:
            if key in self._unread:
                del self._unread[key]
                self._kept[key] = self._read(key)

    def accounts(self) -> Iterator[tuple[Pubkey, Account]]:
        """Each account once, in no order, as it was. May be continued after the bank has gone on."""
        while self._kept or self._unread:
            if self._kept:
                key, account = self._kept.popitem()
            else:
                key, _ = self._unread.popitem()
                account = self._read(key)
            if account is not None and account.lamports:
                yield key, account
