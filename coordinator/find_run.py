"""Finding a run by what people know of it: its account's address, or its name."""

from __future__ import annotations

from typing import Final

from solders.pubkey import Pubkey

from coordinator.addresses import run_addresses
from coordinator.chain import Chain, RpcError
from coordinator.client import RunNotFound
from coordinator.deploy import LOADER
from coordinator.layout import RUN, RUN_MARK, RUN_SIZE
from coordinator.state import MalformedAccount, decode_run

# The upgradeable loader marks a program's account, as opposed to its data or a buffer, with this 32-bit number.
_PROGRAM_MARK: Final = (2).to_bytes(4, "little")
_MAX_PROGRAMS: Final = 64


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
    programs = [program] if program is not None else await _programs(chain)
    found: list[tuple[Pubkey, Pubkey, Pubkey]] = []
    for one in programs:
        for address, account in await chain.program_accounts(one, RUN_MARK, (0, RUN_SIZE)):
            try:
                decoded = decode_run(account.data)
            except MalformedAccount:
                continue  # another version's; this one could not show it either
            genuine = run_addresses(one, decoded.owner, decoded.run_id).run == address
            if genuine and decoded.run_id == run and owner in (None, decoded.owner):
                found.append((address, decoded.owner, one))
    if not found:
        raise RunNotFound(f"no run is called {run!r} on this chain; give the address of its account, or --program")
    if len(found) > 1:
        listed = "\n".join(f"  {address}  owner {who}  program {one}" for address, who, one in found)
        raise RunNotFound(
            f"several runs are called {run!r}; give --owner, --program or one of these addresses:\n{listed}"
        )
    return found[0][0]


async def _programs(chain: Chain) -> list[Pubkey]:
    try:
        accounts = await chain.program_accounts(LOADER, _PROGRAM_MARK, (0, 0))
    except RpcError as error:
        raise RunNotFound(f"this endpoint does not list programs ({error.message}); give --program") from error
    if len(accounts) > _MAX_PROGRAMS:
        raise RunNotFound(f"there are {len(accounts)} programs on this chain, too many to ask; give --program")
    return [key for key, _ in accounts]
