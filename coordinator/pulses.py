"""The state of a run as it moves: read in full when it changed, in part otherwise, and followed by pushes and polls."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import random
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

from coordinator.addresses import RunAddresses
from coordinator.chain import Account, Chain, ChainError, ChainUnavailable, RpcError
from coordinator.jsonrpc import Json, Unusable, integer
from coordinator.layout import HEADER, RUN
from coordinator.state import (
    HEADER_SIZE,
    RUN_SIZE,
    UNKNOWN_SLOT,
    Header,
    MalformedAccount,
    Phase,
    Run,
    decode_header,
    decode_run,
)
from coordinator.ticking import SLOTS_PER_PLACE

log = logging.getLogger(__name__)

# The front of both accounts: all of the header, and of the run what every write of it changes.
_FRONT_BYTES: Final = HEADER_SIZE
# All of the run account but the room it has for later versions.
_WHOLE_BYTES: Final = RUN.offsets["reserved"]
# What does not show in the front of the run account is read this often at least.
_WHOLE_SECONDS: Final = 60.0
_LONGEST_PAUSE: Final = 10.0
# Up to this many members every change of the header is pushed. Beyond it, the commitments of many would cost more than
# polling, so only changes of the state machine are.
_PUSH_HEADER_MEMBERS: Final = 32
# Pushes of the header that make nothing due are gathered: for this many members, one slot.
_MEMBERS_PER_SLOT: Final = 32
# A change that was found by polling has this long to be pushed, too, before the WebSocket is taken for mute.
_MUTE_SECONDS: Final = 3.0
# A run that is gone is looked for this often before that is believed: one bad answer must not end a node.
_GONE_LOOKS: Final = 3
_GONE_PAUSE: Final = 1.0
_MOVING: Final = struct.Struct("<Q")

Delay = Callable[["Pulse"], int]


class RunNotFound(ChainError):
    """There is no run where one was looked for."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """The state of the run as of one slot: the state machine, and what moves between its ticks."""

    slot: int
    run: Run
    header: Header


@dataclass(frozen=True, slots=True)
class _Seen:
    pulse: Pulse
    front: bytes
    whole_at: float


class Pulses:
    """Reads and follows one run.

    Args:
        chain: the way to it.
        addresses: the run's accounts.
        delay: slots that this client waits after a transition is due before it would tick; it need not look sooner.
    """

    def __init__(self, chain: Chain, addresses: RunAddresses, delay: Delay | None = None) -> None:
        self._chain = chain
        self._addresses = addresses
        self._delay = delay or (lambda pulse: 0)
        self._last: _Seen | None = None
        self._changed = asyncio.Event()
        self._gathering: asyncio.TimerHandle | None = None
        self._run_handle: int | None = None
        self._header_handle: int | None = None
        self._run_pushes = 0
        self._whole_next = True
        self._pushes_at_change = 0
        self._unpushed: tuple[float, int] | None = None

    async def read(self) -> Pulse:
        """The state of the run, in one request. Raises RunNotFound."""
        slot, run, rounds = await self._accounts(_WHOLE_BYTES)
        try:
            decoded = decode_run(run.data.ljust(RUN_SIZE, b"\0"))
            pulse = Pulse(slot, decoded, decode_header(rounds.data))
        except MalformedAccount as error:
            raise RunNotFound(
                f"account {self._addresses.run} is not a run of this version: {error}; is it the right address?"
            ) from error
        self._last = _Seen(pulse, run.data[:_FRONT_BYTES], asyncio.get_running_loop().time())
        return pulse

    async def _read_news(self) -> Pulse:
        """The state of the run, read in part if that tells that the rest has not changed."""
        last = self._last
        if last is None or self._whole_next or asyncio.get_running_loop().time() - last.whole_at > _WHOLE_SECONDS:
            self._whole_next = False
            return await self.read()
        slot, run, rounds = await self._accounts(_FRONT_BYTES)
        if run.data != last.front:
            return await self.read()
        try:
            pulse = Pulse(slot, last.pulse.run, decode_header(rounds.data))
        except MalformedAccount as error:
            raise RunNotFound(str(error)) from error
        self._last = _Seen(pulse, last.front, last.whole_at)
        return pulse

    async def _accounts(self, size: int) -> tuple[int, Account, Account]:
        addresses = self._addresses
        slot, (run, rounds) = await self._chain.accounts([addresses.run, addresses.rounds], (0, size))
        if run is None or rounds is None:
            raise RunNotFound(f"run {addresses.run} is not on this chain; was it closed, or is it another endpoint?")
        return slot, run, rounds

    async def follow(self) -> AsyncIterator[Pulse]:
        """The state of the run whenever it changes or this client should act, and now and then in between.

        Never ends by itself, and survives lost connections; the slot never goes back. Raises RunNotFound when the run
        is gone.
        """
        newest = -1
        failures = gone = 0
        try:
            while True:
                self._changed.clear()
                self._stop_gathering()
                before, pushes = self._last, self._run_pushes
                try:
                    pulse = await self._read_news()
                except RunNotFound as error:
                    failures, gone = 0, gone + 1
                    if gone >= _GONE_LOOKS:
                        raise
                    await self._wait_after(error, _GONE_PAUSE)
                    continue
                except (ChainUnavailable, RpcError) as error:
                    # Says nothing of the run: only answers that it is gone, one after the other, are believed.
                    failures, gone = failures + 1, 0
                    pause = min(2.0 ** min(failures, 8) / 2, _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
                    await self._wait_after(error, pause)
                    continue
                failures = gone = 0
                self._subscribe(pulse)
                self._check_pushes(before, pushes)
                # A slot that the client has given up again never was: a false answer, or a ledger that started anew.
                if pulse.slot >= newest or self._chain.rpc.seen_slot < newest:
                    newest = pulse.slot
                    yield pulse
                await self._rest(pulse)
        finally:
            self._stop_gathering()
            for handle in (self._run_handle, self._header_handle):
                if handle is not None:
                    self._chain.subscriptions.unsubscribe(handle)

    async def _wait_after(self, error: ChainError, pause: float) -> None:
        self._whole_next = True
        log.warning("the run's state cannot be read, trying again in %.1f s: %s", pause, error)
        await asyncio.sleep(pause)

    async def _rest(self, pulse: Pulse) -> None:
        delay = self._delay(pulse)
        due = None if pulse.header.due_slot == UNKNOWN_SLOT else pulse.header.due_slot + delay
        # Without pushes of the header, who is to tick first looks more often, and the others still see the tick's push.
        pushes = self._chain.subscriptions.connected and (self._header_handle is not None or delay > SLOTS_PER_PLACE)
        idle = pulse.run.phase in (Phase.FINISHED, Phase.PAUSED)
        await self._chain.pace.rest(self._changed, pulse.slot, due, pushes=pushes, idle=idle)

    # ------------------------------------------------------------------ pushes

    def _subscribe(self, pulse: Pulse) -> None:
        """Have the changes pushed that are worth it at this size of the run."""
        subscriptions = self._chain.subscriptions
        if self._run_handle is None:
            # Of two accounts one could be from before a tick and one from after, so what counts is read, and pushes
            # carry no more than it takes to see whether that is urgent.
            parameters = [str(self._addresses.run), self._options(0, 0)]
            self._run_handle = subscriptions.subscribe("account", parameters, self._run_pushed)
        wanted = pulse.header.members <= _PUSH_HEADER_MEMBERS
        if wanted and self._header_handle is None:
            parameters = [str(self._addresses.rounds), self._options(HEADER.offsets["due_slot"], _MOVING.size)]
            self._header_handle = subscriptions.subscribe("account", parameters, self._header_pushed)
        elif not wanted and self._header_handle is not None:
            subscriptions.unsubscribe(self._header_handle)
            self._header_handle = None

    def _options(self, offset: int, length: int) -> dict[str, Json]:
        slice_ = {"offset": offset, "length": length}
        return {"encoding": "base64", "commitment": self._chain.commitment, "dataSlice": slice_}

    def _run_pushed(self, value: Json) -> None:
        # Without a value: the subscription stands now, and what changed before that is found by looking.
        self._run_pushes += 1
        self._whole_next = True
        self._changed.set()

    def _header_pushed(self, value: Json) -> None:
        last = self._last
        if value is None or last is None or self._is_urgent(value, last.pulse):
            self._changed.set()
        elif self._gathering is None:
            slots = last.pulse.header.members / _MEMBERS_PER_SLOT
            self._gathering = asyncio.get_running_loop().call_later(slots * self._chain.slot_seconds, self._changed.set)

    def _is_urgent(self, value: Json, last: Pulse) -> bool:
        """Whether a transition has become due, and this client should see to it first."""
        try:
            (due,) = _MOVING.unpack(base64.b64decode(value["value"]["data"][0], validate=True))
            slot = integer(value["context"]["slot"])
        except (TypeError, KeyError, IndexError, ValueError, Unusable, binascii.Error, struct.error):
            return True  # not what was asked for: look
        return bool(slot >= due + self._delay(last))

    def _stop_gathering(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None

    def _check_pushes(self, before: _Seen | None, pushes: int) -> None:
        """Notice a WebSocket that looks alive and says nothing: what polling finds must be pushed, too."""
        subscriptions = self._chain.subscriptions
        now = asyncio.get_running_loop().time()
        if not subscriptions.confirmed(self._run_handle):
            self._unpushed = None
            return
        if self._unpushed is not None:
            since, count = self._unpushed
            if self._run_pushes > count:
                self._unpushed = None
            elif now - since > _MUTE_SECONDS:
                self._unpushed = None
                subscriptions.distrust("a change of the run was not pushed")
        if before is not None and self._last is not None and self._last.front != before.front:
            if self._run_pushes == self._pushes_at_change and self._unpushed is None:
                self._unpushed = (now, self._run_pushes)
            # Not those that came while this was read: they may be of the next change.
            self._pushes_at_change = pushes
