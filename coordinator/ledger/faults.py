"""Faults of an endpoint, by configuration: slow, lossy, lagging, rate-limited, broken connections, wrong clocks.

One object says what goes wrong; the ledger, its tests and simulations share it. Whether the n-th event of a kind is
hit follows from the seed and n alone, so the same sequence of requests meets the same faults.
"""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coordinator.wording import problems

Share = Annotated[float, Field(ge=0, le=1)]
_FILES: Final = (".toml", ".json")
_RETRY_AFTER_DEFAULT: Final = 1


class BadFaults(ValueError):
    """A description of faults that cannot be used; the text says what and where."""


class Faults(BaseModel):
    """What goes wrong, all of it off by default. Shares are from 0 (never) to 1 (always)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seed: int = 0
    """Decides which events are hit."""
    methods: tuple[str, ...] = ()
    """The HTTP faults hit only requests of these JSON-RPC methods. Empty: all."""
    from_slot: int = Field(default=0, ge=0)
    """Nothing goes wrong before this slot."""
    to_slot: int | None = Field(default=None, ge=0)
    """Nothing goes wrong from this slot on."""

    latency_ms: float = Field(default=0.0, ge=0, le=60_000)
    """Added to every request (half before it is executed, half after) and, halved, to every notification."""
    jitter_ms: float = Field(default=0.0, ge=0, le=60_000)
    """Added to the latency: uniform from 0 to this. Requests on different connections overtake each other."""
    lose: Share = 0.0
    """Transactions that are answered with their signature and never executed."""
    duplicate: Share = 0.0
    """Transactions that arrive twice, as behind a proxy that repeats a request. The second answer is the one given."""
    too_many: Share = 0.0
    """Requests answered with HTTP 429 and Retry-After."""
    requests_per_second: float = Field(default=0.0, ge=0)
    """Requests over this rate are answered with HTTP 429. 0: no limit."""
    retry_after_s: int = Field(default=_RETRY_AFTER_DEFAULT, ge=0, le=3600)
    """What Retry-After says, in seconds."""
    unavailable: Share = 0.0
    """Requests answered with HTTP 503, not executed."""
    reset: Share = 0.0
    """Requests whose connection is reset before they are executed."""
    reset_after: Share = 0.0
    """Requests that are executed, and whose connection is reset instead of an answer."""
    stale: Share = 0.0
    """Requests answered from the state of `stale_slots` ago; transactions are checked there and land in the present."""
    stale_slots: int = Field(default=0, ge=0, le=10_000)
    """How far a stale answer lags behind."""

    socket_seconds: float = Field(default=0.0, ge=0)
    """WebSockets are cut after a random time with this mean. 0: never."""
    refuse_sockets: Share = 0.0
    """New WebSockets that are cut before their handshake ends."""
    mute: Share = 0.0
    """Notifications that are not sent."""

    clock_skew_s: int = Field(default=0, ge=-(2**40), le=2**40)
    """The chain's Unix time differs from this machine's by this many seconds. For the whole ledger."""
    clock_stopped: bool = False
    """The chain's Unix time stays where it was at the start; slots go on. For the whole ledger."""
    halt_slot: int | None = Field(default=None, ge=1)
    """The chain stands still at this slot, as a halted cluster. For the whole ledger."""
    halt_seconds: float | None = Field(default=None, gt=0)
    """How long it stands still. None: for ever."""

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: Any) -> Any:
        # TOML and JSON have lists and no tuples, and whole numbers where a float is meant.
        if isinstance(values, dict) and isinstance(values.get("methods"), list):
            return {**values, "methods": tuple(values["methods"])}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Faults:
        if self.stale and not self.stale_slots:
            raise ValueError("stale needs stale_slots: how many slots a stale answer lags behind")
        if self.to_slot is not None and self.to_slot <= self.from_slot:
            raise ValueError(f"to_slot {self.to_slot} is not after from_slot {self.from_slot}")
        if self.halt_seconds is not None and self.halt_slot is None:
            raise ValueError("halt_seconds needs halt_slot: where the chain stands still")
        return self

    @property
    def any_http(self) -> bool:
        """Whether a request can meet a fault at all."""
        shares = (self.lose, self.duplicate, self.too_many, self.unavailable, self.reset, self.reset_after, self.stale)
        return any(shares) or bool(self.requests_per_second or self.latency_ms or self.jitter_ms)

    def active(self, slot: int) -> bool:
        return self.from_slot <= slot and (self.to_slot is None or slot < self.to_slot)


def parse_faults(text: str) -> Faults:
    """Faults from a .toml or .json file's name, a JSON object, or TOML pairs such as `lose=0.1, latency_ms=50`.

    Raises:
        BadFaults: it cannot be read, or a setting is unknown or out of range.
    """
    text = text.strip()
    try:
        if text.startswith("{"):
            return Faults.model_validate(json.loads(text))
        if text.endswith(_FILES) and "=" not in text:
            content = Path(text).read_text(encoding="utf-8")
            return Faults.model_validate(tomllib.loads(content) if text.endswith(".toml") else json.loads(content))
        return Faults.model_validate(tomllib.loads(f"faults = {{{text}}}")["faults"])
    except OSError as error:
        raise BadFaults(f"{text}: {error.strerror}") from None
    except ValidationError as error:
        lines = (f"{where}: {words}" if where else words for where, words in problems(error, Faults))
        raise BadFaults("; ".join(lines)) from None
    except ValueError as error:
        raise BadFaults(f"{text!r} is neither JSON nor TOML pairs such as lose=0.1, latency_ms=50: {error}") from None


class Chance:
    """Draws of one endpoint: an independent stream for each kind of event, all from one seed.

    Args:
        faults: what to draw for.
        slot: gives the ledger's current slot.
    """

    def __init__(self, faults: Faults, slot: Callable[[], int]) -> None:
        self.faults = faults
        self._slot = slot
        self._streams: dict[str, random.Random] = {}
        self._tokens = faults.requests_per_second
        self._refilled = 0.0

    def _stream(self, kind: str) -> random.Random:
        if kind not in self._streams:
            self._streams[kind] = random.Random(f"{self.faults.seed}/{kind}")
        return self._streams[kind]

    def active(self) -> bool:
        return self.faults.active(self._slot())

    def hits(self, kind: str, share: float) -> bool:
        """Whether this event of the kind is hit. Draws also outside the slots, so that they move nothing."""
        return share > 0 and self._stream(kind).random() < share and self.active()

    def half_delay(self, kind: str) -> float:
        """Seconds that one way takes."""
        faults = self.faults
        if not (faults.latency_ms or faults.jitter_ms) or not self.active():
            return 0.0
        return (faults.latency_ms + self._stream(kind).random() * faults.jitter_ms) / 2000

    def socket_life(self) -> float | None:
        """Seconds until a new WebSocket is cut; None: never."""
        mean = self.faults.socket_seconds
        return self._stream("socket_life").expovariate(1 / mean) if mean else None

    def over_rate(self, now: float) -> bool:
        """Whether a request at `now` (seconds of any clock) is one too many for this second."""
        rate = self.faults.requests_per_second
        if not rate:
            return False
        self._tokens = min(max(rate, 1.0), self._tokens + (now - self._refilled) * rate)
        self._refilled = now
        if self._tokens < 1:
            return self.active()
        self._tokens -= 1
        return False
