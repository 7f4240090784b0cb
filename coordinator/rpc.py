"""Several RPC endpoints used as one: fail-over and return, back-off, rate limits, and a bound on everything."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from coordinator.jsonrpc import AttemptFailed, ChainError, Json, RpcError, Traffic, Transport, Unusable
from coordinator.urls import BadUrl, check_url, shown_url

log = logging.getLogger(__name__)
T = TypeVar("T")

REQUEST_SECONDS: Final = 10.0
PATIENCE_SECONDS: Final = 30.0
# With another endpoint at hand nobody waits as long for one that hangs.
_IMPATIENT_SECONDS: Final = 4.0
_PROBE_SECONDS: Final = 4.0
_FIRST_PAUSE: Final = 0.2
_LONGEST_PAUSE: Final = 8.0
_LONGEST_RETRY_AFTER: Final = 30.0
_BEHIND_PAUSE: Final = 0.4


class ChainUnavailable(ChainError):
    """No endpoint gave a usable answer in the time allowed. Trying again later may help.

    `behind`: an endpoint did answer, and has not reached a slot that was seen before.
    """

    behind = False


@dataclass(slots=True, eq=False)
class _Endpoint:
    """`failures` counts those since the last success: 0 is an endpoint that may be used at once.

    `doubtful`: its last failure was an answer that could not be used. `on_trial`: it is, and answers a probe, which
    proves no more than that it may be asked again.
    """

    url: str
    shown: str
    failures: int = 0
    failed_at: float = -math.inf
    retry_at: float = 0.0
    reason: str = field(default="not tried")
    behind: bool = False
    doubtful: bool = False
    on_trial: bool = False

    @property
    def works(self) -> bool:
        return self.failures == 0 or self.on_trial

    def answered(self, began: float) -> None:
        """It gave a usable answer to what was asked at `began`: older failures are over, but not younger ones."""
        if began >= self.failed_at:
            self.failures, self.doubtful, self.on_trial = 0, False, False


class Endpoints:
    """Several RPC endpoints used as one, in order of preference.

    The first that works is asked. One that fails is left alone for a pause and then tried with a probe, not with a call
    that somebody waits for, unless there is no other; when the probe is answered, it is preferred again.

    Args:
        urls: at least one http(s) URL.
        request_seconds: the time that one attempt may take.
        patience: the time that a call may take with all its attempts, in seconds.
        commitment: the level at which slots are counted.

    Raises:
        BadUrl: for a setting that is not a URL.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        request_seconds: float = REQUEST_SECONDS,
        patience: float = PATIENCE_SECONDS,
        commitment: str = "confirmed",
    ) -> None:
        if not urls:
            raise BadUrl("no RPC endpoint is given; set at least one URL such as http://127.0.0.1:8899")
        self._endpoints = [_Endpoint(check_url(url), shown_url(url)) for url in urls]
        self._patience = patience
        self._commitment = commitment
        self._transport = Transport(request_seconds)
        self._probes: dict[_Endpoint, asyncio.Task[None]] = {}
        self.seen_slot = 0
        """The newest slot that an answer was from. Reads never go back behind it, whichever endpoint answers."""

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(endpoint.url for endpoint in self._endpoints)

    @property
    def traffic(self) -> Traffic:
        return self._transport.traffic

    async def close(self) -> None:
        for probe in self._probes.values():
            probe.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)
        await self._transport.close()

    def saw_slot(self, slot: int) -> None:
        # No slot is larger, and a number that is could not be reckoned with.
        if slot < 2**64:
            self.seen_slot = max(self.seen_slot, slot)

    async def call(self, method: str, params: Sequence[Json] = (), *, patience: float | None = None) -> Json:
        """The result of one JSON-RPC call as it is; raises as `ask` does."""
        return await self.ask(method, params, lambda answer: answer, patience=patience)

    async def ask(
        self, method: str, params: Sequence[Json], read: Callable[[Json], T], *, patience: float | None = None
    ) -> T:
        """The result of one JSON-RPC call, as `read` gives it; where `read` raises Unusable, the next one is asked.

        Only use it for calls that may be made twice: an attempt that failed half-way may have had its effect.

        Raises:
            RpcError: the endpoint refused the request as such.
            ChainUnavailable: no endpoint gave an answer within `patience` seconds.
        """
        loop = asyncio.get_running_loop()
        allowed = self._patience if patience is None else patience
        deadline = loop.time() + allowed
        request = self._transport.request(method, params)
        refused: dict[_Endpoint, RpcError] = {}
        while True:
            offering = [one for one in self._endpoints if one not in refused]
            if not offering:
                raise next(iter(refused.values()))
            endpoint = self._choose(offering)
            pause = max(endpoint.retry_at - loop.time(), 0.0)
            if loop.time() + pause >= deadline:
                raise self._unavailable(method, allowed)
            if pause > 0:
                await asyncio.sleep(pause)
            seconds = deadline - loop.time()
            if any(other is not endpoint and other.works for other in offering):
                seconds = min(seconds, _IMPATIENT_SECONDS)
            began = loop.time()
            try:
                answer = read(await self._transport.attempt(endpoint.url, request, seconds))
                endpoint.answered(began)
                return answer
            except AttemptFailed as failed:
                self._pause(endpoint, method, failed)
            except Unusable as unusable:
                self._pause(endpoint, method, AttemptFailed(str(unusable), behind=unusable.behind, unusable=True))
            except RpcError as error:
                if not error.not_offered:
                    raise
                refused[endpoint] = error

    async def spread(self, method: str, params: Sequence[Json]) -> None:
        """Make a call at every endpoint that works, whatever they answer; for what is worth sending many ways.

        Does nothing while all are in a pause: one that asks to be left alone is.
        """
        now = asyncio.get_running_loop().time()
        rested = [one for one in self._endpoints if one.retry_at <= now]
        working = [one for one in rested if one.works] or rested[:1]
        request = self._transport.request(method, params)

        async def one_way(endpoint: _Endpoint) -> None:
            try:
                await self._transport.attempt(endpoint.url, request, _IMPATIENT_SECONDS)
            except AttemptFailed as failed:
                self._pause(endpoint, method, failed)
            except RpcError as error:
                log.debug("%s: %s", endpoint.shown, error)

        await asyncio.gather(*(one_way(endpoint) for endpoint in working))

    # ------------------------------------------------------------------ which endpoint

    def _choose(self, offering: Sequence[_Endpoint]) -> _Endpoint:
        now = asyncio.get_running_loop().time()
        working = next((one for one in offering if one.works), None)
        if working is None:
            return min(offering, key=lambda one: max(one.retry_at - now, 0.0))
        for better in offering[: offering.index(working)]:
            if better.retry_at <= now and better not in self._probes:
                self._probes[better] = asyncio.create_task(self._probe(better))
        return working

    async def _probe(self, endpoint: _Endpoint) -> None:
        """Ask a failed endpoint for its slot: it is back when it has the one that was seen last."""
        options = {"commitment": self._commitment, "minContextSlot": self.seen_slot}
        request = self._transport.request("getSlot", [options])
        began = asyncio.get_running_loop().time()
        try:
            await self._transport.attempt(endpoint.url, request, _PROBE_SECONDS)
        except AttemptFailed as failed:
            self._pause(endpoint, "getSlot", failed)
        except RpcError as error:
            self._pause(endpoint, "getSlot", AttemptFailed(error.message))
        else:
            if endpoint.doubtful:
                # Whether it answers better what it answered badly, the next call finds out; until then its pauses grow.
                endpoint.on_trial = began >= endpoint.failed_at
            else:
                endpoint.answered(began)
                log.info("%s: works again and is preferred", endpoint.shown)
        finally:
            self._probes.pop(endpoint, None)

    def _pause(self, endpoint: _Endpoint, method: str, failed: AttemptFailed) -> None:
        now = asyncio.get_running_loop().time()
        endpoint.reason, endpoint.behind = failed.reason, failed.behind
        endpoint.doubtful, endpoint.on_trial = failed.unusable, False
        if another := now >= endpoint.retry_at:
            # Calls that were under way together fail together: that is one failure.
            endpoint.failures += 1
        endpoint.failed_at = now
        pause = min(_FIRST_PAUSE * 2 ** min(endpoint.failures - 1, 10), _LONGEST_PAUSE)
        if failed.behind:
            pause = min(pause, _BEHIND_PAUSE)
        pause *= random.uniform(0.75, 1.25)
        if failed.retry_after is not None:
            pause = min(max(pause, failed.retry_after), _LONGEST_RETRY_AFTER)
        endpoint.retry_at = max(endpoint.retry_at, now + pause)
        # The 1st, 2nd, 4th, 8th in a row: an endpoint that stays away is no news every time.
        news = another and endpoint.failures.bit_count() == 1 and not failed.behind
        level = logging.WARNING if news else logging.DEBUG
        log.log(level, "%s: %s failed (%s); next attempt there in %.1f s", endpoint.shown, method, failed.reason, pause)

    def _unavailable(self, method: str, allowed: float) -> ChainUnavailable:
        tried = ", ".join(f"{endpoint.shown} ({endpoint.reason})" for endpoint in self._endpoints)
        unavailable = ChainUnavailable(
            f"no RPC endpoint answered {method} within {allowed:.0f} s: {tried}; "
            "check that the URL is right and that the endpoint is running and reachable"
        )
        unavailable.behind = any(endpoint.behind for endpoint in self._endpoints)
        return unavailable
