"""Whether a node's wallet can pay for the run, looked at before a model is loaded for nothing."""

from __future__ import annotations

import logging
from typing import Literal

from solders.pubkey import Pubkey

from coordinator.client import CoordinatorClient
from coordinator.funds import require_funds, sol
from coordinator.run_costs import member_fees

log = logging.getLogger(__name__)
# What a wallet has to keep, unless it is emptied to the last lamport: the deposit of an account without data.
_DEPOSIT = 890_880


async def check_funds(chain: CoordinatorClient, wallet: Pubkey, priority_fee: int | Literal["auto"]) -> None:
    """Warn of a wallet that will be empty before the run ends. Raises Unfunded for one that cannot join and begin.

    An automatic priority fee is not known before, and not counted.
    """
    run, priority = (await chain.pulse()).run, 0 if priority_fee == "auto" else priority_fee
    purpose = f"joining a run (of which {sol(_DEPOSIT)} SOL stay in the wallet: the deposit that an account needs)"
    await require_funds(chain, wallet, member_fees(1, priority) + _DEPOSIT, purpose)
    left = max(run.limits.total_rounds - run.round, 1)
    there, whole = await chain.balance(wallet), member_fees(left, priority) + _DEPOSIT
    if there < whole:
        log.warning(
            "wallet %s has %s SOL, and %d rounds take about %s SOL with its deposit: send it more before it is empty",
            wallet,
            sol(there),
            left,
            sol(whole),
        )
