"""Whether a node's wallet can pay for the run, looked at before a model is loaded for nothing."""

from __future__ import annotations

import logging
from typing import Literal

from solders.pubkey import Pubkey

from coordinator.client import CoordinatorClient
from coordinator.funds import require_funds, sol
from coordinator.run_costs import member_fees
from coordinator.state import Run

log = logging.getLogger(__name__)


async def check_funds(chain: CoordinatorClient, run: Run, wallet: Pubkey, priority_fee: int | Literal["auto"]) -> None:
    """Warn of a wallet that will be empty before the run ends. Raises Unfunded for one that cannot join and begin.

    An automatic priority fee is not known before, and not counted.
    """
    priority = 0 if priority_fee == "auto" else priority_fee
    await chain.load_rent()
    deposit = chain.rent_exempt(0)  # what a wallet has to keep, unless it is emptied to the last lamport
    purpose = f"joining a run (of which {sol(deposit)} SOL stay in the wallet: the deposit that an account needs)"
    await require_funds(chain, wallet, member_fees(1, priority) + deposit, purpose)
    left = max(run.limits.total_rounds - run.round, 1)
    there, whole = await chain.balance(wallet), member_fees(left, priority) + deposit
    if there < whole:
        log.warning(
            "wallet %s has %s SOL, and %d rounds take about %s SOL with its deposit: send it more before it is empty",
            wallet,
            sol(there),
            left,
            sol(whole),
        )
