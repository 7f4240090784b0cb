"""What a line is like, in one word: ``100mbit/80ms``, ``1gbit/200ms±20ms/0.5%``, ``20mbit:100mbit/40ms/1%/reno``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_RATE = re.compile(r"(\d+(?:\.\d+)?)(k|m|g)bit")
_TIME = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")
_LOSS = re.compile(r"(\d+(?:\.\d+)?)%")
_BITS = {"k": 1e3, "m": 1e6, "g": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
MAX_RTT = 10.0
MAX_LOSS = 0.5
FORM = "RATE[:RATE_BACK]/RTT[±JITTER][/LOSS%][/reno], such as 100mbit/80ms, 20mbit:100mbit/40ms±5ms/0.5%"


class BadSpec(ValueError):
    """A text does not describe a line; the message says which part and what it should look like."""


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """A line in both directions, ``up`` being the one towards the relay's callers: what a node behind it sends."""

    up_rate: float = 0.0
    """Bytes per second from the target to those who connect; 0 is no limit."""
    down_rate: float = 0.0
    """Bytes per second from those who connect to the target; 0 is no limit."""
    rtt: float = 0.0
    """Seconds for a byte's way there and an answer's way back; half of it each."""
    jitter: float = 0.0
    """Seconds by which a way takes at most longer or shorter than half the RTT; evenly distributed."""
    loss: float = 0.0
    """Share of segments lost on their way, in each direction."""
    reno: bool = False
    """Whether a loss also makes each connection slower, as it does to TCP's older congestion controls."""

    @classmethod
    def parse(cls, text: str) -> LinkSpec:
        """Read a line's description. Raises BadSpec."""
        parts = text.strip().lower().replace("+-", "±").split("/")
        rates = parts.pop(0).split(":")
        if len(rates) > 2:
            raise BadSpec(f"{text!r}: at most two rates, up and down. The form is {FORM}")
        up, down = (_rate(rate, text) for rate in (rates[0], rates[-1]))
        if not parts:
            raise BadSpec(f"{text!r} has no round-trip time. The form is {FORM}")
        whole, jittery, spread = parts.pop(0).partition("±")
        rtt, jitter = _time(whole, text), _time(spread, text) if jittery else 0.0
        if rtt > MAX_RTT:
            raise BadSpec(f"{text!r}: a round trip of more than {MAX_RTT:.0f} s")
        if jitter > rtt / 2:
            raise BadSpec(f"{text!r}: the jitter is of one way, and cannot be more than half the round trip")
        reno = bool(parts) and parts[-1] == "reno"
        if reno:
            parts.pop()
        loss = _loss(parts.pop(0), text) if parts else 0.0
        if parts:
            raise BadSpec(f"{text!r}: {parts[0]!r} is one part too many. The form is {FORM}")
        if reno and not (loss and rtt):
            raise BadSpec(f"{text!r}: reno is about what losses do over a distance; give both")
        return cls(up, down, rtt, jitter, loss, reno)


def _rate(text: str, whole: str) -> float:
    """Bytes per second."""
    if text in ("", "0", "unlimited"):
        return 0.0
    found = _RATE.fullmatch(text)
    if found is None or float(found[1]) == 0:
        raise BadSpec(f"{whole!r}: {text!r} is no rate, such as 100mbit, 1.5gbit or unlimited. The form is {FORM}")
    return float(found[1]) * _BITS[found[2]] / 8


def _time(text: str, whole: str) -> float:
    found = _TIME.fullmatch(text)
    if found is None and text != "0":
        raise BadSpec(f"{whole!r}: {text!r} is no time, such as 80ms. The form is {FORM}")
    return 0.0 if found is None else float(found[1]) * _SECONDS[found[2]]


def _loss(text: str, whole: str) -> float:
    found = _LOSS.fullmatch(text)
    if found is None:
        raise BadSpec(f"{whole!r}: {text!r} is no loss, such as 0.5%. The form is {FORM}")
    loss = float(found[1]) / 100
    if loss > MAX_LOSS:
        raise BadSpec(f"{whole!r}: more than {MAX_LOSS:.0%} loss is no line any more")
    return loss
