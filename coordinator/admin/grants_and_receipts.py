"""Grants and receipts, which have accounts of their own: those of one run."""

from __future__ import annotations

from solders.pubkey import Pubkey

from coordinator.chain import Chain
from coordinator.layout import GRANT_MARK, GRANT_SIZE, RECEIPT_MARK, RECEIPT_SIZE
from coordinator.state import Grant, MalformedAccount, Receipt, decode_grant, decode_receipt


async def grants_of(chain: Chain, program: Pubkey, run: Pubkey, created_slot: int) -> list[tuple[Pubkey, Grant]]:
    """The grants of a run, by age; those of an earlier run of its name, created in another slot, open nothing."""
    found = []
    for address, account in await chain.program_accounts(program, GRANT_MARK, (0, GRANT_SIZE)):
        try:
            grant = decode_grant(account.data)
        except MalformedAccount:
            continue  # another version's
        if grant.run == run and grant.run_slot == created_slot:
            found.append((address, grant))
    return sorted(found, key=lambda one: (one[1].created_slot, str(one[0])))


async def receipts_of(chain: Chain, program: Pubkey, run: Pubkey, created_slot: int) -> list[tuple[Pubkey, Receipt]]:
    """The receipts of a run, by age; those of an earlier run of its name are worth nothing in it."""
    found = []
    for address, account in await chain.program_accounts(program, RECEIPT_MARK, (0, RECEIPT_SIZE)):
        try:
            receipt = decode_receipt(account.data)
        except MalformedAccount:
            continue  # another version's
        if receipt.run == run and receipt.run_slot == created_slot:
            found.append((address, receipt))
    return sorted(found, key=lambda one: (one[1].archived_slot, str(one[1].wallet)))
