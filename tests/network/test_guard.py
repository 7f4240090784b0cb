"""What one caller may take of the gRPC server, and when its place goes to another: the guard's rooms by themselves."""

from __future__ import annotations

from functools import partial

import pytest

from psyche_node.network.guard import MAX_STREAMS, MAX_STREAMS_PER_PEER, STREAM_SECONDS, Pace, Place, Streams


def test_open_streams_are_capped_per_peer_and_in_all() -> None:
    streams = Streams(clock=lambda: 0.0)

    def enter(peer: int) -> Place | None:
        return streams.enter(bytes([peer]), lambda: pytest.fail("it is not overdue"))

    first = [enter(0) for _ in range(MAX_STREAMS_PER_PEER + 1)]
    assert [place is not None for place in first] == [True] * MAX_STREAMS_PER_PEER + [False]
    for place in first[1:-1]:
        assert place is not None
        streams.leave(place)
    assert sum(enter(peer) is not None for peer in range(1, 2 * MAX_STREAMS)) == MAX_STREAMS - 1
    assert first[0] is not None
    streams.leave(first[0])
    assert enter(255) is not None


def test_who_has_no_stream_takes_the_place_of_one_of_those_who_has_most() -> None:
    """Four members that read a piece just before it is late would otherwise have all places, for ever."""
    now = 50.0
    streams = Streams(total=5, per_peer=3, clock=lambda: now)
    ended: list[int] = []
    places = [
        streams.enter(peer, partial(ended.append, number)) for number, peer in enumerate([b"a", b"a", b"a", b"b"])
    ]
    streams.enter(b"c", lambda: None)
    now += 1
    for number in (0, 2):
        place = places[number]
        assert place is not None
        streams.moves(place)
    assert streams.enter(b"b", lambda: None) is None, "it has a place"
    assert streams.enter(b"d", lambda: None) is not None
    assert ended == [1]
    assert streams.enter(b"e", lambda: None) is not None
    assert ended == [1, 0]
    assert streams.enter(b"f", lambda: None) is None, "all have one"


def test_a_stream_that_does_not_get_on_makes_room_when_its_place_is_wanted() -> None:
    now = 50.0
    streams = Streams(total=2, per_peer=1, clock=lambda: now)
    ended: list[str] = []
    slow = streams.enter(b"slow", lambda: ended.append("slow"))
    other = streams.enter(b"other", lambda: ended.append("other"))
    assert slow is not None
    assert other is not None
    now += STREAM_SECONDS - 0.1
    assert streams.enter(b"third", lambda: None) is None
    streams.moves(other)
    now += 0.2
    third = streams.enter(b"third", lambda: None)
    assert third is not None
    assert ended == ["slow"]
    streams.leave(slow)  # its call ends, too late to give a place back
    assert streams.enter(b"fourth", lambda: None) is None
    streams.leave(third)
    assert streams.enter(b"slow", lambda: None) is not None


def test_calls_are_paced_per_peer() -> None:
    now = 50.0
    pace = Pace(rate=2.0, burst=4.0, clock=lambda: now)
    assert [pace.allows(b"a") for _ in range(5)] == [True] * 4 + [False]
    assert pace.allows(b"b")
    now += 1.0
    assert [pace.allows(b"a") for _ in range(3)] == [True, True, False]
    # What a call costs beyond its one is owed, and at most a bucket of it.
    pace.charge(b"a", 100)
    now += 2.0
    assert not pace.allows(b"a")
    now += 0.5
    assert pace.allows(b"a")
