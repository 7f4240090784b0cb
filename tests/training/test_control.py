"""How ranks are told what to do: their replies are one reply, and who is out of step ends."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from torch.distributed import DistNetworkError, HashStore

from psyche_node.ipc import Message, Ok
from psyche_node.training import control
from psyche_node.training.control import Control, Lead, follow
from psyche_node.training.errors import OutOfStep, RankFailed, TrainingError
from psyche_node.training.messages import Root

Handle = Callable[[Message], Message]


class Group:
    """Two ranks, rank 1 in a thread. ``ended`` counts how often rank 0 was told to end after its reply."""

    def __init__(self, first: Handle, second: Handle) -> None:
        store = HashStore()
        self.ended = 0
        self.raised: BaseException | None = None
        self.lead = Lead(first, Control(store, 0, 2), self._end)
        self._thread = threading.Thread(target=self._follow, args=(second, Control(store, 1, 2)), daemon=True)
        self._thread.start()

    def _end(self) -> None:
        self.ended += 1

    def _follow(self, handle: Handle, here: Control) -> None:
        try:
            follow(handle, here)
        except OutOfStep as error:
            self.raised = error

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


def fine(request: Message) -> Message:
    return Ok()


def failing(request: Message) -> Message:
    raise TrainingError("this cannot be")


def test_what_fails_everywhere_is_one_failure_and_the_group_goes_on() -> None:
    handles = {"both": failing}
    both: Handle = lambda request: handles["both"](request)  # noqa: E731
    group = Group(both, both)
    with pytest.raises(TrainingError, match="this cannot be"):
        group.lead(Root())
    handles["both"] = fine
    for _ in range(3):
        assert group.lead(Root()) == Ok()
    group.lead.close()
    group.join()
    assert (group.ended, group.raised) == (0, None)


def test_a_rank_whose_first_one_goes_while_it_listens_is_out_of_step() -> None:
    """It has waited for what the others say, and asks a store that has gone meanwhile."""

    class Going(HashStore):
        def get(self, key: str) -> bytes:
            raise DistNetworkError(f"Connection reset by peer, of {key}")

    store = Going()
    store.set("outcome/0/0", "")
    with pytest.raises(OutOfStep, match=r"rank 1 ended its step \(well\), and others are not heard of"):
        Control(store, 1, 2).settle(None)


@pytest.mark.parametrize(("first", "second"), [(failing, fine), (fine, failing)])
def test_what_fails_on_one_rank_alone_ends_all(first: Handle, second: Handle) -> None:
    group = Group(first, second)
    number = 0 if first is failing else 1
    words = rf"Root failed on rank {number} and not on rank {1 - number}, .*TrainingError: this cannot be"
    with pytest.raises(RankFailed, match=words):
        group.lead(Root())
    group.join()
    assert group.ended == 1
    assert isinstance(group.raised, OutOfStep)
    assert re.search(words, str(group.raised))


def test_a_rank_that_did_what_others_could_not_ends_too() -> None:
    """Rank 0 is told by the reply, and rank 2 by what rank 1 said, though rank 0 failed as well."""
    store = HashStore()
    ranks = [Control(store, rank, 3) for rank in range(3)]
    raised: list[BaseException] = []

    def run(handle: Handle, here: Control) -> None:
        try:
            follow(handle, here)
        except OutOfStep as error:
            raised.append(error)

    threads = [
        threading.Thread(target=run, args=(handle, here), daemon=True)
        for handle, here in ((failing, ranks[1]), (fine, ranks[2]))
    ]
    for thread in threads:
        thread.start()
    ended: list[bool] = []
    with pytest.raises(RankFailed, match="Root failed on rank 0 and not on rank 2"):
        Lead(failing, ranks[0], lambda: ended.append(True))(Root())
    for thread in threads:
        thread.join(60)
    assert (len(raised), ended) == (2, [True])


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Handle]:
    """A handler that waits for somebody who will not come, until the test is over; who fails waits but shortly."""
    monkeypatch.setattr(control, "_PATIENCE", timedelta(seconds=0.2))
    release = threading.Event()

    def handle(request: Message) -> Message:
        assert release.wait(60)
        return Ok()

    yield handle
    release.set()


def test_rank_0_does_not_wait_forever_for_one_that_is_stuck(stuck: Handle) -> None:
    group = Group(failing, stuck)
    with pytest.raises(OutOfStep, match="rank 0 ended its step"):
        group.lead(Root())
    assert group.ended == 1


def test_a_rank_that_fails_while_rank_0_is_stuck_ends(stuck: Handle) -> None:
    group = Group(stuck, failing)

    def lead() -> None:
        with contextlib.suppress(RankFailed):  # once it is released
            group.lead(Root())

    threading.Thread(target=lead, daemon=True).start()
    group.join()
    assert isinstance(group.raised, OutOfStep)
