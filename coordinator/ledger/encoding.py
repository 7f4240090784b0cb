"""Solana's JSON shapes: accounts, transactions, errors. Plain dicts; nothing here knows the bank."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any, Final

from solders.account import Account
from solders.message import Message, MessageV0, MessageV1
from solders.pubkey import Pubkey
from solders.transaction import VersionedTransaction
from solders.transaction_metadata import TransactionMetadata
from solders.transaction_status import (
    TransactionConfirmationStatus,
    TransactionErrorType,
    TransactionStatus,
)

from coordinator.base58 import base58_encode

if TYPE_CHECKING:
    from coordinator.ledger.state import Record

Json = Any

MAX_BASE58_BYTES: Final = 128
# Rent no longer moves an account between epochs; clusters report the largest u64.
_RENT_EPOCH: Final = 2**64 - 1


class UnsupportedEncoding(ValueError):
    """The data cannot be given in the encoding asked for."""


def error_json(error: TransactionErrorType) -> Json:
    """A TransactionError in Solana's JSON, such as {"InstructionError": [0, {"Custom": 6002}]}."""
    # solders serialises the error correctly only inside this type.
    status = TransactionStatus(0, None, error, error, TransactionConfirmationStatus.Finalized)
    return json.loads(status.to_json())["err"]


def data_json(data: bytes, encoding: str) -> Json:
    """Account data in one of Solana's encodings; jsonParsed falls back to base64, as for any unknown program."""
    if encoding in ("base64", "jsonParsed"):
        return [base64.b64encode(data).decode(), "base64"]
    if encoding in ("base58", "binary"):
        if len(data) > MAX_BASE58_BYTES:
            raise UnsupportedEncoding(
                f"Encoded binary (base 58) data should be less than {MAX_BASE58_BYTES} bytes, "
                "please use Base64 encoding."
            )
        text = base58_encode(data)
        return text if encoding == "binary" else [text, "base58"]
    raise UnsupportedEncoding(f"encoding {encoding!r} is not supported; use base64")


def account_json(account: Account, encoding: str = "base64", window: tuple[int, int] | None = None) -> dict[str, Json]:
    """An account; `window` is a (offset, length) slice of its data."""
    data = account.data
    size = len(data)
    if window is not None:
        data = data[window[0] : window[0] + window[1]]
    return {
        "lamports": account.lamports,
        "data": data_json(data, encoding),
        "owner": str(account.owner),
        "executable": account.executable,
        "rentEpoch": _RENT_EPOCH,
        "space": size,
    }


def _instruction_json(keys_at: bytes, program: int, data: bytes, height: int | None) -> dict[str, Json]:
    return {
        "programIdIndex": program,
        "accounts": list(keys_at),
        "data": base58_encode(data),
        "stackHeight": height,
    }


def message_json(message: Message | MessageV0 | MessageV1) -> dict[str, Json]:
    header = message.header
    shape: dict[str, Json] = {
        "header": {
            "numRequiredSignatures": header.num_required_signatures,
            "numReadonlySignedAccounts": header.num_readonly_signed_accounts,
            "numReadonlyUnsignedAccounts": header.num_readonly_unsigned_accounts,
        },
        "accountKeys": [str(key) for key in message.account_keys],
        "recentBlockhash": str(message.recent_blockhash),
        "instructions": [
            _instruction_json(bytes(ix.accounts), ix.program_id_index, bytes(ix.data), None)
            for ix in message.instructions
        ],
    }
    if isinstance(message, MessageV0):
        shape["addressTableLookups"] = [
            {
                "accountKey": str(lookup.account_key),
                "writableIndexes": list(lookup.writable_indexes),
                "readonlyIndexes": list(lookup.readonly_indexes),
            }
            for lookup in message.address_table_lookups
        ]
    return shape


def transaction_json(wire: bytes, encoding: str) -> Json:
    """A transaction as `json` (also for jsonParsed), `base64` or `base58`."""
    if encoding in ("json", "jsonParsed"):
        parsed = VersionedTransaction.from_bytes(wire)
        return {"signatures": [str(s) for s in parsed.signatures], "message": message_json(parsed.message)}
    if encoding == "base64":
        return [base64.b64encode(wire).decode(), "base64"]
    if encoding == "base58":
        return [base58_encode(wire), "base58"]
    if encoding == "binary":
        return base58_encode(wire)
    raise UnsupportedEncoding(f"encoding {encoding!r} is not supported; use json or base64")


def inner_instructions_json(meta: TransactionMetadata) -> list[Json]:
    return [
        {
            "index": index,
            "instructions": [
                _instruction_json(
                    bytes(inner.instruction().accounts),
                    inner.instruction().program_id_index,
                    bytes(inner.instruction().data),
                    inner.stack_height(),
                )
                for inner in group
            ],
        }
        for index, group in enumerate(meta.inner_instructions())
        if group
    ]


def return_data_json(meta: TransactionMetadata) -> Json:
    returned = meta.return_data()
    if not returned.data:
        return None
    return {"programId": str(returned.program_id), "data": [base64.b64encode(bytes(returned.data)).decode(), "base64"]}


def status_json(error: Json) -> dict[str, Json]:
    return {"Ok": None} if error is None else {"Err": error}


def record_json(record: Record, encoding: str, *, with_version: bool) -> dict[str, Json]:
    """The answer of getTransaction."""
    meta = record.meta
    loaded = record.keys[record.loaded_from :]
    may_write = frozenset(record.writable)
    meta_json: dict[str, Json] = {
        "err": record.error,
        "status": status_json(record.error),
        "fee": meta.fee(),
        "preBalances": list(record.balances_before),
        "postBalances": list(record.balances_after),
        "innerInstructions": inner_instructions_json(meta),
        "logMessages": meta.logs(),
        "preTokenBalances": [],
        "postTokenBalances": [],
        "rewards": [],
        "loadedAddresses": {
            "writable": [str(key) for key in loaded if key in may_write],
            "readonly": [str(key) for key in loaded if key not in may_write],
        },
        "computeUnitsConsumed": meta.compute_units_consumed(),
    }
    returned = return_data_json(meta)
    if returned is not None:
        meta_json["returnData"] = returned
    shape: dict[str, Json] = {
        "slot": record.slot,
        "blockTime": record.unix_time,
        "transaction": transaction_json(record.transaction, encoding),
        "meta": meta_json,
    }
    if with_version:
        is_v0 = isinstance(VersionedTransaction.from_bytes(record.transaction).message, MessageV0)
        shape["version"] = 0 if is_v0 else "legacy"
    return shape


def keyed_account_json(key: Pubkey, account: dict[str, Json]) -> dict[str, Json]:
    return {"pubkey": str(key), "account": account}
