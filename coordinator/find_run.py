"""Finding a run by what people know of it: its account's address, or its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from solders.pubkey import Pubkey

from coordinator.addresses import run_addresses
from coordinator.chain import Chain, RpcError
from coordinator.client import RunNotFound
from coordinator.deploy import LOADER
from coordinator.layout import RUN, RUN_MARK, RUN_SIZE
from coordinator.state import MalformedAccount, Run, decode_run

# The upgradeable loader marks a program's account, as opposed to its data or a buffer, with this 32-bit number.
_PROGRAM_MARK: Final = (2).to_bytes(4, "little")
_MAX_PROGRAMS: Final = 64


@dataclass(frozen=True, slots=True)
class FoundRun:
    """A run on a chain: its account's address, the program that it belongs to, and what the account says."""

    address: Pubkey
    program: Pubkey
    run: Run


async def all_runs(chain: Chain, program: Pubkey | None) -> list[FoundRun]:
    """Every run of a program; without one those of every program on the chain, which only a small chain allows.

    Raises:
        RunNotFound: the chain has too many programs to ask, or does not list them.
    """
    programs = [program] if program is not None else await _programs(chain)
    found = []
    for one in programs:
        for address, account in await chain.program_accounts(one, RUN_MARK, (0, RUN_SIZE)):
            try:
                decoded = decode_run(account.data)
            except MalformedAccount:
                continue  # another version's; this one could not show it either
            # Addresses are derived from owner and name: an account elsewhere only pretends to be that run.
            if run_addresses(one, decoded.owner, decoded.run_id).run == address:
                found.append(FoundRun(address, one, decoded))
    return found


async def find_run(chain: Chain, run: str, program: Pubkey | None, owner: Pubkey | None) -> Pubkey:
    """The address of a run's account.

    Args:
        run: that address itself, or the run's name.
        program: where to look; without it every program on the chain is asked, which only a small chain allows.
        owner: to tell runs of one name apart.

    Raises:
        RunNotFound: there is none, or several; the message says which.
    """
    try:
        return Pubkey.from_string(run)
    except ValueError:
        pass  # a name, then
    if not 1 <= len(run.encode()) <= RUN.span("run_id")[1] - RUN.span("run_id")[0]:
        raise RunNotFound(f"{run!r} is neither an address nor a run's name (1 to 32 bytes)")
    if program is not None and owner is not None:
        return run_addresses(program, owner, run).run
    everything = await all_runs(chain, program)
    found = [one for one in everything if one.run.run_id == run and owner in (None, one.run.owner)]
    if not found:
        raise RunNotFound(f"no run is called {run!r} on this chain; give the address of its account, or --program")
    if len(found) > 1:
        listed = "\n".join(f"  {one.address}  owner {one.run.owner}  program {one.program}" for one in found)
        raise RunNotFound(
            f"several runs are called {run!r}; give --owner, --program or one of these addresses:\n{listed}"
        )
    return found[0].address


async def _programs(chain: Chain) -> list[Pubkey]:
    try:
        accounts = await chain.program_accounts(LOADER, _PROGRAM_MARK, (0, 0))
    except RpcError as error:
        raise RunNotFound(f"this endpoint does not list programs ({error.message}); give --program") from error
    if len(accounts) > _MAX_PROGRAMS:
        raise RunNotFound(f"there are {len(accounts)} programs on this chain, too many to ask; give --program")
    return [key for key, _ in accounts]
