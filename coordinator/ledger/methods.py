"""The JSON-RPC methods about the chain and its accounts, registered by Solana's names for them."""

from __future__ import annotations

from typing import Any, Final

from solders.hash import Hash
from solders.message import Message, MessageV0, from_bytes_versioned

from coordinator.ledger.accounts import AccountsOfAnswer
from coordinator.ledger.bank import SLOTS_PER_EPOCH, Execute
from coordinator.ledger.dispatch import API_VERSION, Rpc, method
from coordinator.ledger.encoding import Json, account_json
from coordinator.ledger.params import (
    MAX_TRANSACTION_TEXT,
    decode_text,
    encoding_of,
    invalid,
    list_at,
    number,
    options_at,
    parse_filters,
    parse_pubkey,
    pubkey_at,
    text_at,
    window_of,
)

MAX_ACCOUNTS: Final = 100


@method("getHealth")
def get_health(rpc: Rpc, params: list[Any]) -> Json:
    return "ok"


@method("getVersion")
def get_version(rpc: Rpc, params: list[Any]) -> Json:
    return {"solana-core": API_VERSION, "feature-set": 0}


@method("getGenesisHash")
def get_genesis_hash(rpc: Rpc, params: list[Any]) -> Json:
    return str(rpc.bank.genesis_hash)


@method("getSlot")
def get_slot(rpc: Rpc, params: list[Any]) -> Json:
    return rpc.bank.slot


@method("getBlockHeight")
def get_block_height(rpc: Rpc, params: list[Any]) -> Json:
    return rpc.bank.block_height


@method("getTransactionCount")
def get_transaction_count(rpc: Rpc, params: list[Any]) -> Json:
    return rpc.bank.transaction_count


@method("getEpochInfo")
def get_epoch_info(rpc: Rpc, params: list[Any]) -> Json:
    epoch, index = divmod(rpc.bank.slot, SLOTS_PER_EPOCH)
    return {
        "absoluteSlot": rpc.bank.slot,
        "blockHeight": rpc.bank.block_height,
        "epoch": epoch,
        "slotIndex": index,
        "slotsInEpoch": SLOTS_PER_EPOCH,
        "transactionCount": rpc.bank.transaction_count,
    }


@method("getLatestBlockhash")
def get_latest_blockhash(rpc: Rpc, params: list[Any]) -> Json:
    blockhash = rpc.bank.latest_blockhash
    height = rpc.bank.last_valid_block_height(bytes(blockhash))
    return rpc.context({"blockhash": str(blockhash), "lastValidBlockHeight": height})


@method("isBlockhashValid")
def is_blockhash_valid(rpc: Rpc, params: list[Any]) -> Json:
    text = text_at(params, 0, "a blockhash")
    try:
        blockhash = Hash.from_string(text)
    except ValueError:
        raise invalid(f"{text!r} is not a blockhash.") from None
    return rpc.context(rpc.bank.last_valid_block_height(bytes(blockhash)) is not None)


@method("getMinimumBalanceForRentExemption")
def get_minimum_balance_for_rent_exemption(rpc: Rpc, params: list[Any]) -> Json:
    size = number(params[0] if params else None, "the size of the account", most=10 * 2**20)
    return rpc.bank.rent_exempt_minimum(size)


@method("getFeeForMessage")
def get_fee_for_message(rpc: Rpc, params: list[Any]) -> Json:
    raw = decode_text(text_at(params, 0, "a message in base64", MAX_TRANSACTION_TEXT), "base64")
    try:
        # A legacy message starts with its header, whose first byte is under 128; a versioned one with 128 + version.
        message = from_bytes_versioned(raw) if raw and raw[0] >= 128 else Message.from_bytes(raw)
    except Exception as error:  # solders has no one base class for what its parsers raise
        raise invalid(f"the message cannot be decoded: {error}") from None
    if rpc.bank.last_valid_block_height(bytes(message.recent_blockhash)) is None:
        return rpc.context(None)
    if not isinstance(message, Message | MessageV0):
        raise invalid("message version is not supported; use legacy or 0.")
    return rpc.context(rpc.bank.fee_of(message))


@method("getRecentPrioritizationFees")
def get_recent_prioritization_fees(rpc: Rpc, params: list[Any]) -> Json:
    # There is never a queue for a block here, so nobody had to pay.
    return [{"slot": rpc.bank.slot, "prioritizationFee": 0}]


@method("getBalance")
def get_balance(rpc: Rpc, params: list[Any]) -> Json:
    return rpc.context(rpc.bank.balance(pubkey_at(params, 0)))


@method("getAccountInfo")
def get_account_info(rpc: Rpc, params: list[Any]) -> Json:
    options = options_at(params, 1)
    account = rpc.bank.account(pubkey_at(params, 0))
    encoding, window = encoding_of(options, "binary"), window_of(options)
    return rpc.context(None if account is None else account_json(account, encoding, window))


@method("getMultipleAccounts")
def get_multiple_accounts(rpc: Rpc, params: list[Any]) -> Json:
    keys = [parse_pubkey(key) for key in list_at(params, 0, "addresses", MAX_ACCOUNTS)]
    options = options_at(params, 1)
    encoding, window = encoding_of(options, "base64"), window_of(options)
    accounts = AccountsOfAnswer(encoding, window)
    # One is read when the one before it is encoded: they are up to 10 MiB each.
    return rpc.context([accounts.json(rpc.bank.account(key)) for key in keys])


@method("getProgramAccounts")
def get_program_accounts(rpc: Rpc, params: list[Any]) -> Json:
    program = pubkey_at(params, 0)
    options = options_at(params, 1)
    encoding, window, tests = encoding_of(options, "binary"), window_of(options), parse_filters(options)
    accounts = AccountsOfAnswer(encoding, window)
    found = [
        accounts.keyed(key, account)
        for key, account in rpc.bank.program_accounts(program)
        if all(test(account) for test in tests)
    ]
    return rpc.context(found) if options.get("withContext") else found


@method("requestAirdrop")
def request_airdrop(rpc: Rpc, params: list[Any]) -> Json:
    to = pubkey_at(params, 0)
    lamports = number(params[1] if len(params) > 1 else None, "lamports")
    record = rpc.live.apply(Execute(rpc.live.airdrop_transaction(to, lamports)))
    if record is None or record.error is not None:
        raise invalid(f"the faucet cannot give {lamports} lamports: {record.error if record else 'it is empty'}")
    return str(record.signature)
