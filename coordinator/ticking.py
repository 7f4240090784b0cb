"""Who ticks when: a queue among the members, so that a transition costs one or two transactions at any size."""

from __future__ import annotations

from typing import Final

SLOTS_PER_PLACE: Final = 4
"""What one tick may need to be seen by the next in the queue: sending, landing, and the push of its effect."""


def tick_delay(place: int | None, round: int, members: int) -> int:
    """Slots that a member waits after a transition is due, before it sends a tick.

    ``place`` is how many live members come before it in the table: slots have gaps, and the queue shall have none.
    The queue rotates by round. The first sends at once, the second after one pause, then two, four, eight ... at a
    time: while the first lives there is one tick, and where many are dead the wait grows with the logarithm of their
    number. Somebody who is not a member comes last.
    """
    members = max(members, 1)
    if place is None:
        return SLOTS_PER_PLACE * (members.bit_length() + 1)
    return SLOTS_PER_PLACE * ((place - round) % members).bit_length()
