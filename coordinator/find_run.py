"""Finding a run by what people know of it: its account's address, or its name."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.addresses import MAX_RUN_ID_BYTES, run_addresses
from coordinator.chain import Chain, ChainError, RpcError
from coordinator.client import CoordinatorClient, RunNotFound
from coordinator.deploy import LOADER
from coordinator.layout import RUN_MARK, RUN_SIZE
from coordinator.looks import look
from coordinator.printable import printable
from coordinator.state import MalformedAccount, Run, decode_run

# The upgradeable loader marks a program's account, as opposed to its data or a buffer, with this 32-bit number.
_PROGRAM_MARK: Final = (2).to_bytes(4, "little")
_MAX_PROGRAMS: Final = 64
# A name that is so much like another is a slip; of an address a character or two may be wrong or missing.
_LIKE_A_NAME: Final = 0.6
_LIKE_AN_ADDRESS: Final = 0.9
_MOST_NEAR: Final = 3
_MOST_THERE: Final = 5
_HINT_SECONDS: Final = 3.0


@dataclass(frozen=True, slots=True)
class FoundRun:
    """A run on a chain: its account's address, the program that it belongs to, and what the account says."""

    address: Pubkey
    program: Pubkey
    run: Run


async def all_runs(chain: Chain, program: Pubkey | None) -> list[FoundRun]:
    """Every run of a program; without one those of every program on the chain, which only a small chain allows.

    Raises:
        RunNotFound: the chain has too many programs to ask, or does not list them or their accounts.
    """
    programs = [program] if program is not None else await _programs(chain)
    found = []
    for one in programs:
        try:
            accounts = await chain.program_accounts(one, RUN_MARK, (0, RUN_SIZE))
        except RpcError as error:
            raise RunNotFound(
                f"this endpoint does not list a program's runs ({error.message}); give the address of the run's "
                "account, or its name with --program and --owner"
            ) from error
        for address, account in accounts:
            try:
                decoded = decode_run(account.data)
            except MalformedAccount:
                continue  # another version's; this one could not show it either
            # Addresses are derived from owner and name: an account elsewhere only pretends to be that run.
            if run_addresses(one, decoded.owner, decoded.run_id).run == address:
                found.append(FoundRun(address, one, decoded))
    return found


async def open_run(
    rpc: Sequence[str],
    run: str,
    wallet: Keypair | None = None,
    *,
    program: Pubkey | None = None,
    owner: Pubkey | None = None,
    **options: Any,
) -> CoordinatorClient:
    """A client of a run, by its address or its name (`find_run`). Options: those of CoordinatorClient.

    Raises RunNotFound, and ChainUnavailable.
    """
    address = await find_run(rpc, run, program, owner, **options)
    try:
        return await CoordinatorClient.open(rpc, address, wallet, **options)
    except RunNotFound as error:
        raise RunNotFound(f"{error}{await _near_on(rpc, run, program, options)}") from None


async def find_run(
    rpc: Sequence[str], run: str, program: Pubkey | None, owner: Pubkey | None, **options: Any
) -> Pubkey:
    """The address of a run's account.

    Args:
        rpc: RPC endpoints in order of preference; each is asked before there is no such run.
        run: that address itself, or the run's name.
        program: where to look; without it every program on the chain is asked, which only a small chain allows.
        owner: to tell runs of one name apart.
        options: those of Chain.

    Raises:
        RunNotFound: there is none, or several; the message lists those, or the ones that are called nearly so.
    """
    try:
        address = _as_address(run)
    except ValueError as error:
        raise RunNotFound(f"{error}{await _near_on(rpc, run, program, options)}") from None
    if address is not None:
        return address
    if program is not None and owner is not None:
        return run_addresses(program, owner, run).run
    everything: list[FoundRun] = []

    async def called_so(chain: Chain) -> list[FoundRun]:
        everything[:] = await all_runs(chain, program)
        return [one for one in everything if one.run.run_id == run and owner in (None, one.run.owner)]

    found = await look(rpc, options, called_so)
    if not found:
        whose = f" of owner {owner}" if owner is not None else ""
        near = _near(run, everything) or _there(everything, owner)
        raise RunNotFound(f"no run{whose} is called {run!r} on this chain{near}")
    if len(found) > 1:
        raise RunNotFound(
            f"several runs are called {run!r}; give --owner, --program or one of these addresses:\n{_listed(found)}"
        )
    return found[0].address


def _as_address(run: str) -> Pubkey | None:
    """The address that ``run`` is, None for what can only be a run's name. Raises ValueError when it is neither."""
    try:
        return Pubkey.from_string(run)
    except ValueError:
        if 1 <= len(run.encode()) <= MAX_RUN_ID_BYTES and "\0" not in run:
            return None
    raise ValueError(f"{run!r} is neither an address nor a run's name (1 to {MAX_RUN_ID_BYTES} bytes)")


async def _near_on(rpc: Sequence[str], run: str, program: Pubkey | None, options: Mapping[str, Any]) -> str:
    """`_near` of what the chain lists soon: there is an error to be said already, which this must not replace."""
    try:
        async with asyncio.timeout(_HINT_SECONDS), Chain(rpc, **options) as chain:
            return _near(run, await all_runs(chain, program))
    except (ChainError, TimeoutError):
        return ""


def _near(run: str, everything: Iterable[FoundRun]) -> str:
    """The runs whose name or address is nearly ``run``, as the end of a message; empty if there is none."""
    names: dict[str, list[FoundRun]] = {}
    addresses: dict[str, list[FoundRun]] = {}
    for one in everything:
        names.setdefault(one.run.run_id.casefold(), []).append(one)
        addresses[str(one.address)] = [one]
    found = [
        one
        for known, spelled, like in ((names, run.casefold(), _LIKE_A_NAME), (addresses, run, _LIKE_AN_ADDRESS))
        for key in difflib.get_close_matches(spelled, known, _MOST_NEAR, like)
        for one in known[key]
    ]
    return f"; did you mean one of these?\n{_listed(found)}" if found else ""


def _there(everything: Sequence[FoundRun], owner: Pubkey | None) -> str:
    """The newest runs that there are, as the end of a message."""
    runs = [one for one in everything if owner in (None, one.run.owner)] or everything
    newest = sorted(runs, key=lambda one: -one.run.created_slot)[:_MOST_THERE]
    if not newest:
        return "; there are no runs at all. Is it the right endpoint, and the right --program?"
    more = f"\n  and {len(runs) - len(newest)} more: psyche-admin run list" if len(runs) > len(newest) else ""
    return f"; there are:\n{_listed(newest)}{more}"


def _listed(runs: Iterable[FoundRun]) -> str:
    return "\n".join(
        f"  {printable(one.run.run_id)}  {one.address}  owner {one.run.owner}  program {one.program}" for one in runs
    )


async def _programs(chain: Chain) -> list[Pubkey]:
    try:
        accounts = await chain.program_accounts(LOADER, _PROGRAM_MARK, (0, 0))
    except RpcError as error:
        raise RunNotFound(f"this endpoint does not list programs ({error.message}); give --program") from error
    if len(accounts) > _MAX_PROGRAMS:
        raise RunNotFound(f"there are {len(accounts)} programs on this chain, too many to ask; give --program")
    return [key for key, _ in accounts]
