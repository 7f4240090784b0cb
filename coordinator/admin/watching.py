"""`psyche-admin run watch`: follow a run until it is finished."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Final

import typer
from rich.console import Console
from rich.live import Live

from coordinator.admin.health import probe
from coordinator.admin.reading import Look, reading
from coordinator.admin.view import screen
from coordinator.admin.watched import Watched
from coordinator.client import ChainUnavailable, CoordinatorClient
from coordinator.snapshot import take_snapshot
from coordinator.state import Phase

app = typer.Typer()

_FRAME_SECONDS: Final = 0.25
_PROBE_SECONDS: Final = 5.0
_PROBE_PATIENCE: Final = 2.0
# The tables are read whole, so at most this often, however fast rounds are.
_TABLE_SECONDS: Final = 0.4


@reading(app, "watch")
async def watch(one: Look) -> None:
    """Watch a run live, until it is finished: state, time left, members, inclusion, tokens, chain, cost.

    Without a terminal it prints a line per change, with --json a JSON object per change.
    """
    async with one.open() as client:
        follower = Follower(client, one.rpc)
        if one.as_json or not sys.stdout.isatty():
            await follower.follow(
                lambda seen: print(json.dumps(seen.to_json()) if one.as_json else seen.line(), flush=True)
            )
        else:
            await on_screen(follower, Console())


class Follower:
    """Keeps a `Watched` up to date.

    Args:
        client: of the run.
        urls: its endpoints, each of which is looked at by itself.
    """

    def __init__(self, client: CoordinatorClient, urls: Sequence[str]) -> None:
        self._client = client
        self._urls = urls
        self._watched: Watched | None = None
        self._read_at = 0.0

    @property
    def watched(self) -> Watched | None:
        """The run as it is at this moment; None before the first look."""
        one = self._watched
        if one is not None:
            passed = asyncio.get_running_loop().time() - self._read_at
            one.slot_seconds = self._client.slot_seconds
            one.slot = one.now.slot + passed / one.slot_seconds
            one.pushes = self._client.subscriptions.connected
            one.silent = passed
        return one

    async def follow(self, changed: Callable[[Watched], None]) -> None:
        """Call `changed` whenever the run changes, until it is finished. Raises RunNotFound when it is closed."""
        loop = asyncio.get_running_loop()
        last: tuple[object, ...] | None = None
        async for pulse in self._client.watch():
            pause = self._read_at + max(_TABLE_SECONDS, 2 * self._client.slot_seconds) - loop.time()
            if self._watched is not None and pause > 0:
                await asyncio.sleep(pause)
            try:
                now = await take_snapshot(self._client)
            except ChainUnavailable:
                continue  # the screen says since when there is no news
            self._read_at = loop.time()
            if self._watched is None:
                self._watched = Watched(now, now.slot, self._client.slot_seconds, False)
            self._watched.follow(now)
            state = now.raw
            if state != last:
                last = state
                seen = self.watched
                assert seen is not None
                changed(seen)
            if now.run.phase is Phase.FINISHED and pulse.slot <= now.slot:
                return

    async def look_at_endpoints(self) -> None:
        """Ask every endpoint now and then. Never ends."""
        while True:
            found = await probe(self._urls, _PROBE_PATIENCE)
            if self._watched is not None:
                self._watched.endpoints = found
            await asyncio.sleep(_PROBE_SECONDS if self._watched is not None else _FRAME_SECONDS)


async def on_screen(follower: Follower, console: Console) -> None:
    """Show it on a terminal, and leave the last view behind."""
    following = asyncio.create_task(follower.follow(lambda _: None))
    probing = asyncio.create_task(follower.look_at_endpoints())
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while not following.done():
                if (seen := follower.watched) is not None:
                    live.update(screen(seen, console.width, console.height), refresh=True)
                await asyncio.wait((following,), timeout=_FRAME_SECONDS)
    finally:
        for task in (following, probing):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(following, probing, return_exceptions=True)
        if (seen := follower.watched) is not None:
            console.print(screen(seen, console.width, 10_000))
    await following
