"""The client of one run: what a node, a dashboard or the admin tool reads of it and does in it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.signature import Signature

from coordinator import instructions
from coordinator.addresses import RunAddresses, run_addresses
from coordinator.chain import Account, Chain, ChainError, ChainUnavailable, ProgramError, RpcError, TransactionFailed
from coordinator.rpc import PATIENCE_SECONDS, Json
from coordinator.state import (
    HEADER_SIZE,
    MEMBERS_SIZE,
    ROUNDS_SIZE,
    RUN_SIZE,
    UNKNOWN_SLOT,
    Header,
    Limits,
    MalformedAccount,
    Member,
    Phase,
    Round,
    Run,
    Terms,
    decode_header,
    decode_members,
    decode_rounds,
    decode_run,
)
from coordinator.watch import Pace

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

_PULSE_BYTES: Final = max(RUN_SIZE, HEADER_SIZE)
_LONGEST_PAUSE: Final = 10.0
# Up to this many members every change of the header is pushed; beyond it, 256 members' commitments would cost more
# than polling, so only changes of the state machine are pushed.
_PUSH_HEADER_MEMBERS: Final = 64
_MAX_SIGNATURE_PAGES: Final = 100
_SIGNATURES_PER_PAGE: Final = 1000


class RunNotFound(ChainError):
    """There is no run where one was looked for."""


class RunExists(ChainError):
    """The owner has a run of this name already."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """The state of the run as of one slot: the state machine, and what moves between its ticks."""

    slot: int
    run: Run
    header: Header


class CoordinatorClient(Chain):
    """A connection to one run. All methods raise ChainUnavailable when no endpoint answers in time.

    Args:
        rpc_urls: RPC endpoints in order of preference; the next one takes over where one fails.
        program_id: the coordinator program.
        run: the run's accounts; None for a client that only deploys, creates runs and moves funds.
        wallet: the member's or owner's wallet; None to read only.
        commitment: processed, confirmed or finalized.
        priority_fee: micro-lamports per compute unit; raise it when transactions expire on a busy cluster.
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
        priority_fee: int = 0,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        super().__init__(
            rpc_urls,
            wallet,
            program_id=program_id,
            commitment=commitment,
            priority_fee=priority_fee,
            patience=patience,
        )
        self.program_id = program_id
        self._run = run
        self._pace = Pace()

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
            raise RunNotFound(f"{run!r} is not the address of a run (32 bytes in base58)") from None
        async with Chain(rpc_urls, **options) as chain:
            account = await chain.account(address)
        if account is None:
            raise RunNotFound(f"there is no account {address} on this chain; is it the right RPC endpoint?")
        decoded = _run_in(address, account)
        # The addresses are derived from owner and name, so the account proves that it is what it says it is.
        addresses = run_addresses(account.owner, decoded.owner, decoded.run_id)
        if addresses.run != address:
            raise RunNotFound(f"account {address} holds a run whose address would be {addresses.run}; do not trust it")
        return cls(rpc_urls, account.owner, addresses, wallet, **options)

    @property
    def addresses(self) -> RunAddresses:
        if self._run is None:
            raise ChainError("this client was opened without a run")
        return self._run

    @property
    def slot_seconds(self) -> float:
        """Seconds per slot, as measured by `watch`; 0.4, a cluster's, before that."""
        return self._pace.slot_seconds

    # ------------------------------------------------------------------ reading

    async def pulse(self) -> Pulse:
        """The state of the run, in one request. Raises RunNotFound."""
        addresses = self.addresses
        slot, (run, rounds) = await self.accounts([addresses.run, addresses.rounds], (0, _PULSE_BYTES))
        if run is None or rounds is None:
            raise RunNotFound(f"run {addresses.run} is not on this chain; was it closed, or is it another endpoint?")
        try:
            return Pulse(slot, _run_in(addresses.run, run), decode_header(rounds.data))
        except MalformedAccount as error:
            raise RunNotFound(str(error)) from error

    async def members(self) -> tuple[Member, ...]:
        """Everybody in the member table, in slot order."""
        return decode_members(await self._whole(self.addresses.members, MEMBERS_SIZE))

    async def rounds(self) -> tuple[Round, ...]:
        """The rounds that the chain keeps in full, oldest first."""
        return decode_rounds(await self._whole(self.addresses.rounds, ROUNDS_SIZE))

    async def _whole(self, key: Pubkey, size: int) -> bytes:
        account = await self.account(key, (0, size))
        if account is None or account.owner != self.program_id:
            raise RunNotFound(f"account {key} of run {self.addresses.run} is not on this chain")
        return account.data

    async def transaction_counts(self) -> tuple[int, int]:
        """How many transactions named this run, and how many of them failed, as far as the endpoint's history goes."""
        total = failed = 0
        before: str | None = None
        for _ in range(_MAX_SIGNATURE_PAGES):
            options: dict[str, Json] = {"limit": _SIGNATURES_PER_PAGE, "commitment": "confirmed"}
            if before is not None:
                options["before"] = before
            page = await self.rpc.call("getSignaturesForAddress", [str(self.addresses.run), options])
            if not isinstance(page, list) or not all(isinstance(one, dict) for one in page):
                raise ChainUnavailable("getSignaturesForAddress: the endpoint's answer does not have Solana's shape")
            total += len(page)
            failed += sum(one.get("err") is not None for one in page)
            if len(page) < _SIGNATURES_PER_PAGE:
                break
            before = str(page[-1].get("signature"))
        return total, failed

    async def watch(self) -> AsyncIterator[Pulse]:
        """The state of the run whenever it changes or a transition becomes due, and now and then in between.

        Never ends by itself, and survives lost connections; the slot never goes back. Raises RunNotFound when the run
        is gone.
        """
        changed = asyncio.Event()
        handles: dict[str, int] = {}
        failures = 0
        last = -1
        try:
            while True:
                changed.clear()
                try:
                    pulse = await self.pulse()
                except ChainUnavailable as error:
                    failures += 1
                    pause = min(2.0 ** min(failures, 8) / 2, _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
                    log.warning("the run's state cannot be read, trying again in %.1f s: %s", pause, error)
                    await asyncio.sleep(pause)
                    continue
                failures = 0
                self._follow(pulse, handles, changed)
                if pulse.slot >= last:
                    last = pulse.slot
                    self._pace.see(pulse.slot)
                    yield pulse
                due = None if pulse.header.due_slot == UNKNOWN_SLOT else pulse.header.due_slot
                idle = pulse.run.phase in (Phase.FINISHED, Phase.PAUSED)
                await self._pace.rest(changed, pulse.slot, due, pushes=self.subscriptions.connected, idle=idle)
        finally:
            for handle in handles.values():
                self.subscriptions.unsubscribe(handle)

    def _follow(self, pulse: Pulse, handles: dict[str, int], changed: asyncio.Event) -> None:
        """Have the changes pushed that are worth it at this size of the run."""
        options: dict[str, Json] = {"encoding": "base64", "commitment": self.commitment}

        def wake(value: Json) -> None:
            changed.set()

        # Pushes only wake, so they carry no data: of two accounts, one could be from before a tick, one from after.
        options["dataSlice"] = {"offset": 0, "length": 0}
        if "run" not in handles:
            handles["run"] = self.subscriptions.subscribe("account", [str(self.addresses.run), options], wake)
        wanted = pulse.header.members <= _PUSH_HEADER_MEMBERS
        if wanted and "rounds" not in handles:
            handles["rounds"] = self.subscriptions.subscribe("account", [str(self.addresses.rounds), options], wake)
        elif not wanted and "rounds" in handles:
            self.subscriptions.unsubscribe(handles.pop("rounds"))

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

    async def ready(self, model_root: bytes) -> Signature:
        """Report the model loaded."""
        return await self.send(instructions.ready(self.addresses, self.program_id, self._signer(), model_root))

    async def commit(self, round: int, digest: bytes, length: int, tokens: int, fingerprint: int) -> Signature:
        """Commit to this member's update of `round`."""
        made = instructions.commit(
            self.addresses, self.program_id, self._signer(), round, digest, length, tokens, fingerprint
        )
        return await self.send(made)

    async def attest(self, round: int, members: Iterable[int]) -> Signature:
        """Attest, as an elected witness, to the updates of these members (slots)."""
        return await self.send(instructions.attest(self.addresses, self.program_id, self._signer(), round, members))

    async def tick(self) -> Signature:
        """Make the transition that is due."""
        return await self.send(instructions.tick(self.addresses, self.program_id, self._signer()))

    async def checkpoint(self, round: int, root: bytes) -> Signature:
        """Report the model root of the weights before `round`."""
        return await self.send(instructions.checkpoint(self.addresses, self.program_id, self._signer(), round, root))

    async def leave(self) -> Signature:
        """Leave the run."""
        return await self.send(instructions.leave(self.addresses, self.program_id, self._signer()))

    def _signer(self) -> Pubkey:
        if self.wallet is None:
            raise ChainError("this client has no wallet, so it can only read; open it with a wallet to act")
        return self.wallet.pubkey()


def _run_in(address: Pubkey, account: Account) -> Run:
    try:
        return decode_run(account.data)
    except MalformedAccount as error:
        raise RunNotFound(f"account {address} is not a run of this version: {error}") from error
