"""The JSON-RPC methods about SPL tokens that wallets ask for: whose accounts, how much is in them."""

from __future__ import annotations

import struct
from typing import Any, Final

from solders.account import Account
from solders.pubkey import Pubkey

from coordinator.ledger.accounts import AccountsOfAnswer
from coordinator.ledger.dispatch import Rpc, method
from coordinator.ledger.encoding import Json
from coordinator.ledger.params import encoding_of, invalid, options_at, parse_pubkey, pubkey_at, window_of

_PROGRAMS: Final = (
    Pubkey.from_string("TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA"),
    Pubkey.from_string("TokenzQdBNbLqP5VEhdkAS6EPFLC1PHnBqCXEpPxuEb"),
)
# An account: mint, owner, amount. A mint: an optional authority (36 bytes), supply, decimals.
_ACCOUNT_BYTES: Final = 165
_OWNER_AT: Final = 32
_AMOUNT_AT: Final = 64
_SUPPLY_AT: Final = 36
_DECIMALS_AT: Final = 44
_MINT_BYTES: Final = 82


def _amount_json(amount: int, decimals: int) -> Json:
    whole, part = divmod(amount, 10**decimals)
    text = f"{whole}.{part:0{decimals}d}".rstrip("0").rstrip(".") if decimals else str(amount)
    return {"amount": str(amount), "decimals": decimals, "uiAmount": amount / 10**decimals, "uiAmountString": text}


def _token_account(rpc: Rpc, key: Pubkey, least: int, what: str) -> Account:
    account = rpc.bank.account(key)
    if account is None or account.owner not in _PROGRAMS or len(account.data) < least:
        raise invalid(f"{key} is not a {what}")
    return account


def _decimals(rpc: Rpc, mint: Pubkey) -> int:
    return _token_account(rpc, mint, _MINT_BYTES, "Token mint").data[_DECIMALS_AT]


@method("getTokenAccountBalance")
def get_token_account_balance(rpc: Rpc, params: list[Any]) -> Json:
    data = _token_account(rpc, pubkey_at(params, 0), _ACCOUNT_BYTES, "Token account").data
    (amount,) = struct.unpack_from("<Q", data, _AMOUNT_AT)
    return rpc.context(_amount_json(amount, _decimals(rpc, Pubkey(data[:32]))))


@method("getTokenSupply")
def get_token_supply(rpc: Rpc, params: list[Any]) -> Json:
    data = _token_account(rpc, pubkey_at(params, 0), _MINT_BYTES, "Token mint").data
    (supply,) = struct.unpack_from("<Q", data, _SUPPLY_AT)
    return rpc.context(_amount_json(supply, data[_DECIMALS_AT]))


@method("getTokenAccountsByOwner")
def get_token_accounts_by_owner(rpc: Rpc, params: list[Any]) -> Json:
    owner = bytes(pubkey_at(params, 0))
    wanted, options = options_at(params, 1), options_at(params, 2)
    if ("mint" in wanted) == ("programId" in wanted):
        raise invalid("name either a mint or a programId.")
    mint = bytes(parse_pubkey(wanted["mint"])) if "mint" in wanted else None
    programs = _PROGRAMS if mint is not None else (parse_pubkey(wanted["programId"]),)
    if any(program not in _PROGRAMS for program in programs):
        raise invalid("programId is not a token program.")
    encoding, window = encoding_of(options, "binary"), window_of(options)
    accounts = AccountsOfAnswer(encoding, window)
    return rpc.context(
        [
            accounts.keyed(key, account)
            for program in programs
            for key, account in rpc.bank.program_accounts(program)
            if len(account.data) >= _ACCOUNT_BYTES
            and account.data[_OWNER_AT:_AMOUNT_AT] == owner
            and (mint is None or account.data[:32] == mint)
        ]
    )
