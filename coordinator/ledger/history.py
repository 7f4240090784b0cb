"""What a ledger remembers of the transactions that it executed: for getTransaction, getSignaturesForAddress and blocks.

Duplicates are refused independently of it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final

from solders.pubkey import Pubkey
from solders.signature import Signature

from coordinator.ledger.state import MAX_BLOCKHASH_AGE, Record

HISTORY_TRANSACTIONS: Final = 20_000
# A client asks for its transaction's status until the blockhash is too old, and signs again if there is none: no flood
# of others may push it out before that. Twice a blockhash's age, in slots.
HISTORY_SLOTS: Final = 2 * MAX_BLOCKHASH_AGE


class History:
    """The latest records, in the order of execution."""

    def __init__(self) -> None:
        self._records: OrderedDict[Signature, Record] = OrderedDict()
        self._by_address: dict[Pubkey, deque[Record]] = {}

    def add(self, record: Record) -> None:
        self._records[record.signature] = record
        for key in record.keys:
            self._by_address.setdefault(key, deque()).append(record)

    def forget(self, slot: int) -> None:
        """In this slot: drop the oldest records that are too many, and old enough."""
        while len(self._records) > HISTORY_TRANSACTIONS:
            signature, old = next(iter(self._records.items()))
            if old.slot + HISTORY_SLOTS >= slot:
                return
            del self._records[signature]
            for key in old.keys:
                # Records are appended in the order of the history, so the oldest is always the first.
                records = self._by_address[key]
                records.popleft()
                if not records:
                    del self._by_address[key]

    def get(self, signature: Signature) -> Record | None:
        return self._records.get(signature)

    def of_account(self, key: Pubkey) -> deque[Record]:
        """Records that name this account, oldest first. Do not change it."""
        return self._by_address.get(key, deque())

    def in_slot(self, slot: int) -> list[Record]:
        """What is still there of a slot, in the order of execution."""
        return [record for record in self._records.values() if record.slot == slot]

    def all(self) -> tuple[Record, ...]:
        """Everything, oldest first."""
        return tuple(self._records.values())
