"""A run's three accounts as of one slot, whole."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.client import CoordinatorClient, RunNotFound
from coordinator.layout import ROUNDS_SIZE
from coordinator.state import (
    Header,
    MalformedAccount,
    Member,
    Membership,
    Round,
    Run,
    decode_header,
    decode_members,
    decode_membership,
    decode_rounds,
    decode_run,
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that the chain keeps of a run. `lamports` are those of the run, members and rounds accounts; `raw`
    their bytes."""

    slot: int
    run: Run
    header: Header
    members: tuple[Member, ...]
    membership: Membership
    rounds: tuple[Round, ...]
    lamports: tuple[int, int, int]
    raw: tuple[bytes, bytes, bytes]

    @property
    def credit(self) -> int:
        """Tokens that members and receipts have credit for; equal to the run's tokens."""
        return sum(member.credit for member in self.members) + self.membership.archived_credit

    @property
    def reward_owed(self) -> int:
        """Lamports earned and not claimed."""
        return self.run.reward_earned - self.run.reward_paid


async def take_snapshot(client: CoordinatorClient) -> Snapshot:
    """Read all three accounts in one request. Raises RunNotFound, ChainUnavailable."""
    addresses = client.addresses
    slot, (run, members, rounds) = await client.accounts(
        [addresses.run, addresses.members, addresses.rounds], (0, ROUNDS_SIZE)
    )
    if run is None or members is None or rounds is None:
        raise RunNotFound(f"run {addresses.run} is not on this chain; was it closed, or is it another endpoint?")
    if not run.owner == members.owner == rounds.owner == client.program_id:
        raise RunNotFound(
            f"the accounts of run {addresses.run} do not belong to program {client.program_id}; is it the right one?"
        )
    try:
        return Snapshot(
            slot=slot,
            run=decode_run(run.data),
            header=decode_header(rounds.data),
            members=decode_members(members.data),
            membership=decode_membership(members.data),
            rounds=decode_rounds(rounds.data),
            lamports=(run.lamports, members.lamports, rounds.lamports),
            raw=(run.data, members.data, rounds.data),
        )
    except MalformedAccount as error:
        raise RunNotFound(str(error)) from error
