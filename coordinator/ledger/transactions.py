"""The JSON-RPC methods about transactions: send, simulate, look up."""

from __future__ import annotations

import json
from typing import Any, Final

from solders.account import Account
from solders.pubkey import Pubkey
from solders.transaction_metadata import FailedTransactionMetadata, SimulatedTransactionInfo

from coordinator.ledger.accounts import AccountsOfAnswer
from coordinator.ledger.dispatch import Rpc, method
from coordinator.ledger.encoding import (
    Json,
    error_json,
    inner_instructions_json,
    record_json,
    return_data_json,
    status_json,
)
from coordinator.ledger.params import (
    MAX_TRANSACTION_TEXT,
    PREFLIGHT_FAILURE,
    SIGNATURE_FAILURE,
    UNSUPPORTED_VERSION,
    RpcError,
    decode_text,
    encoding_of,
    invalid,
    list_at,
    number,
    options_at,
    parse_pubkey,
    parse_signature,
    pubkey_at,
    text_at,
)
from coordinator.ledger.sanitize import Checked, Refused
from coordinator.ledger.state import Record

MAX_STATUSES: Final = 256
MAX_SIGNATURES: Final = 1000


def _decode_transaction(params: list[Any], options: dict[str, Any]) -> bytes:
    text = text_at(params, 0, "a transaction", MAX_TRANSACTION_TEXT)
    return decode_text(text, encoding_of(options, "base58"))


def _simulation_json(result: SimulatedTransactionInfo | FailedTransactionMetadata) -> dict[str, Json]:
    meta = result.meta()
    return {
        "err": error_json(result.err()) if isinstance(result, FailedTransactionMetadata) else None,
        "logs": meta.logs(),
        "accounts": None,
        "unitsConsumed": meta.compute_units_consumed(),
        "returnData": return_data_json(meta),
        "innerInstructions": None,
        "replacementBlockhash": None,
    }


def _refused_json(error: str) -> dict[str, Json]:
    """A simulation result for a transaction that did not get as far as the VM."""
    return {
        "err": error,
        "logs": [],
        "accounts": None,
        "unitsConsumed": 0,
        "returnData": None,
        "innerInstructions": None,
        "replacementBlockhash": None,
    }


def _readable(error: Json) -> str:
    """The words that follow "Transaction simulation failed:", in the form that clients search for program errors."""
    if isinstance(error, dict) and isinstance(error.get("InstructionError"), list):
        index, cause = error["InstructionError"]
        if isinstance(cause, dict) and isinstance(cause.get("Custom"), int):
            return f"Error processing Instruction {index}: custom program error: {cause['Custom']:#x}"
        return f"Error processing Instruction {index}: {cause if isinstance(cause, str) else json.dumps(cause)}"
    return error if isinstance(error, str) else json.dumps(error)


@method("sendTransaction")
def send_transaction(rpc: Rpc, params: list[Any]) -> Json:
    options = options_at(params, 1)
    wire = _decode_transaction(params, options)
    skip_preflight = bool(options.get("skipPreflight"))
    try:
        checked = rpc.bank.check(wire)
    except Refused as refused:
        if refused.error == "SignatureFailure":
            raise RpcError(SIGNATURE_FAILURE, refused.text) from None
        if refused.error not in ("BlockhashNotFound", "AlreadyProcessed"):
            raise invalid(refused.text) from None
        if skip_preflight:
            # Nobody looks before it is forwarded, so the sender learns nothing: it just never lands.
            return str(rpc.bank.check(wire, blockhash=False).signature)
        message = f"Transaction simulation failed: {refused.text}"
        raise RpcError(PREFLIGHT_FAILURE, message, _refused_json(refused.error)) from None
    failure = rpc.submit(checked, preflight=not skip_preflight)
    if failure is not None:
        shape = _simulation_json(failure)
        raise RpcError(PREFLIGHT_FAILURE, f"Transaction simulation failed: {_readable(shape['err'])}", shape)
    return str(checked.signature)


@method("simulateTransaction")
def simulate_transaction(rpc: Rpc, params: list[Any]) -> Json:
    options = options_at(params, 1)
    wire = _decode_transaction(params, options)
    verify, replace = bool(options.get("sigVerify")), bool(options.get("replaceRecentBlockhash"))
    if verify and replace:
        raise invalid("sigVerify may not be used with replaceRecentBlockhash.")
    try:
        checked = rpc.bank.check(wire, signatures=verify, blockhash=not replace)
    except Refused as refused:
        if refused.error in ("TooLarge", "SanitizeFailure", "UnsupportedVersion"):
            raise invalid(refused.text) from None
        return rpc.context(_refused_json(refused.error))
    result = rpc.bank.simulate(checked)
    shape = _simulation_json(result)
    if options.get("innerInstructions"):
        shape["innerInstructions"] = inner_instructions_json(result.meta())
    if replace:
        latest = rpc.bank.latest_blockhash
        height = rpc.bank.last_valid_block_height(bytes(latest))
        shape["replacementBlockhash"] = {"blockhash": str(latest), "lastValidBlockHeight": height}
    wanted = options.get("accounts")
    if wanted is not None:
        shape["accounts"] = _simulated_accounts(rpc, wanted, result, checked)
    return rpc.context(shape)


def _simulated_accounts(
    rpc: Rpc, wanted: Json, result: SimulatedTransactionInfo | FailedTransactionMetadata, checked: Checked
) -> Json:
    if not isinstance(wanted, dict) or not isinstance(wanted.get("addresses"), list):
        raise invalid("accounts must be an object with addresses.")
    most = len(checked.parsed.message.account_keys)
    keys = [parse_pubkey(key) for key in list_at([wanted["addresses"]], 0, "addresses", most)]
    if isinstance(result, FailedTransactionMetadata):
        return [None] * len(keys)
    after: dict[Pubkey, Account] = dict(result.post_accounts())
    accounts = AccountsOfAnswer(encoding_of(wanted, "base64"))
    return [accounts.json(after.get(key) or rpc.bank.account(key)) for key in keys]


@method("getSignatureStatuses")
def get_signature_statuses(rpc: Rpc, params: list[Any]) -> Json:
    signatures = [parse_signature(value) for value in list_at(params, 0, "signatures", MAX_STATUSES)]
    statuses: list[Json] = []
    for signature in signatures:
        record = rpc.bank.history.get(signature)
        statuses.append(
            record
            and {
                "slot": record.slot,
                # One bank, so no fork: what it executed is final.
                "confirmations": None,
                "err": record.error,
                "status": status_json(record.error),
                "confirmationStatus": "finalized",
            }
        )
    return rpc.context(statuses)


@method("getSignaturesForAddress")
def get_signatures_for_address(rpc: Rpc, params: list[Any]) -> Json:
    address = pubkey_at(params, 0)
    options = options_at(params, 1)
    limit = number(options.get("limit") or MAX_SIGNATURES, "limit", most=MAX_SIGNATURES)
    before = parse_signature(options["before"]) if options.get("before") else None
    until = parse_signature(options["until"]) if options.get("until") else None
    found: list[Json] = []
    started = before is None
    for record in reversed(rpc.bank.history.of_account(address)):
        if record.signature == until or len(found) >= limit:
            break
        if started:
            found.append(
                {
                    "signature": str(record.signature),
                    "slot": record.slot,
                    "err": record.error,
                    "memo": None,
                    "blockTime": record.unix_time,
                    "confirmationStatus": "finalized",
                }
            )
        started = started or record.signature == before
    return found


@method("getTransaction")
def get_transaction(rpc: Rpc, params: list[Any]) -> Json:
    signature = parse_signature(text_at(params, 0, "a signature"))
    options = {"encoding": params[1]} if len(params) > 1 and isinstance(params[1], str) else options_at(params, 1)
    record = rpc.bank.history.get(signature)
    if record is None:
        return None
    return versioned_record_json(record, encoding_of(options, "json"), options)


def versioned_record_json(record: Record, encoding: str, options: dict[str, Any]) -> dict[str, Json]:
    """A record for a client that says which versions it knows; for one that does not, only legacy ones."""
    shape = record_json(record, encoding, with_version=True)
    if options.get("maxSupportedTransactionVersion") is None:
        if shape["version"] != "legacy":
            raise RpcError(
                UNSUPPORTED_VERSION,
                "Transaction version (0) is not supported by the requesting client. Please try the request again "
                'with the following configuration parameter: "maxSupportedTransactionVersion": 0',
            )
        del shape["version"]
    return shape
