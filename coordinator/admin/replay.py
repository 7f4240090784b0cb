"""A run told again from its events, refusing what cannot be: the exporter derives its rounds from this, and the
verifier compares them with those of the file."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, NoReturn

from coordinator.admin.pool import Pool, Span, cut
from coordinator.admin.record import InvalidRecord, Line
from coordinator.values import Phase


@dataclass(slots=True)
class _OpenRound:
    """A round that is not final: its data, everybody's slice (offset, count), and what was committed."""

    ranges: list[Span]
    slices: dict[int, Span]
    active: frozenset[int]
    wallets: dict[int, str]
    committed: dict[int, Line] = field(default_factory=dict)
    ejected: set[int] = field(default_factory=set)


class Archived(NamedTuple):
    """What a receipt holds."""

    wallet: str
    credit: int
    updates: int


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
        # Usually one. After a change of the model that may or may not have been one of the data: what either means.
        self._pools = [Pool()]
        self._manifest: str | None = None
        self._open: dict[int, _OpenRound] = {}
        self._first = self._started = -1
        self._line = Line(0, {})
        self._created = False
        self._archived: dict[str, Archived] = {}
        self._agreed: tuple[int, str] | None = None
        self.wallets: dict[int, str] = {}
        self.node_keys: dict[int, str] = {}
        self.credit: dict[int, int] = defaultdict(int)
        self.updates: dict[int, int] = defaultdict(int)
        self.tokens = 0
        self.rounds = 0
        self.phase: tuple[str, int, int] | None = None
        """State, round and epoch; None before the first transition."""
        self.checkpoint: tuple[int, str] | None = None
        """Round and model root of the run's checkpoint; None while it is the one of before the record."""
        self.model_root: str | None = None
        """Of the last change of the model."""

    @property
    def archived_credit(self) -> int:
        return sum(one.credit for one in self._archived.values())

    @property
    def receipts(self) -> Counter[Archived]:
        """What was archived and not restored."""
        return Counter(self._archived.values())

    def stands_at(self, cursor: int, returned: int) -> bool:
        """Whether the data can stand at this position, with so many that wait to be drawn again."""
        return any((pool.cursor, pool.returned) == (cursor, returned) for pool in self._pools)

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
        if self.wallets.get(slot) != wallet:
            self.updates[slot] = 0
        self.wallets[slot], self.node_keys[slot] = wallet, str(event["node_key"])

    def _ejected(self, event: Line) -> None:
        for one in self._open.values():
            one.ejected |= event.slots("members")

    def _credit_archived(self, event: Line) -> None:
        slot, credit, wallet = event.integer("member"), event.integer("credit"), str(event["wallet"])
        if self._complete and (self.credit[slot], self.wallets.get(slot)) != (credit, wallet):
            self._refuse(f"slot {slot} had credit {self.credit[slot]} of {self.wallets.get(slot)}, archived {credit}")
        receipt = str(event["receipt"])
        if receipt in self._archived:
            self._refuse(f"receipt {receipt} is made twice")
        self._archived[receipt] = Archived(wallet, credit, self.updates[slot])
        self.credit[slot] = self.updates[slot] = 0
        self.wallets.pop(slot, None)

    def _credit_restored(self, event: Line) -> None:
        slot, credit, wallet = event.integer("member"), event.integer("credit"), str(event["wallet"])
        archived = self._archived.pop(str(event["receipt"]), None)
        if self._complete and (archived is None or archived[:2] != (wallet, credit)):
            self._refuse(f"{wallet} gets {credit} back, which was never archived")
        self.credit[slot] += credit
        self.updates[slot] += 0 if archived is None else archived.updates

    # ------------------------------------------------------------------ rounds

    def _phase_changed(self, event: Line) -> None:
        number = event.integer("phase")
        if number not in Phase._value2member_map_:
            self._refuse(f"there is no state {number}")
        self.phase = (Phase(number).name, event.integer("round"), event.integer("epoch"))
        if self._agreed is not None:
            # Agreed upon in a cooldown; this is its end.
            self.checkpoint, self._agreed = self._agreed, None

    def _model_changed(self, event: Line) -> None:
        """Other data begins at its first position. The event has the manifest of the data; that the program also takes
        another number of samples or another sequence length for other data cannot be seen here, and neither can the
        manifest that the run began with."""
        manifest = str(event["data_manifest"])
        kept = self._pools if self._manifest in (None, manifest) else []
        self._pools = [*(one for one in kept if one.cursor), Pool()]
        self._manifest, self.model_root = manifest, str(event["model_root"])
        self.checkpoint = (event.integer("round"), self.model_root)

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
        pools = copy.deepcopy(self._pools)
        problems = [pool.take(ranges) for pool in pools]
        self._pools = [pool for pool, problem in zip(pools, problems, strict=True) if problem is None]
        if not self._pools:
            self._refuse(str(problems[0]))

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
                self.updates[slot] += 1
            else:
                returned += spans
        if self._complete:
            for pool in self._pools:
                pool.give_back(returned)
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
        self._agreed = (event.integer("round"), str(event["root"]))

    def _run_closed(self, event: Line) -> None:
        if self._complete and event.integer("tokens") != self.tokens:
            self._refuse(f"the run is closed with {event['tokens']} tokens, its rounds have {self.tokens}")

    def _refuse(self, text: str) -> NoReturn:
        raise InvalidRecord(f"line {self._line.number}: {text}")


_HANDLERS: Final = {
    "RunCreated": Replay._run_created,
    "RunClosed": Replay._run_closed,
    "PhaseChanged": Replay._phase_changed,
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
