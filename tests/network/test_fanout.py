"""The parts of the exchange on their own: trees, plans of pieces, turns, what is known of peers."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from dataclasses import dataclass

import pytest
import trio
import trio.testing
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_node.network.directory import Directory
from psyche_node.network.fanout import ARITY, Tree
from psyche_node.network.messages import Kind
from psyche_node.network.notices import MAX_EARLY_PER_HOLDER, EarlyOffers
from psyche_node.network.pieces import Plan, pack, unpack
from psyche_node.network.quality import LONGEST_PAUSE, MAX_PEERS, Quality
from psyche_node.network.turns import ACTIVE_SECONDS, YIELD_SECONDS, Slots, Turns, rank
from psyche_node.network.uploads import SLACK_BYTES, Allowances
from psyche_node.network.wants import HEDGE_SECONDS, Chooser, Role, Want, is_slow


def members_of(count: int) -> list[bytes]:
    return [blake3(bytes([number % 256, number // 256])).digest() for number in range(count)]


# Trees ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 256), st.integers(0, 2**63 - 1), st.randoms())
def test_every_member_reaches_the_author_and_nobody_has_more_than_two_children(count, round, random) -> None:  # type: ignore[no-untyped-def]
    members = members_of(count)
    author = random.choice(members)
    shuffled = random.sample(members, count)
    tree = Tree(round, author, members)
    assert tree.order == Tree(round, author, shuffled).order, "it depends on the order of the member list"
    assert tree.order[0] == author
    assert set(tree.order) == set(members)
    for member in members:
        ancestors = tree.ancestors(member)
        assert len(ancestors) <= count.bit_length()
        assert (ancestors[-1] == author) if ancestors else member == author
        assert len(tree.children(member)) <= ARITY
        for child in tree.children(member):
            assert tree.ancestors(child) == [member, *ancestors]
    assert sorted(child for member in members for child in tree.children(member)) == sorted(set(members) - {author})


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(0, 2**63 - 1))
def test_when_all_publish_all_send_the_same(count: int, round: int) -> None:
    members = members_of(count)
    sent: Counter[bytes] = Counter()
    for author in members:
        tree = Tree(round, author, members)
        sent.update({member: len(tree.children(member)) for member in members})
    assert set(sent.values()) == {count - 1}


def test_each_round_has_another_order() -> None:
    members = members_of(8)
    orders = {Tree(round, members[0], members).order for round in range(20)}
    assert len(orders) == 20


def test_private_members_are_leaves_as_long_as_there_is_room() -> None:
    members = members_of(15)
    private = set(members[:7])
    for round in range(10):
        for author in members:
            tree = Tree(round, author, members, private)
            assert tree.order[0] == author
            passing_on = {member for member in members if tree.children(member)}
            assert passing_on - {author} == passing_on - private - {author}
    assert {len(Tree(0, author, members, set(members)).order) for author in members} == {15}


def test_trees_without_an_author_or_without_this_node() -> None:
    members = members_of(5)
    tree = Tree(3, None, members)
    assert set(tree.order) == set(members)
    assert Tree(3, b"who has left", members).order == tree.order
    assert tree.ancestors(b"a stranger") == [tree.order[0]]
    assert tree.children(b"a stranger") == []
    assert Tree(3, None, []).ancestors(members[0]) == []


# Pieces --------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=100))
def test_bitmaps_come_back(held: list[bool]) -> None:
    assert unpack(pack(bytes(held)), len(held)) == bytes(held)


@settings(deadline=None)
@given(st.binary(max_size=20), st.integers(0, 100))
def test_any_bitmap_of_a_stranger_has_as_many_pieces_as_the_blob(bitmap: bytes, count: int) -> None:
    held = unpack(bitmap, count)
    assert len(held) == count
    assert set(held) <= {0, 1}
    assert all(
        one == (index // 8 < len(bitmap) and bitmap[index // 8] >> index % 8 & 1) for index, one in enumerate(held)
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sources_bring_different_pieces_and_all_of_them(data: st.DataObject) -> None:
    """Three sources take, bring, and fail in any order; every piece arrives, few twice, none from where it is not."""
    count = data.draw(st.integers(1, 40))
    missing = data.draw(st.sets(st.integers(0, count - 1)))
    held = {source: data.draw(st.binary(min_size=count, max_size=count)) for source in (b"a", b"b")}
    plan = Plan(count, missing)
    coming: dict[bytes, list[int]] = {}
    arrived: Counter[int] = Counter()
    again: set[int] = set()
    for _ in range(150):
        if not plan.left:
            break
        source = data.draw(st.sampled_from([b"a", b"b", b"c"]))
        if source not in coming:
            endgame = data.draw(st.booleans())
            everywhere = {index for run in coming.values() for index in run}
            run = plan.take(source, data.draw(st.integers(1, 8)), held.get(source), again=endgame)
            assert all(source not in held or held[source][index] for index in run)
            assert set(run) <= missing
            twice = everywhere.intersection(run)
            assert not twice or (endgame and twice == set(run))
            again |= twice
            if run:
                coming[source] = list(run)
        elif data.draw(st.booleans()):
            index = coming[source].pop(0)
            plan.arrived(index)
            arrived[index] += 1
            if not coming[source]:
                del coming[source]
        else:
            plan.give_back(source, coming.pop(source))
    for source, run in coming.items():
        plan.give_back(source, run)
    while run := plan.take(b"c", 3):
        for index in run:
            plan.arrived(index)
            arrived[index] += 1
    assert set(arrived) == missing
    assert plan.left == 0
    assert not plan.untaken()
    assert {index for index, times in arrived.items() if times > 1} <= again


def test_the_last_pieces_are_taken_from_the_end_of_what_a_slow_source_still_has_to_bring() -> None:
    plan = Plan(10, range(10))
    assert plan.take(b"slow", 10) == range(10)
    assert plan.take(b"fast", 4) == range(0)
    assert plan.take(b"fast", 4, again=True) == range(6, 10)
    assert plan.take(b"third", 4, again=True) == range(2, 6)
    assert plan.take(b"slow", 4, again=True) == range(0), "it brings them already"
    for index in range(2, 10):
        plan.arrived(index)
    plan.give_back(b"slow", range(10))
    assert plan.take(b"fast", 10) == range(2)


# Turns ---------------------------------------------------------------------------------------------------------------


def test_what_is_urgent() -> None:
    order = [
        rank(Kind.UPDATE, 8, 7),
        rank(Kind.UPDATE, 6, 7),
        rank(Kind.UPDATE, 5, 7),
        rank(Kind.CHECKPOINT, 7, 7),
        rank(Kind.MODEL, 7, 7),
    ]
    assert order == sorted(set(order))
    assert rank(Kind.UPDATE, 7, 7) == order[0]


def test_slots_go_to_the_most_urgent_and_come_back_when_a_waiter_is_cancelled() -> None:
    async def scenario() -> None:
        slots, order = Slots(1), []
        release = {name: trio.Event() for name in "abd"}
        gone = trio.CancelScope()

        async def hold(name: str, urgency: tuple[int, int]) -> None:
            async with slots.slot(urgency):
                order.append(name)
                await release[name].wait()

        async def give_up(name: str, urgency: tuple[int, int]) -> None:
            with gone:
                await hold(name, urgency)

        async with trio.open_nursery() as nursery:
            for name, urgency in (("a", (3, 0)), ("b", (1, 2)), ("c", (0, 0)), ("d", (1, 1))):
                nursery.start_soon(give_up if name == "c" else hold, name, urgency)
                await trio.testing.wait_all_tasks_blocked()
            assert order == ["a"]
            gone.cancel()
            await trio.testing.wait_all_tasks_blocked()
            for name in "adb":
                release[name].set()
                await trio.testing.wait_all_tasks_blocked()
        assert order == ["a", "d", "b"]

    trio.run(scenario)


def test_slots_by_weight_keep_to_a_capacity_that_may_grow() -> None:
    async def scenario() -> None:
        capacity = 1.0
        slots, held = Slots(10, lambda: capacity), []

        async def hold(weight: float) -> None:
            async with slots.slot((0, 0), weight):
                held.append(weight)
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            for weight in (0.5, 0.5, 1.0, 0.1):
                nursery.start_soon(hold, weight)
                await trio.testing.wait_all_tasks_blocked()
            assert held == [0.5, 0.5], "the light one goes before the heavy one that came first"
            capacity = 2.0
            slots.pass_on()
            await trio.testing.wait_all_tasks_blocked()
            assert held == [0.5, 0.5, 1.0]
            nursery.cancel_scope.cancel()

    trio.run(scenario)


def test_a_model_waits_for_updates_that_move_and_not_for_those_that_do_not() -> None:
    now = 100.0
    turns = Turns(lambda: now)
    model, update = turns.enter((3, 0)), turns.enter((0, 0))
    assert not turns.wait(model, 0.0)
    assert turns.wait(update, 0.0)
    now += ACTIVE_SECONDS
    assert turns.wait(model, 0.0), "an update that moves nothing holds up a model"
    assert turns.wait(update, 0.0)
    assert not turns.wait(model, 0.0)
    turns.leave(update)
    assert turns.wait(model, 0.0)
    assert YIELD_SECONDS < ACTIVE_SECONDS


def test_a_peer_gets_each_blob_twice_and_no_more() -> None:
    allowances = Allowances()
    length = SLACK_BYTES
    for _ in range(3):
        assert allowances.allows(b"a", b"blob", length, length)
    assert not allowances.allows(b"a", b"blob", length, 1)
    assert allowances.allows(b"a", b"another", length, 1)
    assert allowances.allows(b"b", b"blob", length, 1)


def test_offers_that_nobody_waits_for_are_bounded_per_holder() -> None:
    early = EarlyOffers()
    early.add(b"real", b"honest")
    for number in range(2 * MAX_EARLY_PER_HOLDER):
        early.add(number.to_bytes(2, "big"), b"flooder")
    early.add(b"real", b"flooder")
    assert early.take(b"real") == [b"honest", b"flooder"]
    assert early.take(b"real") == []
    assert early.take((0).to_bytes(2, "big")) == []


# What is known of peers ----------------------------------------------------------------------------------------------


def test_failures_double_the_pause_and_a_success_ends_it_and_a_call_if_it_was_not_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    quality = Quality(lambda: now)
    peer = bytes(32)
    with caplog.at_level(logging.INFO):
        for seconds in (1, 2, 4):
            quality.failed(peer, "broken")
            assert quality.avoided(peer)
            now += seconds
            assert not quality.avoided(peer)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]
    assert "for 4 s, failure 3 in a row: broken" in caplog.text
    for _ in range(20):
        quality.failed(peer, "broken")
    now += LONGEST_PAUSE - 1
    assert quality.avoided(peer)
    quality.failed(peer, "gone", absent=True)
    quality.heard(peer)
    assert quality.avoided(peer), "it fails, and calls"
    quality.served(peer, 1 << 20, 1.0)
    assert not quality.avoided(peer)
    quality.failed(peer, "gone", absent=True)
    assert quality.avoided(peer)
    quality.heard(peer)
    assert not quality.avoided(peer)
    quality.failed(peer, "broken")
    quality.served(peer, 1 << 20, 1.0)
    assert not quality.avoided(peer)


def test_fast_peers_are_expected_to_be_fast_and_slow_ones_are_named(caplog: pytest.LogCaptureFixture) -> None:
    quality = Quality(lambda: 0.0)
    fast, slow, unknown = b"f" * 32, b"s" * 32, b"u" * 32
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            quality.served(fast, 10_000_000, 0.1)
        quality.served(slow, 1_000_000, 1.0)
    assert "is slow: 1.0 MB/s" in caplog.text
    assert (
        quality.seconds_for(fast, 1 << 20) < quality.seconds_for(unknown, 1 << 20) < quality.seconds_for(slow, 1 << 20)
    )
    quality.served(unknown, 100, 10.0)
    assert quality.speed(unknown) == quality.usual(), "a few bytes say nothing about speed"


def test_what_comes_in_is_a_rate_over_the_last_seconds_and_peers_are_bounded() -> None:
    now = 0.0
    quality = Quality(lambda: now)
    for _ in range(400):
        now += 0.1
        quality.arrived(100_000)
    assert quality.inflow() == pytest.approx(1_000_000, rel=0.05)
    now += 60
    assert quality.inflow() < 1
    for number in range(2 * MAX_PEERS):
        quality.answered(number.to_bytes(32, "big"), 1.0)
    assert len(quality._peers) == MAX_PEERS


def test_a_usual_stream_has_its_share_of_a_slow_line() -> None:
    now = 0.0
    quality = Quality(lambda: now)
    quality.served(b"peer", 1 << 30, 1.0)
    with contextlib.ExitStack() as streams:
        for _ in range(8):
            streams.enter_context(quality.stream())
        slow = quality.share()
        assert slow < quality.usual() / 8
        for _ in range(400):
            now += 0.1
            quality.arrived(16_000_000)
        assert quality.share() == pytest.approx(20_000_000, rel=0.05)
    quality.arrived(1 << 40)
    assert quality.share() == quality.usual()


@dataclass
class Source:
    """A source being read."""

    is_slow: bool
    given_up: bool = False
    idle: float = 0.0
    rate: float = 0.0

    def slow(self, usual: float) -> bool:
        return self.is_slow

    def cancel(self) -> None: ...

    def give_up(self, reason: str) -> None: ...


def chosen() -> tuple[Chooser, Want, list[bytes]]:
    """A chooser, a want of an update, and the node keys in the order of its tree; the last one is this node."""
    members = members_of(7)
    order = list(Tree(1, members[0], members).order)
    directory, quality = Directory(order[-1]), Quality()
    directory.set_members(dict(enumerate(order)))
    directory.sources = lambda keys: list(keys)  # type: ignore[method-assign,assignment]
    directory.reachable = lambda key: True  # type: ignore[method-assign]
    want = Want(1, {0: Tree(1, members[0], members)}, bytes(32), 8 << 20, Kind.UPDATE, 0.0)
    return Chooser(directory, quality, lambda key, want: 0), want, order


def test_who_is_no_ancestor_is_no_parent_whatever_it_says() -> None:
    chooser, want, order = chosen()
    author, _, parent, stranger, *_ = order
    want.offers = {stranger: None}
    want.invited = {stranger}
    choice = chooser.choose(want, 0.0, 0.0)
    assert choice is not None
    assert (choice.source, choice.role) == (stranger, Role.HOLDER)
    want.offers[parent] = None
    want.invited |= {parent, author}
    choice = chooser.choose(want, 0.0, 0.0)
    assert choice is not None
    assert (choice.source, choice.role) == (parent, Role.PARENT)


def test_when_all_sources_are_slow_another_one_takes_the_place_of_one_but_none_that_failed() -> None:
    chooser, want, order = chosen()
    one, two, third = order[2], order[3], order[4]
    want.running = {one: Source(True), two: Source(False)}
    want.offers = {third: None}
    assert chooser.full(want)
    assert chooser.choose(want, 0.0, 0.0) is None
    want.running[two] = Source(True)
    choice = chooser.choose(want, 0.0, 0.0)
    assert choice is not None
    assert choice.source == third
    want.broken = {third, order[1]}
    assert chooser.choose(want, 0.0, 0.0) is None
    want.broken = set()
    want.running[one] = Source(True, given_up=True)
    assert chooser.choose(want, 0.0, 0.0) is None, "one makes room already"


def test_when_a_source_is_slow() -> None:
    usual = 10_000_000.0
    assert not is_slow(0.1, 1.0, 8_000_000, 10**9, usual)
    assert is_slow(HEDGE_SECONDS + 1, 10.0, 80_000_000, 10**9, usual), "nothing came for a while"
    assert is_slow(0.1, HEDGE_SECONDS + 1, 2_000_000, 10**9, usual), "it drips"
    assert not is_slow(0.1, HEDGE_SECONDS + 1, 2_000_000, 100_000, usual), "it drips, and is nearly done"
    assert is_slow(HEDGE_SECONDS + 1, 10.0, 0, 1000, 1e6)
    assert not is_slow(HEDGE_SECONDS + 1, 10.0, 0, 1000, 1e5), "a piece takes as long"
    assert is_slow(HEDGE_SECONDS + 1, 10.0, 0, 1000, 1e5, 1000), "one as small as this does not"
    assert not is_slow(-1e9, -1e9, 0, 10**9, usual), "it has not started"
