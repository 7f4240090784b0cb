"""The accounts of one answer in Solana's JSON, as many as fit into an answer."""

from __future__ import annotations

from solders.account import Account
from solders.pubkey import Pubkey

from coordinator.ledger.dispatch import MAX_RESPONSE_BYTES
from coordinator.ledger.encoding import Json, account_json, keyed_account_json
from coordinator.ledger.params import INTERNAL_ERROR, RpcError

# What an account takes beside its data: names, owner, numbers.
_SHAPE_BYTES = 256


class AccountsOfAnswer:
    """Encodes accounts in one form, until they are too large together.

    Args:
        encoding: of their data.
        window: a (offset, length) slice of it; None: all of it.
    """

    def __init__(self, encoding: str, window: tuple[int, int] | None = None) -> None:
        self._encoding = encoding
        self._window = window
        self._left = MAX_RESPONSE_BYTES

    def json(self, account: Account | None) -> Json:
        """None for an account that does not exist. Raises RpcError before one more is encoded than fits."""
        if account is None:
            return None
        size = len(account.data)
        if self._window is not None:
            size = max(0, min(size - self._window[0], self._window[1]))
        # Base64; what base58 takes more for its 128 bytes at most is within the shape's.
        self._left -= size * 4 // 3 + _SHAPE_BYTES
        if self._left < 0:
            raise RpcError(
                INTERNAL_ERROR,
                f"The response is over {MAX_RESPONSE_BYTES} bytes: ask for fewer accounts, or for a dataSlice of them",
            )
        return account_json(account, self._encoding, self._window)

    def keyed(self, key: Pubkey, account: Account) -> Json:
        """The same, with its address."""
        return keyed_account_json(key, self.json(account))
