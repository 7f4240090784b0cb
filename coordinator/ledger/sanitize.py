"""A transaction as it comes in: what can be said of it, and against it, without the ledger's state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from solders.account import Account
from solders.address_lookup_table_account import AddressLookupTable
from solders.message import Message, MessageV0
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.transaction import VersionedTransaction

MAX_TRANSACTION_BYTES: Final = 1232


class Refused(Exception):
    """A transaction that never enters the ledger; no state changed and no fee was taken.

    `error` is Solana's name for it (as in a TransactionError), `text` says what and why.
    """

    def __init__(self, error: str, text: str) -> None:
        super().__init__(text)
        self.error = error
        self.text = text


@dataclass(frozen=True, slots=True)
class Checked:
    """A transaction that passed every check short of execution."""

    wire: bytes
    parsed: VersionedTransaction
    message_hash: bytes
    blockhash: bytes

    @property
    def signature(self) -> Signature:
        return self.parsed.signatures[0]


def sanitize(wire: bytes, *, signatures: bool = True) -> Checked:
    """Everything a cluster checks of a transaction by itself; of `signatures`, unless they are not asked for.

    Raises:
        Refused: too large, malformed or badly signed.
    """
    if len(wire) > MAX_TRANSACTION_BYTES:
        raise Refused("TooLarge", f"transaction is {len(wire)} bytes; the limit is {MAX_TRANSACTION_BYTES}")
    try:
        parsed = VersionedTransaction.from_bytes(wire)
        parsed.sanitize()
    except Exception as error:  # solders has no one base class for what its parsers raise
        raise Refused("SanitizeFailure", f"transaction cannot be decoded: {error}") from error
    message = parsed.message
    if not isinstance(message, Message | MessageV0):
        raise Refused("UnsupportedVersion", "transaction version is not supported; use legacy or 0")
    if bytes(parsed) != wire:
        raise Refused("SanitizeFailure", "transaction has bytes after its end, or is not in its shortest form")
    if len(parsed.signatures) != message.header.num_required_signatures or not parsed.signatures:
        raise Refused("SanitizeFailure", "transaction does not carry one signature per signer")
    if signatures and not all(parsed.verify_with_results()):
        raise Refused("SignatureFailure", "Transaction signature verification failure")
    return Checked(wire, parsed, bytes(message.hash()), bytes(message.recent_blockhash))


def accounts_of(
    message: Message | MessageV0, read: Callable[[Pubkey], Account | None]
) -> tuple[tuple[Pubkey, ...], tuple[Pubkey, ...], int]:
    """All keys of a message (tables resolved), those it may write, and the index of the first key from a table.

    `read` gives the account of a lookup table.
    """
    keys = message.account_keys
    header = message.header
    signers = header.num_required_signatures
    writable_signers = signers - header.num_readonly_signed_accounts
    writable_others = len(keys) - header.num_readonly_unsigned_accounts
    writable = keys[:writable_signers] + keys[signers:writable_others]
    if isinstance(message, Message) or not message.address_table_lookups:
        return tuple(keys), tuple(writable), len(keys)
    loaded: tuple[list[Pubkey], list[Pubkey]] = ([], [])
    for lookup in message.address_table_lookups:
        account = read(lookup.account_key)
        if account is None:
            continue  # the VM refuses the transaction
        try:
            table = AddressLookupTable.deserialize(account.data).addresses
        except Exception:  # not a table: the VM refuses the transaction
            continue
        for found, indexes in zip(loaded, (lookup.writable_indexes, lookup.readonly_indexes), strict=True):
            found.extend(table[i] for i in indexes if i < len(table))
    return (*keys, *loaded[0], *loaded[1]), (*writable, *loaded[0]), len(keys)
