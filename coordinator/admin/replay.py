"""A run told again from its events, refusing what cannot be: the exporter derives its rounds from this, and the
verifier compares them with those of the file."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from coordinator.admin.pool import Pool, Span, cut
from coordinator.admin.record import InvalidRecord, Line


@dataclass(slots=True)
class _OpenRound:
    """A round that is not final: its data, everybody's slice (offset, count), and what was committed."""

    ranges: list[Span]
    slices: dict[int, Span]
    active: frozenset[int]
    wallets: dict[int, str]
    committed: dict[int, Line] = field(default_factory=dict)
    ejected: set[int] = field(default_factory=set)


class Replay:
    """Follows a run's events in the chain's order.

    Args:
        complete: whether the record begins with the run. If not, rounds that began before it are passed over, and
            positions and credit from before are taken as they come.
        most_tokens: tokens that one position can hold; None where the run's terms have changed on the way.

    All methods raise InvalidRecord, naming the line, for what the program would never have logged.
    """

    def __init__(self, *, complete: bool, most_tokens: int | None) -> None:
        self._complete = complete
        self._most_tokens = most_tokens
        self._pool = Pool()
        self._may_restart = False
        self._open: dict[int, _OpenRound] = {}
        self._first = self._started = -1
        self._line = Line(0, {})
        self._created = False
        self._archived: dict[str, list[int]] = defaultdict(list)
        self.wallets: dict[int, str] = {}
        self.credit: dict[int, int] = defaultdict(int)
        self.tokens = 0
        self.rounds = 0
        self.roots: dict[int, str] = {}

    @property
    def archived_credit(self) -> int:
        return sum(sum(credits) for credits in self._archived.values())

    @property
    def cursor(self) -> int:
        return self._pool.cursor

    @property
    def returned(self) -> int:
        """Positions that wait to be drawn again."""
        return self._pool.returned

    def see(self, event: Line) -> dict[str, Any] | None:
        """Take an event; the round that it made final, as a line of the record, if it did."""
        self._line = event
        name = event["name"]
        if self._complete and not self._created and name != "RunCreated":
            self._refuse(f"the record is complete, yet begins with {name}")
        handler = _HANDLERS.get(str(name))
        return None if handler is None else handler(self, event)

    # ------------------------------------------------------------------ members

    def _run_created(self, event: Line) -> None:
        if self._created:
            self._refuse("the run is created twice")
        self._created = True

    def _joined(self, event: Line) -> None:
        slot, wallet = event.integer("member"), str(event["wallet"])
        if self.wallets.get(slot) not in (None, wallet) and self.credit[slot]:
            self._refuse(f"slot {slot} is given to {wallet} while {self.wallets[slot]} has credit in it")
        self.wallets[slot] = wallet

    def _ejected(self, event: Line) -> None:
        for one in self._open.values():
            one.ejected |= event.slots("members")

    def _credit_archived(self, event: Line) -> None:
        slot, credit, wallet = event.integer("member"), event.integer("credit"), str(event["wallet"])
        if self._complete and (self.credit[slot], self.wallets.get(slot)) != (credit, wallet):
            self._refuse(f"slot {slot} had credit {self.credit[slot]} of {self.wallets.get(slot)}, archived {credit}")
        self._archived[wallet].append(credit)
        self.credit[slot] = 0
        self.wallets.pop(slot, None)

    def _credit_restored(self, event: Line) -> None:
        slot, credit, wallet = event.integer("member"), event.integer("credit"), str(event["wallet"])
        if credit in self._archived[wallet]:
            self._archived[wallet].remove(credit)
        elif self._complete:
            self._refuse(f"{wallet} gets {credit} back, which was never archived")
        self.credit[slot] += credit

    # ------------------------------------------------------------------ rounds

    def _model_changed(self, event: Line) -> None:
        self._may_restart = True

    def _round_started(self, event: Line) -> None:
        number, positions = event.integer("round"), event.integer("positions")
        if self._started >= 0 and number != self._started + 1:
            self._refuse(f"round {number} starts after round {self._started}")
        self._started = number
        self._first = number if self._first < 0 else self._first
        ranges, active = _spans(event, "ranges"), event.slots("active")
        counts = _counts(event)
        if sum(count for _, count in ranges) != positions or sum(counts.values()) != positions:
            self._refuse(f"ranges and slices of round {number} do not add up to its {positions} positions")
        if not counts.keys() <= active:
            self._refuse(f"round {number} gives data to members that are not active")
        self._draw(ranges)
        slices, offset, first = {}, 0, event.integer("first_slot")
        for slot in sorted(counts, key=lambda one: (one < first, one)):
            slices[slot] = (offset, counts[slot])
            offset += counts[slot]
        self._open[number] = _OpenRound(ranges, slices, active, dict(self.wallets))

    def _draw(self, ranges: list[Span]) -> None:
        if not self._complete:
            return
        before = copy.deepcopy(self._pool)
        problem = self._pool.take(ranges)
        if problem is not None and self._may_restart:
            # Other data, from its first position; whatever was open of the former is gone with it.
            before = self._pool = Pool()
            problem = self._pool.take(ranges)
        if problem is not None:
            self._pool = before
            self._refuse(problem)
        self._may_restart = False

    def _committed(self, event: Line) -> None:
        number, slot = event.integer("round"), event.integer("member")
        one = self._find(number)
        if one is None:
            return
        if number != self._started:
            self._refuse(f"a commitment to round {number}, when round {self._started} had begun")
        if slot not in one.slices:
            self._refuse(f"member {slot} commits to round {number}, in which it has no data")
        if slot in one.committed:
            self._refuse(f"member {slot} commits to round {number} twice")
        tokens = event.integer("tokens")
        if self._most_tokens is not None and tokens > one.slices[slot][1] * self._most_tokens:
            self._refuse(f"member {slot} has {tokens} tokens in {one.slices[slot][1]} positions")
        one.committed[slot] = event

    def _attested(self, event: Line) -> None:
        one = self._find(event.integer("round"))
        if one is not None and not event.slots("members") <= one.committed.keys():
            self._refuse(f"an attestation in round {event['round']} names members that did not commit")
        if one is not None and event.integer("member") not in one.active:
            self._refuse(f"member {event['member']} is no witness of round {event['round']}")

    def _round_final(self, event: Line) -> dict[str, Any] | None:
        number, included = event.integer("round"), event.slots("members")
        tokens = event.integer("tokens")
        self.tokens += tokens
        self.rounds += 1
        one = self._find(number)
        if one is None:
            return None
        del self._open[number]
        if not included <= one.committed.keys() - one.ejected:
            self._refuse(f"round {number} includes members that did not commit or were ejected")
        if bool(event.integer("is_void")) == bool(included):
            self._refuse(f"round {number} is void and includes members, or neither")
        if tokens != sum(one.committed[slot].integer("tokens") for slot in included):
            self._refuse(f"round {number} counts {tokens} tokens, its included commitments have others")
        trained, returned = [], list[Span]()
        for slot, (offset, count) in one.slices.items():
            spans = cut(one.ranges, offset, count)
            commitment = one.committed.get(slot)
            trained.append(
                {
                    "member": slot,
                    "wallet": one.wallets.get(slot),
                    "positions": [list(span) for span in spans],
                    "digest": None if commitment is None else commitment["digest"],
                    "tokens": 0 if commitment is None else commitment["tokens"],
                    "included": slot in included,
                }
            )
            if slot in included and commitment is not None:
                self.credit[slot] += commitment.integer("tokens")
            else:
                returned += spans
        if self._complete:
            self._pool.give_back(returned)
        return {
            "kind": "round",
            "round": number,
            "void": not included,
            "tokens": tokens,
            "trained": trained,
            "returned": [list(span) for span in returned],
        }

    def _find(self, number: int) -> _OpenRound | None:
        """None only for a round that began before an incomplete record."""
        one = self._open.get(number)
        if one is None and (self._complete or 0 <= self._first <= number):
            self._refuse(f"round {number} has not begun or is final already")
        return one

    def _checkpoint_agreed(self, event: Line) -> None:
        self.roots[event.integer("round")] = str(event["root"])

    def _run_closed(self, event: Line) -> None:
        if self._complete and event.integer("tokens") != self.tokens:
            self._refuse(f"the run is closed with {event['tokens']} tokens, its rounds have {self.tokens}")

    def _refuse(self, text: str) -> NoReturn:
        raise InvalidRecord(f"line {self._line.number}: {text}")


_HANDLERS: Final = {
    "RunCreated": Replay._run_created,
    "RunClosed": Replay._run_closed,
    "ModelChanged": Replay._model_changed,
    "MemberJoined": Replay._joined,
    "MembersEjected": Replay._ejected,
    "MemberArchived": Replay._credit_archived,
    "MemberRestored": Replay._credit_restored,
    "Committed": Replay._committed,
    "Attested": Replay._attested,
    "RoundStarted": Replay._round_started,
    "RoundFinal": Replay._round_final,
    "CheckpointAgreed": Replay._checkpoint_agreed,
}


def _spans(event: Line, key: str) -> list[Span]:
    value = event[key]
    pairs = value if isinstance(value, list) else [None]
    spans = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, int) and one >= 0 for one in pair)):
            raise InvalidRecord(f"line {event.number}: {key} is not a list of [start, count]")
        spans.append((pair[0], pair[1]))
    return spans


def _counts(event: Line) -> dict[int, int]:
    value = event["slices"]
    try:
        counts = {int(slot): int(count) for slot, count in value.items()}
    except (AttributeError, TypeError, ValueError):
        counts = {-1: 0}
    if any(not 0 <= slot < 256 or count <= 0 for slot, count in counts.items()):
        raise InvalidRecord(f"line {event.number}: slices are not a table of member slots and counts")
    return counts
