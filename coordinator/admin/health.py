"""How the RPC endpoints are doing: each is asked on its own, so that one that fails hides behind no other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.markup import escape

from coordinator.chain import ChainError
from coordinator.rpc import Endpoints
from coordinator.urls import shown_url

# An endpoint further behind than this is not one to act on.
LAGGING_SLOTS: Final = 150
# They are not asked at the very same moment.
_NOISE_SLOTS: Final = 8


@dataclass(frozen=True, slots=True)
class EndpointHealth:
    """One endpoint. `seconds` is the time that one request took; `behind` is slots behind the best endpoint."""

    url: str
    seconds: float
    slot: int
    version: str
    genesis: str
    problem: str | None
    behind: int = 0

    @property
    def healthy(self) -> bool:
        return self.problem is None and self.behind <= LAGGING_SLOTS

    def to_json(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "healthy": self.healthy,
            "problem": self.problem,
            "milliseconds": round(1000 * self.seconds, 1),
            "slot": self.slot,
            "slots_behind": self.behind,
            "version": self.version,
            "genesis_hash": self.genesis,
        }

    def brief(self) -> str:
        """A few words, as rich markup."""
        if self.problem is not None:
            return f"[red]✗ {self.url}  no answer[/red]"
        mark = "[green]✓[/green]" if self.healthy else "[yellow]![/yellow]"
        behind = f"[yellow]{self.behind:,} slots behind[/yellow]" if self.behind > _NOISE_SLOTS else ""
        return f"{mark} {self.url}  [dim]{1000 * self.seconds:.0f} ms[/dim] {behind}"

    def text(self) -> str:
        """One line, as rich markup."""
        if self.problem is not None:
            return f"[red]✗[/red] {self.url}  [red]{escape(self.problem)}[/red]"
        mark = "[green]✓[/green]" if self.healthy else "[yellow]![/yellow]"
        behind = f", [yellow]{self.behind:,} slots behind[/yellow]" if self.behind > _NOISE_SLOTS else ""
        facts = f"{1000 * self.seconds:.0f} ms, slot {self.slot:,}{behind}"
        return f"{mark} {self.url}  {facts}  [dim]version {escape(self.version)}, genesis {self.genesis[:8]}…[/dim]"


async def probe(urls: Sequence[str], patience: float) -> tuple[EndpointHealth, ...]:
    """Ask every endpoint, for at most `patience` seconds each. Raises BadUrl."""
    found = await asyncio.gather(*(_probe(url, patience) for url in urls))
    best = max(one.slot for one in found)
    return tuple(
        one
        if one.problem is not None
        else EndpointHealth(one.url, one.seconds, one.slot, one.version, one.genesis, None, best - one.slot)
        for one in found
    )


async def _probe(url: str, patience: float) -> EndpointHealth:
    rpc = Endpoints([url], patience=patience)
    loop = asyncio.get_running_loop()
    try:
        genesis = str(await rpc.call("getGenesisHash"))
        version = await rpc.call("getVersion")
        started = loop.time()
        slot = await rpc.call("getSlot", [{"commitment": "processed"}])
        seconds = loop.time() - started
        # Last, because an endpoint that is behind answers it with an error, and the slot says by how much.
        await rpc.call("getHealth", patience=min(patience, 1.0))
    except ChainError as error:
        return EndpointHealth(shown_url(url), 0.0, 0, "", "", str(error))
    finally:
        await rpc.close()
    if not isinstance(slot, int) or not isinstance(version, dict):
        return EndpointHealth(shown_url(url), 0.0, 0, "", "", "its answers do not have Solana's shape")
    return EndpointHealth(shown_url(url), seconds, slot, str(version.get("solana-core", "?"))[:32], genesis[:44], None)
