"""Solana's JSON-RPC over the real process, as solana-py and other clients use it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from ledger_process import SOL, Ledger, blockhash, call, encoded, funded, payment, post, send
from solana.rpc.async_api import AsyncClient
from solana.rpc.core import RPCException
from solana.rpc.models import DataSliceOpts, MemcmpOpts, TxOpts
from solders.hash import Hash
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.message import Message
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.system_program import CreateAccountParams, TransferParams, create_account, transfer
from solders.transaction import Transaction, VersionedTransaction


def with_solana_py(ledger: Ledger, use: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        async with AsyncClient(ledger.rpc) as client:
            await use(client)

    asyncio.run(run())


def test_solana_py_reads_the_chain(ledger: Ledger) -> None:
    async def use(client: AsyncClient) -> None:
        assert await client.is_connected()
        assert (await client.get_version()).value.solana_core
        slot = (await client.get_slot()).value
        info = (await client.get_epoch_info()).value
        assert slot <= info.absolute_slot
        assert info.block_height <= info.absolute_slot
        assert (await client.get_block_height()).value >= info.block_height
        assert (await client.get_genesis_hash()).value != Hash.default()
        assert (await client.get_transaction_count()).value >= 0
        latest = (await client.get_latest_blockhash()).value
        assert latest.last_valid_block_height > info.block_height + 100
        empty = (await client.get_minimum_balance_for_rent_exemption(0)).value
        assert (await client.get_minimum_balance_for_rent_exemption(100)).value > empty > 0
        assert (await client.get_recent_prioritization_fees()).value[0].prioritization_fee == 0
        payer = Keypair().pubkey()
        assert (await client.get_fee_for_message(Message.new_with_blockhash([], payer, latest.blockhash))).value == 5000
        assert (await client.get_fee_for_message(Message.new_with_blockhash([], payer, Hash.default()))).value is None

    with_solana_py(ledger, use)


def test_solana_py_sends_confirms_and_looks_up(ledger: Ledger) -> None:
    async def use(client: AsyncClient) -> None:
        payer, to = Keypair(), Keypair().pubkey()
        await client.confirm_transaction((await client.request_airdrop(payer.pubkey(), 5 * SOL)).value)
        latest = (await client.get_latest_blockhash()).value
        made = transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=to, lamports=SOL))
        message = Message.new_with_blockhash([made], payer.pubkey(), latest.blockhash)
        sent = await client.send_transaction(
            Transaction([payer], message, latest.blockhash),
            TxOpts(skip_confirmation=False, last_valid_block_height=latest.last_valid_block_height),
        )
        assert (await client.get_balance(to)).value == SOL
        assert (await client.get_balance(payer.pubkey())).value == 4 * SOL - 5000
        status = (await client.get_signature_statuses([sent.value, Signature.default()])).value
        assert status[0] is not None
        assert status[0].err is None
        assert status[1] is None
        for encoding in ("json", "base64"):
            found = (await client.get_transaction(sent.value, encoding, max_supported_transaction_version=0)).value
            assert found is not None
            assert found.transaction.meta is not None
            assert found.transaction.meta.fee == 5000
            assert found.transaction.meta.post_balances[:2] == [4 * SOL - 5000, SOL]
        history = (await client.get_signatures_for_address(payer.pubkey())).value
        assert history[0].signature == sent.value
        assert len(history) == 2
        older = (await client.get_signatures_for_address(payer.pubkey(), before=sent.value, limit=5)).value
        assert [one.signature for one in older] == [history[1].signature]
        simulated = (await client.simulate_transaction(VersionedTransaction(message, [payer]))).value
        assert str(simulated.err).endswith("AlreadyProcessed")

    with_solana_py(ledger, use)


def test_solana_py_reads_accounts_in_every_form(ledger: Ledger) -> None:
    payer = funded(ledger)
    made = Keypair()
    owner = Keypair().pubkey()
    at = blockhash(ledger)
    opened = create_account(
        CreateAccountParams(
            from_pubkey=payer.pubkey(), to_pubkey=made.pubkey(), lamports=3_000_000, space=200, owner=owner
        )
    )
    message = Message.new_with_blockhash([opened], payer.pubkey(), at)
    assert "result" in send(ledger, Transaction([payer, made], message, at))

    async def use(client: AsyncClient) -> None:
        account = (await client.get_account_info(made.pubkey())).value
        assert account is not None
        assert (account.owner, account.lamports, account.data) == (owner, 3_000_000, bytes(200))
        part = await client.get_account_info(
            made.pubkey(), encoding="base58", data_slice=DataSliceOpts(offset=1, length=3)
        )
        assert part.value is not None
        assert part.value.data == bytes(3)
        several = (await client.get_multiple_accounts([made.pubkey(), Keypair().pubkey()])).value
        assert several[0] is not None
        assert several[0].data == bytes(200)
        assert several[1] is None
        for filters, count in (
            ([200], 1),
            ([199], 0),
            ([MemcmpOpts(offset=10, bytes="1111")], 1),
            ([MemcmpOpts(offset=10, bytes="1112")], 0),
            ([MemcmpOpts(offset=198, bytes="1111")], 0),
        ):
            found = (await client.get_program_accounts(owner, encoding="base64", filters=filters)).value
            assert len(found) == count, filters
        assert (await client.get_program_accounts(owner, encoding="base64")).value[0].pubkey == made.pubkey()

    with_solana_py(ledger, use)


def test_a_program_error_is_a_preflight_failure_with_its_code(ledger: Ledger) -> None:
    payer = funded(ledger)
    too_much = payment(ledger, payer, Keypair().pubkey(), 100 * SOL)
    error = send(ledger, too_much)["error"]
    assert error["code"] == -32002
    assert error["message"].endswith("custom program error: 0x1")
    assert error["data"]["err"] == {"InstructionError": [0, {"Custom": 1}]}
    assert any("insufficient lamports" in line for line in error["data"]["logs"])
    assert call(ledger, "getBalance", str(payer.pubkey()))["result"]["value"] == 10 * SOL, "preflight is free"

    async def use(client: AsyncClient) -> None:
        with pytest.raises(RPCException, match="custom program error"):
            await client.send_transaction(too_much)

    with_solana_py(ledger, use)
    signature = send(ledger, too_much, skipPreflight=True)["result"]
    status = call(ledger, "getSignatureStatuses", [signature])["result"]["value"][0]
    assert status["err"] == {"InstructionError": [0, {"Custom": 1}]}
    assert call(ledger, "getBalance", str(payer.pubkey()))["result"]["value"] == 10 * SOL - 5000


def test_a_transaction_over_1232_bytes_is_refused(ledger: Ledger) -> None:
    payer, at = funded(ledger), blockhash(ledger)
    many = [
        transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=Keypair().pubkey(), lamports=SOL))
        for _ in range(25)
    ]
    large = Transaction([payer], Message.new_with_blockhash(many, payer.pubkey(), at), at)
    assert len(bytes(large)) > 1232
    error = send(ledger, large)["error"]
    assert error["code"] == -32602
    assert "1232" in error["message"]
    assert str(len(bytes(large))) in error["message"]


def test_a_bad_signature_is_refused(ledger: Ledger) -> None:
    payer = funded(ledger)
    good = payment(ledger, payer, Keypair().pubkey(), SOL)
    bad = Transaction.populate(good.message, [Keypair().sign_message(bytes(good.message))])
    for options in ({}, {"skipPreflight": True}):
        assert send(ledger, bad, **options)["error"]["code"] == -32003
    checked = call(ledger, "simulateTransaction", encoded(bad), {"encoding": "base64", "sigVerify": True})
    assert checked["result"]["value"]["err"] == "SignatureFailure"
    unchecked = call(ledger, "simulateTransaction", encoded(bad), {"encoding": "base64"})
    assert unchecked["result"]["value"]["err"] is None


def test_an_expired_blockhash_is_refused(fast_ledger: Ledger) -> None:
    payer, to = funded(fast_ledger), Keypair().pubkey()
    at = blockhash(fast_ledger)
    late = payment(fast_ledger, payer, to, SOL, at)
    for _ in range(100_000):
        if not call(fast_ledger, "isBlockhashValid", str(at))["result"]["value"]:
            break
    error = send(fast_ledger, late)["error"]
    assert (error["code"], error["data"]["err"]) == (-32002, "BlockhashNotFound")
    assert send(fast_ledger, late, skipPreflight=True)["result"] == str(late.signatures[0])
    assert call(fast_ledger, "getSignatureStatuses", [str(late.signatures[0])])["result"]["value"] == [None]
    assert call(fast_ledger, "getBalance", str(to))["result"]["value"] == 0


def test_a_transaction_executes_once(ledger: Ledger) -> None:
    payer, to = funded(ledger), Keypair().pubkey()
    once = payment(ledger, payer, to, SOL)
    assert send(ledger, once)["result"] == str(once.signatures[0])
    assert send(ledger, once)["error"]["data"]["err"] == "AlreadyProcessed"
    assert send(ledger, once, skipPreflight=True)["result"] == str(once.signatures[0])
    assert call(ledger, "getBalance", str(to))["result"]["value"] == SOL


def test_simulation_changes_nothing_and_shows_accounts(ledger: Ledger) -> None:
    payer, to = funded(ledger), Keypair().pubkey()
    try_it = payment(ledger, payer, to, SOL, Hash.default())
    options = {"encoding": "base64", "replaceRecentBlockhash": True, "accounts": {"addresses": [str(to)]}}
    value = call(ledger, "simulateTransaction", encoded(try_it), options)["result"]["value"]
    assert value["err"] is None
    assert value["accounts"][0]["lamports"] == SOL
    assert value["replacementBlockhash"]["lastValidBlockHeight"] > 0
    assert call(ledger, "getBalance", str(to))["result"]["value"] == 0


def test_batches_are_answered_in_order(ledger: Ledger) -> None:
    batch = [{"jsonrpc": "2.0", "id": f"n{i}", "method": "getSlot" if i % 2 else "nonsense"} for i in range(20)]
    answers = post(ledger, batch)
    assert [one["id"] for one in answers] == [f"n{i}" for i in range(20)]
    assert all(("result" in one) == bool(i % 2) for i, one in enumerate(answers))
    assert post(ledger, [])["error"]["code"] == -32600
    assert post(ledger, [{}] * 257)["error"]["code"] == -32600


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("getSlots", [], -32601),
        ("getRecentPerformanceSamples", [4], -32601),
        ("getBalance", [], -32602),
        ("getBalance", ["x"], -32602),
        ("getBalance", [7], -32602),
        ("getBalance", ["1" * 5000], -32602),
        ("getBalance", [str(Pubkey.default()), {"commitment": "sure"}], -32602),
        ("getBalance", [str(Pubkey.default()), {"minContextSlot": 2**60}], -32016),
        ("getAccountInfo", [str(Pubkey.default()), {"dataSlice": {"offset": -1, "length": 2}}], -32602),
        ("getAccountInfo", [str(Pubkey.default()), {"encoding": "base64+zstd"}], -32602),
        ("getMultipleAccounts", [[str(Pubkey.default())] * 101], -32602),
        ("getProgramAccounts", [str(Pubkey.default()), {"filters": [{}]}], -32602),
        ("getProgramAccounts", [str(Pubkey.default()), {"filters": [{"dataSize": 1}] * 5}], -32602),
        ("getProgramAccounts", [str(Pubkey.default()), {"filters": [{"memcmp": {"offset": 0, "bytes": "0"}}]}], -32602),
        ("sendTransaction", ["%%%"], -32602),
        ("sendTransaction", ["AAAA", {"encoding": "base64"}], -32602),
        ("sendTransaction", ["A" * 100_000, {"encoding": "base64"}], -32602),
        ("getSignatureStatuses", [["x"]], -32602),
        ("getTransaction", [None], -32602),
        ("getFeeForMessage", ["gA=="], -32602),
        ("getMinimumBalanceForRentExemption", [2**70], -32602),
        ("requestAirdrop", [str(Pubkey.default()), 2**64], -32602),
        ("requestAirdrop", [str(Pubkey.default()), -1], -32602),
        ("requestAirdrop", [str(Keypair().pubkey()), 2**63], -32602),
        ("requestAirdrop", [str(Keypair().pubkey()), True], -32602),
    ],
)
def test_wrong_requests_get_errors(ledger: Ledger, method: str, params: list[object], code: int) -> None:
    assert call(ledger, method, *params)["error"]["code"] == code


def test_blocks_are_described_as_on_a_cluster(ledger: Ledger) -> None:
    payer = funded(ledger)
    sent = payment(ledger, payer, Keypair().pubkey(), SOL)
    signature = send(ledger, sent)["result"]
    slot = call(ledger, "getSignatureStatuses", [signature])["result"]["value"][0]["slot"]
    assert call(ledger, "getBlock", 2**40)["error"]["code"] == -32004
    while call(ledger, "getSlot")["result"] <= slot:
        pass
    block = call(ledger, "getBlock", slot, {"maxSupportedTransactionVersion": 0})["result"]
    assert signature in [one["transaction"]["signatures"][0] for one in block["transactions"]]
    assert block["parentSlot"] < slot
    signatures = call(ledger, "getBlock", slot, {"transactionDetails": "signatures", "rewards": False})["result"]
    assert signature in signatures["signatures"]
    assert "rewards" not in signatures
    bare = call(ledger, "getBlock", slot, {"transactionDetails": "none"})["result"]
    assert bare["blockhash"] == block["blockhash"]
    assert call(ledger, "getBlockTime", slot)["result"] == block["blockTime"]
    slots = call(ledger, "getBlocks", slot, slot + 50)["result"]
    assert slots[0] == slot
    following = call(ledger, "getBlocksWithLimit", slot, 2)["result"]
    while len(following) < 2:
        following = call(ledger, "getBlocksWithLimit", slot, 2)["result"]
    after = call(ledger, "getBlock", following[1], {"transactionDetails": "none"})["result"]
    assert (after["parentSlot"], after["previousBlockhash"]) == (slot, block["blockhash"])
    assert after["blockHeight"] == block["blockHeight"] + 1


def test_solana_py_knows_the_cluster(ledger: Ledger) -> None:
    async def use(client: AsyncClient) -> None:
        identity = (await client.get_identity()).value.identity
        assert (await client.get_slot_leader()).value == identity
        assert (await client.get_slot_leaders(0, 2)).value == [identity, identity]
        assert (await client.get_cluster_nodes()).value[0].pubkey == identity
        assert (await client.get_vote_accounts()).value.current == []
        assert (await client.get_epoch_schedule()).value.slots_per_epoch == 432_000
        assert (await client.get_first_available_block()).value >= 0
        assert (await client.get_minimum_ledger_slot()).value >= 0
        assert (await client.get_supply()).value.total > 0
        assert (await client.get_inflation_governor()).value.initial == 0.0
        assert (await client.get_inflation_rate()).value.total == 0.0
        slot = (await client.get_blocks(0)).value[-1]
        block = (await client.get_block(slot, max_supported_transaction_version=0)).value
        assert block is not None

    with_solana_py(ledger, use)


def test_tokens_are_found_by_their_owner(ledger: Ledger) -> None:
    """A mint and an account of the token program, made with its own instructions."""
    payer, mint, account = funded(ledger), Keypair(), Keypair()
    token = Pubkey.from_string("TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA")

    def made(key: Keypair, space: int) -> Instruction:
        return create_account(
            CreateAccountParams(
                from_pubkey=payer.pubkey(), to_pubkey=key.pubkey(), lamports=SOL // 10, space=space, owner=token
            )
        )

    def writes(*keys: Pubkey) -> list[AccountMeta]:
        return [AccountMeta(key, is_signer=False, is_writable=True) for key in keys]

    instructions = [
        made(mint, 82),
        Instruction(token, bytes([20, 2]) + bytes(payer.pubkey()) + b"\0", writes(mint.pubkey())),
        made(account, 165),
        Instruction(token, bytes([18]) + bytes(payer.pubkey()), writes(account.pubkey(), mint.pubkey())),
        Instruction(
            token,
            bytes([7]) + (12_345).to_bytes(8, "little"),
            [*writes(mint.pubkey(), account.pubkey()), AccountMeta(payer.pubkey(), is_signer=True, is_writable=False)],
        ),
    ]
    at = blockhash(ledger)
    message = Message.new_with_blockhash(instructions, payer.pubkey(), at)
    assert "result" in send(ledger, Transaction([payer, mint, account], message, at))
    owner = str(payer.pubkey())
    for wanted in ({"mint": str(mint.pubkey())}, {"programId": str(token)}):
        found = call(ledger, "getTokenAccountsByOwner", owner, wanted, {"encoding": "base64"})["result"]["value"]
        assert [one["pubkey"] for one in found] == [str(account.pubkey())]
    balance = call(ledger, "getTokenAccountBalance", str(account.pubkey()))["result"]["value"]
    assert (balance["amount"], balance["uiAmountString"]) == ("12345", "123.45")
    assert call(ledger, "getTokenSupply", str(mint.pubkey()))["result"]["value"]["amount"] == "12345"
    assert call(ledger, "getTokenAccountBalance", owner)["error"]["code"] == -32602
    assert call(ledger, "getTokenAccountsByOwner", owner, {})["error"]["code"] == -32602
