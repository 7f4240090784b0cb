"""JSON-RPC requests and batches: from bytes to the method that answers, and back to bytes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any, Final

from solders.transaction_metadata import FailedTransactionMetadata

from coordinator.ledger.bank import Bank, Execute
from coordinator.ledger.encoding import Json, UnsupportedEncoding
from coordinator.ledger.params import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    MIN_CONTEXT_SLOT,
    PARSE_ERROR,
    RpcError,
    invalid,
    number,
)
from coordinator.ledger.sanitize import Checked, Refused

log = logging.getLogger(__name__)

# The validator release whose runtime this VM is; its JSON shapes are the ones given here.
API_VERSION: Final = "4.1.2"
MAX_BATCH: Final = 256
MAX_RESPONSE_BYTES: Final = 64 * 2**20
COMMITMENTS: Final = frozenset(
    {"processed", "confirmed", "finalized", "recent", "single", "root", "max", "singleGossip"}
)

_encode: Final = json.JSONEncoder(separators=(",", ":")).encode
Method = Callable[["Rpc", list[Any]], Json]
_METHODS: Final[dict[str, Method]] = {}


def method(name: str) -> Callable[[Method], Method]:
    def register(function: Method) -> Method:
        _METHODS[name] = function
        return function

    return register


class Rpc:
    """Answers JSON-RPC bodies from one bank.

    Args:
        bank: the state that is read.
        live: the bank that transactions go to; another one than `bank` where that lags behind.
    """

    def __init__(self, bank: Bank, live: Bank | None = None) -> None:
        self.bank = bank
        self.live = bank if live is None else live

    def submit(self, checked: Checked, *, preflight: bool) -> FailedTransactionMetadata | None:
        """Execute a transaction that passed `bank.check`. Returns its failure if preflight stopped it."""
        if self.live is self.bank:
            if preflight:
                result = self.live.apply_if_succeeds(checked)
                return result if isinstance(result, FailedTransactionMetadata) else None
            self.live.apply(Execute(checked.wire))
            return None
        failure = self.preflight(checked) if preflight else None
        if failure is None:
            try:
                self.live.check(checked.wire)
            except Refused:
                return None  # the endpoint that forwarded it never learns
            self.live.apply(Execute(checked.wire))
        return failure

    def preflight(self, checked: Checked) -> FailedTransactionMetadata | None:
        """How a transaction would fail; None if it would not."""
        result = self.bank.simulate(checked)
        return result if isinstance(result, FailedTransactionMetadata) else None

    def answer(self, body: bytes) -> bytes:
        """The response to one HTTP body: a request or a batch. Never raises."""
        try:
            request = json.loads(body.decode())
        except (ValueError, RecursionError):
            return _failure(None, RpcError(PARSE_ERROR, "Parse error"))
        if not isinstance(request, list):
            return self.call(request)
        if not request or len(request) > MAX_BATCH:
            return _failure(None, RpcError(INVALID_REQUEST, f"A batch has 1 to {MAX_BATCH} requests"))
        parts: list[bytes] = []
        size = 0
        for one in request:
            if size > MAX_RESPONSE_BYTES:
                parts.append(_failure(_id_of(one), RpcError(INTERNAL_ERROR, "The batch's response is too large")))
                continue
            parts.append(self.call(one))
            size += len(parts[-1])
        return b"[" + b",".join(parts) + b"]"

    def call(self, request: Json) -> bytes:
        """The response to one request object. Never raises."""
        identity = _id_of(request)
        try:
            name, params = parse_request(request)
            function = _METHODS.get(name)
            if function is None:
                raise RpcError(METHOD_NOT_FOUND, "Method not found")
            for value in params:
                self._check_options(value)
            result = _encode(function(self, params))
            return f'{{"jsonrpc":"2.0","result":{result},"id":{_encode_id(identity)}}}'.encode()
        except RpcError as error:
            return _failure(identity, error)
        except UnsupportedEncoding as error:
            return _failure(identity, RpcError(INVALID_PARAMS, str(error)))
        except BaseException as error:
            # A panic inside the VM or a parser arrives as a BaseException of pyo3; one bad request must not end a
            # ledger that others use. What is not an error of the request (a signal, an exit) goes on.
            if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
                raise
            log.exception("request failed: %.200r", request)
            return _failure(identity, RpcError(INTERNAL_ERROR, "Internal error"))

    @property
    def identity(self) -> str:
        """The one validator that there is, by a name of its own: the chain's genesis hash, which is 32 bytes too."""
        return str(self.bank.genesis_hash)

    def context(self, value: Json) -> dict[str, Json]:
        return {"context": {"slot": self.bank.slot, "apiVersion": API_VERSION}, "value": value}

    def _check_options(self, value: Json) -> None:
        if not isinstance(value, dict):
            return
        commitment = value.get("commitment")
        if commitment is not None and (not isinstance(commitment, str) or commitment not in COMMITMENTS):
            raise invalid(f"unknown commitment {str(commitment)[:64]!r}.")
        least = value.get("minContextSlot")
        if least is not None and number(least, "minContextSlot") > self.bank.slot:
            data = {"contextSlot": self.bank.slot}
            raise RpcError(MIN_CONTEXT_SLOT, "Minimum context slot has not been reached", data)


def parse_request(request: Json) -> tuple[str, list[Any]]:
    """The method and parameters of a request object; raises RpcError."""
    if not isinstance(request, dict) or not isinstance(request.get("method"), str):
        raise RpcError(INVALID_REQUEST, "Invalid request")
    params = request.get("params")
    if params is None:
        params = []
    if not isinstance(params, list):
        raise invalid("parameters must be a list.")
    return request["method"], params


def _id_of(request: Json) -> Json:
    identity = request.get("id") if isinstance(request, dict) else None
    return identity if isinstance(identity, str | int | float) else None


def _encode_id(identity: Json) -> str:
    # Nearly always a small number; the encoder takes far longer for it than for a string.
    return str(identity) if type(identity) is int else _encode(identity)


def _failure(identity: Json, error: RpcError) -> bytes:
    return _encode({"jsonrpc": "2.0", "error": error.to_json(), "id": identity}).encode()
