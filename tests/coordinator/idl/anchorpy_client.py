"""What an Anchor client makes of the IDL: run by anchorpy's own Python, with questions on standard input.

Reads {"idl", "program", "instructions", "accounts", "refusals", "logs"} and writes the answers as JSON.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

from anchorpy import Context, EventParser, Idl, Program, Provider, Wallet
from anchorpy.error import ProgramError
from anchorpy.program.common import translate_address
from solana.rpc.async_api import AsyncClient
from solders.instruction import AccountMeta
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.transaction_status import InstructionErrorCustom, TransactionErrorInstructionError


def plain(value: Any) -> Any:
    """Values as JSON has them: keys in base58, bytes in hex."""
    if isinstance(value, Pubkey):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        if value and all(isinstance(one, int) and 0 <= one < 256 for one in value) and len(value) in (32, 64):
            return bytes(value).hex()
        return [plain(one) for one in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if not str(key).startswith("_")}
    return value


def argument(program: Program, value: Any) -> Any:
    """An argument as anchorpy wants it; {"type": ..., "fields": ...} is a struct of the IDL."""
    if isinstance(value, dict):
        fields = {name: argument(program, one) for name, one in value["fields"].items()}
        return program.type[value["type"]](**fields)
    if isinstance(value, str):
        return translate_address(value) if len(value) < 64 else list(bytes.fromhex(value))
    return value


def main() -> None:
    asked = json.load(sys.stdin)
    idl = Idl.from_json(asked["idl"])
    address = Pubkey.from_string(asked["program"])
    program = Program(idl, address, Provider(AsyncClient("http://127.0.0.1:9"), Wallet(Keypair())))
    answers: dict[str, Any] = {"instructions": [], "accounts": [], "errors": [], "events": []}
    for one in asked["instructions"]:
        accounts = {name: Pubkey.from_string(key) for name, key in one["accounts"].items()}
        more = [AccountMeta(Pubkey.from_string(key), signer, writable) for key, signer, writable in one["more"]]
        made = program.instruction[one["name"]](
            *(argument(program, value) for value in one["args"]),
            ctx=Context(accounts=accounts, remaining_accounts=more),
        )
        metas = [[str(meta.pubkey), meta.is_signer, meta.is_writable] for meta in made.accounts]
        answers["instructions"].append({"data": bytes(made.data).hex(), "accounts": metas})
    for one in asked["accounts"]:
        decoded = program.coder.accounts.parse(base64.b64decode(one["data"]))
        answers["accounts"].append({"name": decoded.name, "fields": plain(decoded.data)})
    texts = {error.code: error.msg for error in idl.errors}
    for refusal in asked["refusals"]:
        cause = TransactionErrorInstructionError(refusal["index"], InstructionErrorCustom(refusal["code"]))
        known = ProgramError.parse_tx_error(cause, texts, address, refusal["logs"])
        answers["errors"].append(None if known is None else [known.code, known.msg])
    found: list[Any] = []
    if asked["logs"]:  # anchorpy takes no empty log
        EventParser(address, program.coder).parse_logs(asked["logs"], found.append)
    answers["events"] = [{"name": event.name, "fields": plain(event.data)} for event in found]
    print(json.dumps(answers))


main()
