"""Parameters of JSON-RPC requests: every value is checked for type and size before anything uses it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any, Final

from solders.account import Account
from solders.pubkey import Pubkey
from solders.signature import Signature

from coordinator.base58 import base58_decode
from coordinator.ledger.encoding import Json

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
PREFLIGHT_FAILURE: Final = -32002
SIGNATURE_FAILURE: Final = -32003
BLOCK_NOT_AVAILABLE: Final = -32004
SLOT_SKIPPED: Final = -32007
UNSUPPORTED_VERSION: Final = -32015
MIN_CONTEXT_SLOT: Final = -32016

MAX_FILTERS: Final = 4
# A transaction of 1,232 bytes is 1,683 base58 or 1,644 base64 characters; one twice as long still gets the error that
# names its size.
MAX_TRANSACTION_TEXT: Final = 4096


class RpcError(Exception):
    """A JSON-RPC error object: code, message and, for some, data."""

    def __init__(self, code: int, message: str, data: Json = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data

    def to_json(self) -> dict[str, Json]:
        shape: dict[str, Json] = {"code": self.code, "message": self.message}
        if self.data is not None:
            shape["data"] = self.data
        return shape


def invalid(text: str) -> RpcError:
    return RpcError(INVALID_PARAMS, f"Invalid params: {text}")


def text_at(params: list[Any], index: int, what: str, limit: int = 128) -> str:
    if len(params) <= index or not isinstance(params[index], str):
        raise invalid(f"parameter {index} must be {what}, as a string.")
    value: str = params[index]
    if len(value) > limit:
        raise invalid(f"parameter {index} ({what}) is {len(value)} characters long; the limit is {limit}.")
    return value


def number(value: object, what: str, most: int = 2**64 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise invalid(f"{what} must be an integer from 0 to {most}.")
    return value


def options_at(params: list[Any], index: int) -> dict[str, Any]:
    if len(params) <= index or params[index] is None:
        return {}
    if not isinstance(params[index], dict):
        raise invalid(f"parameter {index} must be an object.")
    return dict(params[index])


def list_at(params: list[Any], index: int, what: str, most: int) -> list[Any]:
    if len(params) <= index or not isinstance(params[index], list):
        raise invalid(f"parameter {index} must be a list of {what}.")
    if len(params[index]) > most:
        raise invalid(f"Too many inputs provided; max {most}")
    return list(params[index])


def parse_pubkey(value: object) -> Pubkey:
    try:
        if not isinstance(value, str) or len(value) > 44:
            raise ValueError
        return Pubkey.from_string(value)
    except ValueError:
        raise invalid(f"{str(value)[:64]!r} is not an address (32 bytes in base58).") from None


def parse_signature(value: object) -> Signature:
    try:
        if not isinstance(value, str) or len(value) > 90:
            raise ValueError
        return Signature.from_string(value)
    except ValueError:
        raise invalid(f"{str(value)[:100]!r} is not a signature (64 bytes in base58).") from None


def pubkey_at(params: list[Any], index: int) -> Pubkey:
    return parse_pubkey(text_at(params, index, "an address"))


def encoding_of(options: dict[str, Any], default: str) -> str:
    value = options.get("encoding") or default
    if not isinstance(value, str):
        raise invalid("encoding must be a string.")
    return value


def window_of(options: dict[str, Any]) -> tuple[int, int] | None:
    value = options.get("dataSlice")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise invalid("dataSlice must be an object with offset and length.")
    return number(value.get("offset"), "dataSlice.offset"), number(value.get("length"), "dataSlice.length")


def decode_text(text: str, encoding: str) -> bytes:
    try:
        if encoding == "base64":
            return base64.b64decode(text, validate=True)
        if encoding == "base58":
            return base58_decode(text)
    except (ValueError, binascii.Error) as error:
        raise invalid(f"data is not {encoding}: {error}") from None
    raise invalid(f"unsupported encoding: {encoding}. Supported encodings: base58, base64")


def parse_filters(options: dict[str, Any]) -> list[Callable[[Account], bool]]:
    """The filters of getProgramAccounts and programSubscribe."""
    filters = options.get("filters")
    if filters is None:
        return []
    if not isinstance(filters, list) or len(filters) > MAX_FILTERS:
        raise invalid(f"filters must be a list of at most {MAX_FILTERS}.")
    tests: list[Callable[[Account], bool]] = []
    for one in filters:
        if isinstance(one, dict) and "dataSize" in one:
            tests.append(_size_filter(number(one["dataSize"], "dataSize")))
        elif isinstance(one, dict) and isinstance(one.get("memcmp"), dict):
            tests.append(_memcmp_filter(one["memcmp"]))
        else:
            raise invalid("a filter must be {dataSize} or {memcmp}.")
    return tests


def _size_filter(size: int) -> Callable[[Account], bool]:
    return lambda account: len(account.data) == size


def _memcmp_filter(memcmp: dict[str, Any]) -> Callable[[Account], bool]:
    offset = number(memcmp.get("offset"), "memcmp.offset")
    wanted = memcmp.get("bytes")
    if isinstance(wanted, str):
        if len(wanted) > 256:
            raise invalid("memcmp.bytes may stand for at most 128 bytes.")
        pattern = decode_text(wanted, str(memcmp.get("encoding") or "base58"))
    elif isinstance(wanted, list) and len(wanted) <= 128:
        pattern = bytes(number(value, "a byte", most=255) for value in wanted)
    else:
        raise invalid("memcmp.bytes must be a string, or a list of at most 128 bytes.")
    if len(pattern) > 128:
        raise invalid("memcmp.bytes may stand for at most 128 bytes.")
    return lambda account: account.data[offset : offset + len(pattern)] == pattern
