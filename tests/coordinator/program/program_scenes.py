"""States that a run reaches when its instructions are used as they are meant: where the fuzzing of instructions starts.

Every scene plays a run of its own on one chain, and keeps the bytes of its accounts and the slot at which they stood.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from program_harness import TERMS, Chain, RunDriver
from solders.account import Account
from solders.pubkey import Pubkey

from coordinator import instructions as ix
from coordinator.layout import GRANT_SIZE
from coordinator.state import Header, Member, Phase, Round, Run

Play = Callable[[RunDriver, "Records"], None]


AUTHORITY = RunDriver.wallet(1000)


@dataclass(slots=True)
class Records:
    """The grants (with the number of the grantee, None: anyone) and receipts (with the member's number) of a run, and
    those of a closed run of its name (with who gets the lamports)."""

    grants: list[tuple[Pubkey, int | None]] = field(default_factory=list)
    receipts: list[tuple[Pubkey, int]] = field(default_factory=list)
    closed: list[tuple[Pubkey, Pubkey]] = field(default_factory=list)


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
    members: dict[int, Member]
    records: Records


def _waiting(run: RunDriver, records: Records) -> None:
    run.must(run.create())
    run.must(run.join(0))
    run.must(run.join(1))


def _warming_up(run: RunDriver, records: Records) -> None:
    run.must(run.create())
    for member in range(5):
        run.must(run.join(member))
    run.tick_when_due()
    for member in range(3):
        run.must(run.ready(member))


def _training(run: RunDriver, records: Records) -> None:
    run.start(5)
    run.must(run.commit(0))
    run.must(run.commit(2))


def _witnessing(run: RunDriver, records: Records) -> None:
    run.start(5)
    run.train(range(5))
    run.must(run.attest(1, 0, range(5)))


def _two_rounds_open(run: RunDriver, records: Records) -> None:
    run.start(5)
    run.train(range(5))
    run.tick_when_due()
    run.must(run.attest(0, 0, [0, 1, 2]))
    run.train(range(4))
    assert sum(entry.closed and not entry.final for entry in run.rounds.values()) == 2


def _desynced(run: RunDriver, records: Records) -> None:
    """One on other weights, one that reported ready again, one who has left, one silent."""
    run.start(8)
    run.train(range(7), {1: 5, 2: 6})
    run.attest_all(0, range(8), [0, 3, 4])
    run.must(run.ready(1))
    run.must(run.leave(5))
    run.tick_when_due()
    for member in (0, 3):
        run.commit(member)


def _torn_queue(run: RunDriver, records: Records) -> None:
    """Every second member is never included: the queue of requeued positions falls to pieces."""
    run.start(80)
    for _ in range(4):
        number = run.train(range(80))
        run.attest_all(number, range(80), range(0, 80, 2))
        run.tick_when_due()
    assert run.header.requeue_ranges > 60


def _cooling_down(run: RunDriver, records: Records) -> None:
    run.start(4)
    number = run.train(range(4))
    run.attest_all(number, range(4), range(4))
    run.tick_when_due()
    assert run.run.phase is Phase.COOLDOWN
    run.must(run.checkpoint(0, b"\x55" * 32))
    run.must(run.checkpoint(1, b"\x66" * 32))


def _checkpoint_agreed(run: RunDriver, records: Records) -> None:
    _cooling_down(run, records)
    run.must(run.checkpoint(2, b"\x55" * 32))
    run.must(run.checkpoint(3, b"\x55" * 32))
    assert run.header.checkpoint_agreed


def _waiting_again(run: RunDriver, records: Records) -> None:
    """Too few members are left after a cooldown; those who left keep their credit."""
    run.start(4)
    number = run.train(range(4))
    run.attest_all(number, range(4), range(4))
    for member in (1, 2):
        run.must(run.leave(member))
    run.tick_when_due()
    run.tick_when_due()
    assert run.run.phase is Phase.WAITING_FOR_MEMBERS


def _finished(run: RunDriver, records: Records) -> None:
    run.start(4)
    number = run.train(range(4))
    run.attest_all(number, range(4), range(4))
    run.tick_when_due()
    run.tick_when_due()
    assert run.run.phase is Phase.FINISHED


def _admitted(run: RunDriver, records: Records, members: int) -> None:
    """Members come by grants of their own, by one for everybody, and one by delegation."""
    run.must(run.create())
    for grantee in (0, 1, None):
        run.must(run.authorize(None if grantee is None else run.wallet(grantee)))
        records.grants.append((run.grant(None if grantee is None else run.wallet(grantee)), grantee))
    place = (run.addresses, run.chain.program)
    run.must(run.chain.send(ix.delegate(*place, run.wallet(0), records.grants[0][0], run.wallet(2))))
    for member in range(members):
        grant = records.grants[0 if member == 2 else min(member, 2)][0]
        run.must(run.join(member, grant=grant))


def _private(run: RunDriver, records: Records) -> None:
    _admitted(run, records, 5)
    run.tick_when_due()
    for member in range(5):
        run.must(run.ready(member))
    run.tick_when_due()
    run.must(run.commit(2))
    run.must(run.kick(4))
    run.must(run.ban(run.wallet(6)))


def _full_lists(run: RunDriver, records: Records) -> None:
    """64 keys banned, and a grant with 32 delegates."""
    _admitted(run, records, 3)
    place = (run.addresses, run.chain.program)
    for number in range(31):
        run.must(run.chain.send(ix.delegate(*place, run.wallet(0), records.grants[0][0], run.wallet(100 + number))))
    for number in range(64):
        run.must(run.ban(run.node(100 + number)))


def _pause_pending(run: RunDriver, records: Records) -> None:
    _two_rounds_open(run, records)
    run.must(run.pause())


def _paused(run: RunDriver, records: Records) -> None:
    _training(run, records)
    run.must(run.pause())
    while run.run.phase is not Phase.PAUSED:
        run.tick_when_due()
    run.must(run.join(5))


def _paused_warming_up(run: RunDriver, records: Records) -> None:
    _warming_up(run, records)
    run.must(run.pause())
    run.tick_when_due()


def _finish_pending(run: RunDriver, records: Records) -> None:
    _training(run, records)
    run.must(run.finish())


def _config_pending(run: RunDriver, records: Records) -> None:
    _training(run, records)
    run.must(run.set_config(batch=40, overlap=0, max_share=500))
    run.must(run.set_share(1, 7))


def _rewarded(run: RunDriver, records: Records) -> None:
    """Credit and rewards: with members, with one that has left, in a receipt, and in one whose member is back."""
    run.start(8)
    for member in range(5):
        run.chain.svm.airdrop(run.wallet(member), 10**9)  # small payments cannot bring an account into being
    run.must(run.by_owner(ix.set_reward_rate, 10**9))
    run.chain.svm.airdrop(run.addresses.run, 5000)
    for _ in range(2):
        number = run.train(range(8))
        run.attest_all(number, range(8), range(8))
        run.tick_when_due()
    for member in (1, 2, 3):
        run.must(run.leave(member))
    run.must(run.claim(4))
    run.chain.svm.airdrop(run.addresses.run, 10**6)
    for _ in range(2):
        number = run.train(range(4, 8))
        run.attest_all(number, range(4, 8), range(4, 8))
        run.tick_when_due()
    for member in (1, 2):
        outcome, receipt = run.archive(member)
        run.must(outcome)
        records.receipts.append((receipt, member))
    run.must(run.join(1))


def _rewards_owed(run: RunDriver, records: Records) -> None:
    _rewarded(run, records)
    run.must(run.finish())
    while run.run.phase is not Phase.FINISHED:
        run.tick_when_due()


def _crowd(run: RunDriver, records: Records) -> None:
    """All 256 slots taken, commitments and attestations under way in two rounds."""
    run.start(256)
    run.train(range(256))
    run.tick_when_due()
    for witness in run.rounds[0].witnesses[:15]:
        run.must(run.attest(witness, 0, range(256)))
    for member in range(200):
        run.commit(member)


def _reborn(run: RunDriver, records: Records) -> None:
    """A run of the same name was here before, and has left a grant for everybody and a receipt."""
    _admitted(run, records, 4)
    run.tick_when_due()
    for member in range(4):
        run.must(run.ready(member))
    run.tick_when_due()
    number = run.train(range(4))
    run.attest_all(number, range(4), range(4))
    run.tick_when_due()
    run.must(run.leave(1))
    outcome, receipt = run.archive(1)
    run.must(outcome)
    run.must(run.finish())
    run.tick_when_due()
    run.must(run.by_owner(ix.close_run))
    records.closed = [(grant, AUTHORITY) for grant, _ in records.grants] + [(receipt, run.chain.payer.pubkey())]
    records.grants = []
    run.must(run.create())
    run.chain.advance()


def _extremes(run: RunDriver, records: Records) -> None:
    """The largest values that the program accepts, and credit and rewards at the end of their range."""
    run.must(run.create())
    run.must(run.by_owner(ix.set_reward_rate, 10**10))
    run.must(run.join(0, 1_000_000))
    run.tick_when_due()
    run.must(run.ready(0))
    run.tick_when_due()
    for number in range(8):
        most = run.rounds[number].slices[0][1] * 2**24
        run.must(run.commit(0, tokens=most, fingerprint=2**64 - 1))
        run.tick_when_due()
        run.must(run.attest(0, number, [0]))
        run.tick_when_due()
    assert run.members[0].reward == 2**64 - 1
    run.must(run.leave(0))
    for _ in range(2):
        run.tick_when_due()
    outcome, receipt = run.archive(0)
    run.must(outcome)
    records.receipts.append((receipt, 0))
    run.must(run.join(0, 1_000_000))


MOST = 2**32 - 1
EXTREME_TERMS = replace(
    TERMS,
    samples=2**64 - 1,
    sequence_length=2**24,
    update_bytes=2**40,
    topk=2**16,
    ramp_batch=2**24,
    ramp_rounds=2**32 - 1,
)
EXTREMES = {
    "init_min_members": 1,
    "min_members": 1,
    "witnesses": 1,
    "overlap": 0,
    "max_missed": 255,
    "join_grace": MOST,
    "warmup_time": MOST,
    "max_round_train_time": MOST,
    "round_witness_time": MOST,
    "cooldown_time": MOST,
    "adaptive_grace": MOST,
    "batch": 2**24,
    "rounds_per_epoch": MOST,
    "total_rounds": 2**31 - 1,
}

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
    "private": (_private, 8, {"min_members": 1, "init_min_members": 1}),
    "full lists": (_full_lists, 5, {}),
    "pause pending": (_pause_pending, 6, {"overlap": 1, "rounds_per_epoch": 8}),
    "paused": (_paused, 7, {"rounds_per_epoch": 8}),
    "paused warming up": (_paused_warming_up, 6, {"init_min_members": 5}),
    "finish pending": (_finish_pending, 6, {}),
    "config pending": (_config_pending, 6, {}),
    "rewarded": (_rewarded, 9, {"overlap": 0, "rounds_per_epoch": 50, "total_rounds": 100}),
    "rewards owed": (_rewards_owed, 9, {"overlap": 0, "rounds_per_epoch": 50, "total_rounds": 100}),
    "reborn": (_reborn, 5, {"overlap": 0, "rounds_per_epoch": 1}),
    "version 1": (_training, 6, {}),
    "extremes": (_extremes, 2, EXTREMES),
    "crowd": (_crowd, 257, {"batch": 5000, "rounds_per_epoch": 8}),
}


def play(chain: Chain, name: str) -> Scene:
    """Play one scene from nothing."""
    steps, people, limits = SCENES[name]
    run_id = name.replace(",", "").replace(" ", "-")
    authority = AUTHORITY if name in ("private", "full lists", "reborn") else None
    terms = EXTREME_TERMS if name == "extremes" else TERMS
    run = RunDriver(chain, run_id, terms, authority, **limits)
    spare = RunDriver(chain, f"spare-{run_id}", terms, authority, **limits)
    records = Records()
    chain.svm.airdrop(AUTHORITY, 10**10)
    steps(run, records)
    state, header, rounds, members = run.run, run.header, run.rounds, run.members
    if name == "version 1":  # as the version before left them
        for address in (run.addresses.run, run.addresses.members, run.addresses.rounds):
            run.patch(address, 8, b"\x01")
    accounts = {}
    for part in ("run", "members", "rounds"):
        address = getattr(run.addresses, part)
        account = chain.svm.get_account(address)
        assert account is not None
        accounts[address] = account
        accounts[getattr(spare.addresses, part)] = Account(account.lamports, bytes(len(account.data)), chain.program)
    for address, _ in [*records.grants, *records.receipts, *records.closed]:
        account = chain.svm.get_account(address)
        assert account is not None
        accounts[address] = account
    rent = chain.svm.minimum_balance_for_rent_exemption(GRANT_SIZE)
    empty = run.grant(run.wallet(people - 1), AUTHORITY)
    accounts[empty] = Account(rent, bytes(GRANT_SIZE), chain.program)
    return Scene(name, run, spare, chain.slot, accounts, people, state, header, rounds, members, records)
