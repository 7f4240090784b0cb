"""Digests of evaluations on chain, as memos: who measured what of a run, and when, without trusting a server.

The program knows nothing of them. A transaction carries a memo (the SPL program that logs a text and checks who signed
it) and a transfer of nothing whose extra account makes it findable: an address derived from the run's, under which
``getSignaturesForAddress`` lists the run's evaluations and nothing else. Wallets attach references to payments in this
way (Solana Pay's specification, ``reference``).
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Any, Final

from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer
from solders.transaction import VersionedTransaction

from coordinator.chain import Chain, ChainUnavailable
from coordinator.history import signatures_of

MEMO_PROGRAM: Final = Pubkey.from_string("MemoSq4gqABAXKb96qnH8TysNcWxMyWCqXgDLGmfcHr")
_SEED: Final = "psyche evaluations"
_MEMO: Final = re.compile(r"psyche evaluation run=(\S+) round=(\d{1,10}) sha256=([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class RecordedEvaluation:
    """A digest as it stands on chain: anybody may record one; whether ``wallet`` is a member's, the table says."""

    slot: int
    signature: str
    wallet: Pubkey
    round: int
    """Rounds of the run that the evaluated weights contain."""
    digest: bytes


def evaluations_address(run: Pubkey) -> Pubkey:
    """The address under which a run's evaluations are found; no account is there."""
    return Pubkey.create_with_seed(run, _SEED, MEMO_PROGRAM)


def record_instructions(run: Pubkey, wallet: Pubkey, round: int, digest: bytes) -> list[Instruction]:
    """What records a digest (32 bytes) of an evaluation of the weights before ``round``; ``wallet`` signs."""
    if len(digest) != 32:
        raise ValueError(f"a digest has 32 bytes, not {len(digest)}")
    text = f"psyche evaluation run={run} round={round} sha256={digest.hex()}"
    nothing = transfer(TransferParams(from_pubkey=wallet, to_pubkey=wallet, lamports=0))
    mark = AccountMeta(evaluations_address(run), is_signer=False, is_writable=False)
    return [
        Instruction(nothing.program_id, nothing.data, [*nothing.accounts, mark]),
        Instruction(MEMO_PROGRAM, text.encode(), [AccountMeta(wallet, is_signer=True, is_writable=False)]),
    ]


async def recorded_evaluations(chain: Chain, run: Pubkey) -> list[RecordedEvaluation]:
    """The digests recorded for a run, oldest first, as far back as the endpoint's history goes.

    Raises ChainUnavailable.
    """
    found = []
    for signature, succeeded in await signatures_of(chain, evaluations_address(run)):
        if succeeded:
            found += await _read(chain, run, signature)
    return found


async def _read(chain: Chain, run: Pubkey, signature: str) -> list[RecordedEvaluation]:
    options = {"encoding": "base64", "commitment": "confirmed", "maxSupportedTransactionVersion": 0}
    answer: Any = await chain.rpc.call("getTransaction", [signature, options])
    if answer is None:
        return []
    try:
        slot = int(answer["slot"])
        message = VersionedTransaction.from_bytes(base64.b64decode(answer["transaction"][0])).message
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise ChainUnavailable("getTransaction: the endpoint's answer does not have Solana's shape") from error
    keys, found = list(message.account_keys), []
    for one in message.instructions:
        # Accounts of a lookup table are never signers, so the memo's are all here.
        if one.program_id_index >= len(keys) or keys[one.program_id_index] != MEMO_PROGRAM or len(one.accounts) != 1:
            continue
        said = _MEMO.fullmatch(bytes(one.data).decode("utf-8", "replace"))
        signer = bytes(one.accounts)[0]
        if said is None or said[1] != str(run) or signer >= message.header.num_required_signatures:
            continue
        found.append(RecordedEvaluation(slot, signature, keys[signer], int(said[2]), bytes.fromhex(said[3])))
    return found
