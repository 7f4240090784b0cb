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
    limits, priority = run.limits, 0 if priority_fee == "auto" else priority_fee
    members, left = max(run.member_count, limits.init_min_members), max(limits.total_rounds - run.round, 1)

    def fees(rounds: int) -> int:
        return member_fees(members, rounds, limits.rounds_per_epoch, limits.witnesses, priority)

    await chain.load_rent()
    deposit = chain.rent_exempt(0)  # what a wallet has to keep, unless it is emptied to the last lamport
    there, whole = await chain.balance(wallet), fees(left) + deposit
    beside = ", beside priority fees" if priority_fee == "auto" else ""
    parts = (
        f"about {sol(fees(left))} SOL in fees{beside}, and {sol(deposit)} SOL stay in the wallet, as the chain wants"
    )
    if there < fees(1) + deposit:
        await require_funds(chain, wallet, whole, f"being a member for the {left:,} rounds of this run ({parts})")
    elif there < whole:
        log.warning(
            "wallet %s has %s SOL, and the %s rounds that are left take %s SOL (%s): send it more before it is empty",
            wallet,
            sol(there),
            f"{left:,}",
            sol(whole),
            parts,
        )
