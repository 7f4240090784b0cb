"""The JSON-RPC methods about blocks, the schedule of leaders and the cluster: one bank and one validator."""

from __future__ import annotations

from typing import Any, Final

from solders.hash import Hash

from coordinator.ledger.bank import FAUCET_LAMPORTS, SLOTS_PER_EPOCH
from coordinator.ledger.dispatch import API_VERSION, Rpc, method
from coordinator.ledger.encoding import Json
from coordinator.ledger.params import (
    BLOCK_NOT_AVAILABLE,
    SLOT_SKIPPED,
    RpcError,
    encoding_of,
    invalid,
    number,
    options_at,
)
from coordinator.ledger.state import Block
from coordinator.ledger.transactions import versioned_record_json

MAX_BLOCKS: Final = 500_000
MAX_LEADERS: Final = 5_000
_DETAILS: Final = ("full", "signatures", "none")


def _block(rpc: Rpc, slot: int) -> Block:
    blocks = rpc.bank.blocks
    if slot >= rpc.bank.slot or not blocks or slot < blocks[0].slot:
        raise RpcError(BLOCK_NOT_AVAILABLE, f"Block not available for slot {slot}")
    for block in reversed(blocks):
        if block.slot == slot:
            return block
        if block.slot < slot:
            break
    raise RpcError(SLOT_SKIPPED, f"Slot {slot} was skipped, or missing due to ledger jump to recent snapshot")


@method("getBlock")
def get_block(rpc: Rpc, params: list[Any]) -> Json:
    block = _block(rpc, number(params[0] if params else None, "the slot"))
    options = {"encoding": params[1]} if len(params) > 1 and isinstance(params[1], str) else options_at(params, 1)
    details = options.get("transactionDetails") or "full"
    if details not in _DETAILS:
        raise invalid(f"transactionDetails must be one of {', '.join(_DETAILS)}.")
    shape: dict[str, Json] = {
        "blockHeight": block.height,
        "blockTime": block.unix_time,
        "blockhash": str(Hash(block.blockhash)),
        "parentSlot": block.parent,
        "previousBlockhash": str(Hash(block.previous)),
    }
    if options.get("rewards") is not False:
        shape["rewards"] = []
    if details == "none":
        return shape
    records = rpc.bank.history.in_slot(block.slot)
    if details == "signatures":
        shape["signatures"] = [str(record.signature) for record in records]
        return shape
    encoding = encoding_of(options, "json")
    transactions = [versioned_record_json(record, encoding, options) for record in records]
    for transaction in transactions:
        del transaction["slot"], transaction["blockTime"]
    shape["transactions"] = transactions
    return shape


@method("getBlocks")
def get_blocks(rpc: Rpc, params: list[Any]) -> Json:
    first = number(params[0] if params else None, "the first slot")
    given = params[1] if len(params) > 1 and not isinstance(params[1], dict) else None
    last = number(given, "the last slot") if given is not None else rpc.bank.slot
    if last - first > MAX_BLOCKS:
        raise invalid(f"Slot range too large; max {MAX_BLOCKS}")
    return [block.slot for block in rpc.bank.blocks if first <= block.slot <= last]


@method("getBlocksWithLimit")
def get_blocks_with_limit(rpc: Rpc, params: list[Any]) -> Json:
    first = number(params[0] if params else None, "the first slot")
    limit = number(params[1] if len(params) > 1 else None, "the limit", most=MAX_BLOCKS)
    return [block.slot for block in rpc.bank.blocks if block.slot >= first][:limit]


@method("getBlockTime")
def get_block_time(rpc: Rpc, params: list[Any]) -> Json:
    return _block(rpc, number(params[0] if params else None, "the slot")).unix_time


@method("getFirstAvailableBlock")
def get_first_available_block(rpc: Rpc, params: list[Any]) -> Json:
    return rpc.bank.blocks[0].slot if rpc.bank.blocks else 0


@method("minimumLedgerSlot")
def minimum_ledger_slot(rpc: Rpc, params: list[Any]) -> Json:
    return rpc.bank.blocks[0].slot if rpc.bank.blocks else 0


@method("getSlotLeader")
def get_slot_leader(rpc: Rpc, params: list[Any]) -> Json:
    return rpc.identity


@method("getSlotLeaders")
def get_slot_leaders(rpc: Rpc, params: list[Any]) -> Json:
    number(params[0] if params else None, "the first slot")
    return [rpc.identity] * number(params[1] if len(params) > 1 else None, "the limit", most=MAX_LEADERS)


@method("getIdentity")
def get_identity(rpc: Rpc, params: list[Any]) -> Json:
    return {"identity": rpc.identity}


@method("getClusterNodes")
def get_cluster_nodes(rpc: Rpc, params: list[Any]) -> Json:
    nothing = dict.fromkeys(("gossip", "tpu", "tpuQuic", "rpc", "pubsub", "featureSet", "shredVersion"))
    return [{"pubkey": rpc.identity, "version": API_VERSION, **nothing}]


@method("getVoteAccounts")
def get_vote_accounts(rpc: Rpc, params: list[Any]) -> Json:
    return {"current": [], "delinquent": []}


@method("getEpochSchedule")
def get_epoch_schedule(rpc: Rpc, params: list[Any]) -> Json:
    return {
        "slotsPerEpoch": SLOTS_PER_EPOCH,
        "leaderScheduleSlotOffset": SLOTS_PER_EPOCH,
        "warmup": False,
        "firstNormalEpoch": 0,
        "firstNormalSlot": 0,
    }


@method("getSupply")
def get_supply(rpc: Rpc, params: list[Any]) -> Json:
    shape = {"circulating": FAUCET_LAMPORTS, "nonCirculating": 0, "nonCirculatingAccounts": []}
    return rpc.context({"total": FAUCET_LAMPORTS, **shape})


@method("getInflationGovernor")
def get_inflation_governor(rpc: Rpc, params: list[Any]) -> Json:
    return {"initial": 0.0, "terminal": 0.0, "taper": 0.0, "foundation": 0.0, "foundationTerm": 0.0}


@method("getInflationRate")
def get_inflation_rate(rpc: Rpc, params: list[Any]) -> Json:
    return {"total": 0.0, "validator": 0.0, "foundation": 0.0, "epoch": rpc.bank.slot // SLOTS_PER_EPOCH}
