"""The client of one run: what a node, a dashboard or the admin tool reads of it and does in it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final, Self

from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.signature import Signature

from coordinator import instructions
from coordinator.addresses import RunAddresses, run_addresses
from coordinator.chain import Chain, ChainError, ChainUnavailable, ProgramError, RpcError, TransactionFailed
from coordinator.evaluations import record_instructions
from coordinator.fees import DEFAULT_FEE_CAP, PriorityFee
from coordinator.jsonrpc import Json, Unusable
from coordinator.layout import MAX_MEMBERS, ROUND, round_offset
from coordinator.looks import look
from coordinator.pulses import Delay, Pulse, Pulses, RunNotFound
from coordinator.rpc import PATIENCE_SECONDS
from coordinator.state import (
    MEMBERS_SIZE,
    ROUND_SIZE,
    ROUNDS_SIZE,
    Limits,
    MalformedAccount,
    Member,
    Round,
    Terms,
    decode_members,
    decode_round,
    decode_rounds,
    decode_run,
)

__all__ = [
    "ChainError",
    "ChainUnavailable",
    "CoordinatorClient",
    "ProgramError",
    "Pulse",
    "RpcError",
    "RunExists",
    "RunNotFound",
    "TransactionFailed",
]

log = logging.getLogger(__name__)

# Twice what the protocol allows commit and attest: priority fees are paid on it, and nodes send these two every round.
_FEW_UNITS: Final = 20_000
_MAX_SIGNATURE_PAGES: Final = 100
_SIGNATURES_PER_PAGE: Final = 1000


class RunExists(ChainError):
    """The owner has a run of this name already."""


class CoordinatorClient(Chain):
    """A connection to one run. All methods raise ChainUnavailable when no endpoint answers in time.

    Args:
        rpc_urls: RPC endpoints in order of preference; the next one takes over where one fails.
        program_id: the coordinator program.
        run: the run's accounts; None for a client that only deploys, creates runs and moves funds.
        wallet: the member's or owner's wallet; None to read only.
        commitment: processed, confirmed or finalized.
        priority_fee: micro-lamports per compute unit, or "auto": what the cluster has lately asked for.
        priority_fee_cap: micro-lamports per compute unit that "auto" never goes above.
        patience: seconds that a call may take with all its attempts.
    """

    def __init__(
        self,
        rpc_urls: Sequence[str],
        program_id: Pubkey,
        run: RunAddresses | None,
        wallet: Keypair | None,
        *,
        commitment: str = "confirmed",
        priority_fee: PriorityFee = 0,
        priority_fee_cap: int = DEFAULT_FEE_CAP,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        super().__init__(
            rpc_urls,
            wallet,
            program_id=program_id,
            commitment=commitment,
            priority_fee=priority_fee,
            priority_fee_cap=priority_fee_cap,
            patience=patience,
        )
        self.program_id = program_id
        self._run = run

    @classmethod
    async def open(
        cls, rpc_urls: Sequence[str], run: Pubkey | str, wallet: Keypair | None = None, **options: Any
    ) -> Self:
        """A client of the run whose account has the address `run`; the chain tells the rest. Options: `__init__`'s.

        Raises:
            RunNotFound: there is no run at that address.
        """
        try:
            address = run if isinstance(run, Pubkey) else Pubkey.from_string(run)
        except ValueError:
            raise RunNotFound(
                f"{run!r} is not the address of a run (32 bytes in base58); copy it from its owner once more"
            ) from None
        account = await look(rpc_urls, options, lambda chain: chain.account(address))
        if account is None:
            raise RunNotFound(f"there is no account {address} on this chain; is it the right RPC endpoint?")
        try:
            decoded = decode_run(account.data)
        except MalformedAccount as error:
            raise RunNotFound(
                f"account {address} is not a run of this version: {error}; is it the right address?"
            ) from error
        # The addresses are derived from owner and name, so the account proves that it is what it says it is.
        addresses = run_addresses(account.owner, decoded.owner, decoded.run_id)
        if addresses.run != address:
            raise RunNotFound(
                f"account {address} holds a run whose address would be {addresses.run}; do not trust it, ask the "
                "run's owner for the address"
            )
        return cls(rpc_urls, account.owner, addresses, wallet, **options)

    @property
    def addresses(self) -> RunAddresses:
        if self._run is None:
            raise ChainError("this client was opened without a run")
        return self._run

    # ------------------------------------------------------------------ reading

    async def pulse(self) -> Pulse:
        """The state of the run, in one request. Raises RunNotFound."""
        return await Pulses(self, self.addresses).read()

    def watch(self, delay: Delay | None = None) -> AsyncIterator[Pulse]:
        """The state of the run whenever it changes or this client should act, and now and then in between.

        Never ends by itself, and survives lost connections; the slot never goes back. Raises RunNotFound when the run
        is gone. `delay` gives the slots that this client waits after a transition is due before it would tick.
        """
        return Pulses(self, self.addresses, delay).follow()

    async def members(self) -> tuple[Member, ...]:
        """Everybody in the member table, in slot order."""
        return decode_members(await self._part(self.addresses.members, 0, MEMBERS_SIZE))

    async def rounds(self) -> tuple[Round, ...]:
        """The rounds that the chain keeps in full, oldest first."""
        return decode_rounds(await self._part(self.addresses.rounds, 0, ROUNDS_SIZE))

    async def transaction_counts(self) -> tuple[int, int]:
        """How many transactions named this run, and how many of them failed, as far as the endpoint's history goes."""
        total = failed = 0
        before: str | None = None
        for _ in range(_MAX_SIGNATURE_PAGES):
            options: dict[str, Json] = {"limit": _SIGNATURES_PER_PAGE, "commitment": "confirmed"}
            if before is not None:
                options["before"] = before
            page = await self.rpc.ask("getSignaturesForAddress", [str(self.addresses.run), options], _page)
            total += len(page)
            failed += sum(one.get("err") is not None for one in page)
            if len(page) < _SIGNATURES_PER_PAGE:
                break
            before = str(page[-1].get("signature"))
        return total, failed

    async def round(self, number: int, slots: int, update_bytes: int, *, commitments: bool = True) -> Round | None:
        """One round as far as a node needs it; None when the chain does not keep it (any more).

        Of its commitments only digest and length are given (the program takes no length but `update_bytes`), the rest
        is 0; none at all without `commitments`. `slots` is a guess at how many slots of the member table are in use:
        the nearer it is, the less is read.
        """
        while True:
            slots = min(max(slots, 1), MAX_MEMBERS)
            last, width = ("digest", 32) if commitments else ("slice_count", 4)
            size = ROUND.offsets[last] + slots * width
            data = await self._part(self.addresses.rounds, round_offset(number), size)
            record = decode_round(data.ljust(ROUND_SIZE, b"\0"))
            if record is None or record.round != number:
                return None
            if max(record.active, default=0) < slots:
                break
            slots = max(record.active) + 1
        known = record.commitments if commitments else {}
        lengths = {member: replace(one, length=update_bytes) for member, one in known.items()}
        return replace(record, commitments=lengths)

    async def _part(self, key: Pubkey, offset: int, size: int) -> bytes:
        account = await self.account(key, (offset, size))
        if account is None or account.owner != self.program_id or len(account.data) != size:
            # Whether the run is gone is for `watch` to say, which looks more than once: this may be one bad answer.
            raise ChainUnavailable(
                f"account {key} of run {self.addresses.run} is not what it should be at this endpoint; if the run has "
                "not been closed, use another RPC endpoint"
            )
        return account.data

    # ------------------------------------------------------------------ acting

    async def create_run(self, run_id: str, limits: Limits, terms: Terms) -> RunAddresses:
        """Create a run owned by the wallet.

        Raises:
            RunExists: the wallet has a run of this name.
            ProgramError: for limits or terms that the program refuses.
        """
        owner = self._signer()
        addresses = run_addresses(self.program_id, owner, run_id)
        if await self.account(addresses.run, (0, 0)) is not None:
            raise RunExists(f"{owner} has a run {run_id!r} already, at {addresses.run}; choose another name")
        await self.load_rent()
        created = instructions.create_run_instructions(self.program_id, owner, run_id, limits, terms, self.rent_exempt)
        await self.send(*created)
        return addresses

    async def join(
        self, node_key: Keypair, share: int = instructions.DEFAULT_SHARE, grant: Pubkey | None = None
    ) -> Signature:
        """Become a member with this node key, which signs too; by a grant, where the run has a join authority."""
        made = instructions.join(self.addresses, self.program_id, self._signer(), node_key.pubkey(), share, grant)
        return await self.send(made, extra_signers=(node_key,))

    async def set_share(self, share: int) -> Signature:
        """Ask for another share of the batch, from the next round on."""
        return await self.send(instructions.set_share(self.addresses, self.program_id, self._signer(), share))

    async def claim(self, receipt: Pubkey | None = None) -> Signature:
        """Have the rewards paid that were earned and not claimed: in the wallet's slot, or in a receipt."""
        return await self.send(instructions.claim(self.addresses, self.program_id, self._signer(), receipt))

    async def restore(self, receipt: Pubkey, payer: Pubkey) -> Signature:
        """Move the credit in a receipt into the wallet's present slot; its deposit goes back to who paid it."""
        return await self.send(instructions.restore(self.addresses, self.program_id, self._signer(), receipt, payer))

    async def ready(self, model_root: bytes) -> Signature:
        """Report the model loaded."""
        return await self.send(instructions.ready(self.addresses, self.program_id, self._signer(), model_root))

    async def commit(self, round: int, digest: bytes, length: int, tokens: int, fingerprint: int) -> Signature:
        """Commit to this member's update of `round`."""
        made = instructions.commit(
            self.addresses, self.program_id, self._signer(), round, digest, length, tokens, fingerprint
        )
        return await self.send(made, compute_units=_FEW_UNITS)

    async def attest(self, round: int, members: Iterable[int]) -> Signature:
        """Attest, as an elected witness, to the updates of these members (slots)."""
        made = instructions.attest(self.addresses, self.program_id, self._signer(), round, members)
        return await self.send(made, compute_units=_FEW_UNITS)

    async def tick(self) -> Signature:
        """Make the transition that is due."""
        return await self.send(instructions.tick(self.addresses, self.program_id, self._signer()))

    async def checkpoint(self, round: int, root: bytes) -> Signature:
        """Report the model root of the weights before `round`."""
        return await self.send(instructions.checkpoint(self.addresses, self.program_id, self._signer(), round, root))

    async def record_evaluation(self, round: int, digest: bytes) -> Signature:
        """Record the SHA-256 of an evaluation's results, of the weights before `round`, under the wallet's name."""
        return await self.send(*record_instructions(self.addresses.run, self._signer(), round, digest))

    async def leave(self) -> Signature:
        """Leave the run."""
        return await self.send(instructions.leave(self.addresses, self.program_id, self._signer()))

    def _signer(self) -> Pubkey:
        if self.wallet is None:
            raise ChainError("this client has no wallet, so it can only read; open it with a wallet to act")
        return self.wallet.pubkey()


def _page(answer: Json) -> list[dict[str, Json]]:
    if not isinstance(answer, list) or not all(isinstance(one, dict) for one in answer):
        raise Unusable("the answer is not a list of transactions")
    return answer
