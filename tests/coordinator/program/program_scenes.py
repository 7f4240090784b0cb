"""States that a run reaches when its instructions are used as they are meant: where the fuzzing of instructions starts.

Every scene plays a run of its own on one chain, and keeps the bytes of its accounts and the slot at which they stood.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from program_harness import Chain, RunDriver
from solders.account import Account
from solders.pubkey import Pubkey

from coordinator.state import Header, Phase, Round, Run

Play = Callable[[RunDriver], None]


@dataclass(frozen=True, slots=True)
class Scene:
    """A run as it stood in `slot`. `people` are the numbers of those who ever took part, and of one who did not.
    `spare` names a run that can be created: its three accounts stand empty."""

    name: str
    run: RunDriver
    spare: RunDriver
    slot: int
    accounts: dict[Pubkey, Account]
    people: int
    state: Run
    header: Header
    rounds: dict[int, Round]


def _waiting(run: RunDriver) -> None:
    run.must(run.create())
    run.must(run.join(0))
    run.must(run.join(1))


def _warming_up(run: RunDriver) -> None:
    run.must(run.create())
    for member in range(5):
        run.must(run.join(member))
    run.tick_when_due()
    for member in range(3):
        run.must(run.ready(member))


def _training(run: RunDriver) -> None:
    run.start(5)
    run.must(run.commit(0))
    run.must(run.commit(2))


def _witnessing(run: RunDriver) -> None:
    run.start(5)
    run.train(range(5))
    run.must(run.attest(1, 0, range(5)))


def _two_rounds_open(run: RunDriver) -> None:
    run.start(5)
    run.train(range(5))
    run.tick_when_due()
    run.must(run.attest(0, 0, [0, 1, 2]))
    run.train(range(4))
    assert sum(entry.closed and not entry.final for entry in run.rounds.values()) == 2


def _desynced(run: RunDriver) -> None:
    """One on other weights, one that reported ready again, one who has left, one silent."""
    run.start(8)
    run.train(range(7), {1: 5, 2: 6})
    run.attest_all(0, range(8), [0, 3, 4])
    run.must(run.ready(1))
    run.must(run.leave(5))
    run.tick_when_due()
    for member in (0, 3):
        run.commit(member)


def _torn_queue(run: RunDriver) -> None:
    """Every second member is never included: the queue of requeued positions falls to pieces."""
    run.start(80)
    for _ in range(4):
        number = run.train(range(80))
        run.attest_all(number, range(80), range(0, 80, 2))
        run.tick_when_due()
    assert run.header.requeue_ranges > 60


def _cooling_down(run: RunDriver) -> None:
    run.start(4)
    number = run.train(range(4))
    run.attest_all(number, range(4), range(4))
    run.tick_when_due()
    assert run.run.phase is Phase.COOLDOWN
    run.must(run.checkpoint(0, b"\x55" * 32))
    run.must(run.checkpoint(1, b"\x66" * 32))


def _checkpoint_agreed(run: RunDriver) -> None:
    _cooling_down(run)
    run.must(run.checkpoint(2, b"\x55" * 32))
    run.must(run.checkpoint(3, b"\x55" * 32))
    assert run.header.checkpoint_agreed


def _waiting_again(run: RunDriver) -> None:
    """Too few members are left after a cooldown; those who left keep their credit."""
    run.start(4)
    number = run.train(range(4))
    run.attest_all(number, range(4), range(4))
    for member in (1, 2):
        run.must(run.leave(member))
    run.tick_when_due()
    run.tick_when_due()
    assert run.run.phase is Phase.WAITING_FOR_MEMBERS


def _finished(run: RunDriver) -> None:
    run.start(4)
    number = run.train(range(4))
    run.attest_all(number, range(4), range(4))
    run.tick_when_due()
    run.tick_when_due()
    assert run.run.phase is Phase.FINISHED


def _crowd(run: RunDriver) -> None:
    """All 256 slots taken, commitments and attestations under way in two rounds."""
    run.start(256)
    run.train(range(256))
    run.tick_when_due()
    for witness in run.rounds[0].witnesses[:15]:
        run.must(run.attest(witness, 0, range(256)))
    for member in range(200):
        run.commit(member)


SCENES: dict[str, tuple[Play, int, dict[str, int]]] = {
    "waiting": (_waiting, 3, {}),
    "warming up": (_warming_up, 6, {"init_min_members": 5}),
    "training": (_training, 6, {"overlap": 1}),
    "training, no overlap": (_training, 6, {"overlap": 0}),
    "witnessing": (_witnessing, 6, {"overlap": 0}),
    "one witness": (_witnessing, 6, {"overlap": 0, "witnesses": 3}),
    "two rounds open": (_two_rounds_open, 6, {"overlap": 1, "rounds_per_epoch": 8}),
    "draining": (_two_rounds_open, 6, {"overlap": 1, "rounds_per_epoch": 2}),
    "desynced": (_desynced, 9, {"rounds_per_epoch": 8}),
    "torn queue": (
        _torn_queue,
        81,
        {"batch": 160, "rounds_per_epoch": 50, "total_rounds": 100, "max_missed": 255, "overlap": 0},
    ),
    "cooling down": (_cooling_down, 5, {"rounds_per_epoch": 1, "overlap": 0}),
    "checkpoint agreed": (_checkpoint_agreed, 5, {"rounds_per_epoch": 1, "overlap": 0}),
    "waiting again": (_waiting_again, 5, {"overlap": 0}),
    "finished": (_finished, 5, {"total_rounds": 1, "overlap": 0}),
    "crowd": (_crowd, 257, {"batch": 5000, "rounds_per_epoch": 8}),
}


def play(chain: Chain, name: str) -> Scene:
    """Play one scene from nothing."""
    steps, people, limits = SCENES[name]
    run_id = name.replace(",", "").replace(" ", "-")
    run, spare = RunDriver(chain, run_id, **limits), RunDriver(chain, f"spare-{run_id}", **limits)
    steps(run)
    accounts = {}
    for field in ("run", "members", "rounds"):
        address = getattr(run.addresses, field)
        account = chain.svm.get_account(address)
        assert account is not None
        accounts[address] = account
        accounts[getattr(spare.addresses, field)] = Account(account.lamports, bytes(len(account.data)), chain.program)
    return Scene(name, run, spare, chain.slot, accounts, people, run.run, run.header, run.rounds)
