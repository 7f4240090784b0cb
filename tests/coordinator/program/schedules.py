"""Random schedules of everybody who has to do with a run: members, owner, authority, strangers, time.

Instructions are mostly what a helpful party would send next, often a little wrong, some get lost, some come late or
twice. A schedule follows from its seed; one that fails is cut down to the actions that it needs.

python tests/coordinator/program/schedules.py 10000             schedules of 200 actions
python tests/coordinator/program/schedules.py --replay SEED     one of them again
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable

from program_harness import Chain, ProgramFault
from run_model import RunModel
from schedule_play import ANYONE, AUTHORITY, OWNER, PAYER, PEOPLE, Action, Mismatch, Play
from solders.pubkey import Pubkey

from coordinator.values import MemberStatus, Phase

STEPS = 200
SEED = 20261201
CHAIN_LIFE = 500  # schedules until a new chain is made


class Failure(AssertionError):
    """A schedule on which program and model differ, as short as it could be made."""


class Author:
    """Writes a schedule, one action after the other, looking at the model."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.private = rng.random() < 0.3
        self.crew = rng.randint(2, PEOPLE)  # so many like to be there before they begin
        self.care = rng.choice([0.97, 0.97, 0.75])  # of witnesses
        minimum = rng.randint(1, 3)
        initial = rng.randint(minimum, 4)
        self.limits = {
            "min_members": minimum,
            "init_min_members": initial,
            "max_members": rng.choice([initial, 8, 256, 256]),
            "witnesses": rng.choice([0, 0, minimum, 1]),
            "overlap": rng.randint(0, 1),
            "max_missed": rng.choice([1, 2, 2, 3]),
            "join_grace": rng.choice([0, 3]),
            "warmup_time": rng.choice([1, 15, 40, 40]),
            "max_round_train_time": rng.choice([5, 30, 30]),
            "round_witness_time": rng.choice([1, 12, 12]),
            "cooldown_time": rng.choice([1, 12, 12]),
            "adaptive_grace": rng.choice([0, 4]),
            "batch": rng.choice([minimum, 7, 23, 40]),
            "rounds_per_epoch": rng.choice([1, 3, 8, 50]),
            "total_rounds": rng.choice([1, 5, 12, 1000, 1000, 1000]),
        }
        self.late: list[tuple[int, Action]] = []
        self.written = 0
        self.ramp = rng.choice([(0, 0), (0, 0), (1, 3), (9, 20)])

    def next(self, m: RunModel) -> Action:
        rng = self.rng
        self.written += 1
        if m.closed:
            return ("create",) if rng.random() < 0.5 else rng.choice([self._reclaim(m), ("tick", 0), ("wait", 1)])
        while self.late and rng.random() < 0.5:
            at, action = self.late[0]
            if at > self.written:
                break
            self.late.pop(0)
            return action
        kind = rng.random()
        action = self._helpful(m) if kind < 0.72 else self._any(m)
        fate = rng.random()
        if fate < 0.04:  # lost; who sent it believes otherwise
            return self._any(m)
        if fate < 0.1:  # late, or a second time
            self.late.append((self.written + rng.randrange(1, 30), action))
            self.late.sort(key=lambda waiting: waiting[0])
            return action if fate < 0.07 else self._any(m)
        return action

    # ------------------------------------------------------------------ what would bring the run on

    def _helpful(self, m: RunModel) -> Action:
        rng = self.rng
        gathering = m.stage in (Phase.WAITING_FOR_MEMBERS, Phase.WARMUP) and rng.random() < 0.9
        wants = gathering and sum(member.live for member in m.members.values()) < min(self.crew, m.limits.max_members)
        if m.due_slot is not None and m.slot >= m.due_slot and rng.random() < 0.6 and not wants:
            return ("tick", rng.randrange(PEOPLE))
        people = {slot: number for number in range(PEOPLE) if (slot := m.find(self._wallet(number))) is not None}
        statuses = {slot: m.members[slot].status for slot in people}
        outside = [n for n in range(PEOPLE) if n not in [people[s] for s in people if m.members[s].live]]
        choices = self._credit(m, people)
        if m.phase is Phase.FINISHED:
            choices += [("close_run", OWNER), ("wait", 3_240_000)]
            return rng.choice(choices)
        if m.join_authority and (ANYONE not in self._grantees(m) and rng.random() < 0.3):
            return ("authorize", AUTHORITY, ANYONE)
        waiting = [slot for slot, status in statuses.items() if status in (MemberStatus.PENDING, MemberStatus.DESYNCED)]
        unready = [people[slot] for slot in waiting if not m.members[slot].ready]
        active = [slot for slot, status in statuses.items() if status is MemberStatus.ACTIVE]
        if unready and m.stage is not Phase.WAITING_FOR_MEMBERS:
            choices.append(("ready", rng.choice(unready), m.checkpoint_root[0]))
        if outside and (wants or (m.phase is Phase.WAITING_FOR_MEMBERS and rng.random() < 0.2)):
            choices.append(self._join(m, rng.choice(outside)))
        if m.phase is Phase.ROUND_TRAIN:
            entry = m.current()
            slots = [slot for slot in active if slot in entry.expected and slot not in entry.commitments]
            if slots:
                choices += [self._commit(m, people[slot], slot) for slot in rng.sample(slots, min(3, len(slots)))]
        for entry in m.open_rounds():
            speaking = [slot for slot in people if statuses[slot] in (MemberStatus.ACTIVE, MemberStatus.DESYNCED)]
            silent = [slot for slot in entry.witnesses if slot not in entry.attestations and slot in speaking]
            if entry.closed and silent:
                named = [slot for slot in entry.commitments if rng.random() < self.care]
                choices += [("attest", people[rng.choice(silent)], entry.round, tuple(named))] * 3
        if m.phase is Phase.COOLDOWN:
            voters = [people[slot] for slot in active if slot not in m.votes]
            if voters:
                choices += [("checkpoint", rng.choice(voters), m.final_rounds, 40 + m.final_rounds % 100)] * 2
        if m.phase is Phase.PAUSED and rng.random() < 0.4:
            choices.append(("resume", OWNER))
        if choices and rng.random() < 0.93:
            return rng.choice(choices)
        if m.due_slot is not None and m.due_slot > m.slot and rng.random() < 0.5:
            return ("until", rng.choice([-1, 0, 0, 0, 1]))
        if m.due_slot is not None:
            return ("tick", rng.randrange(PEOPLE))
        return ("resume", OWNER) if m.phase is Phase.PAUSED else self._join(m, rng.choice(outside or [0]))

    def _credit(self, m: RunModel, people: dict[int, int]) -> list[Action]:
        """What has to do with credit and rewards: worth doing now and then."""
        rng = self.rng
        choices: list[Action] = []
        if rng.random() < 0.7:
            return choices
        for slot, member in m.members.items():
            if member.credit and not member.live and not m.in_flight(slot):
                choices.append(("archive", slot))
            if member.reward > member.reward_claimed:
                choices.append(("claim", people[slot], None) if m.vault else ("fund", rng.choice([1, 10**5])))
        for receipt in m.receipts.values():
            owner = self._number(receipt.wallet)
            index = rng.randrange(10)
            choices += [("restore", owner, index), ("claim", owner, index)]
        return choices

    @staticmethod
    def _wallet(number: int) -> Pubkey:
        return Play.wallets[number]

    @staticmethod
    def _number(wallet: Pubkey) -> int:
        return Play.wallets.index(wallet)

    def _grantees(self, m: RunModel) -> list[int]:
        return [ANYONE if grant.grantee is None else self._number(grant.grantee) for grant in m.grants.values()]

    def _join(self, m: RunModel, who: int) -> Action:
        rng = self.rng
        node = who if rng.random() < 0.85 else rng.choice([who + 20, rng.randrange(PEOPLE)])
        share = rng.choice([1, 3, 1000, 1000, 1000, 1000]) if rng.random() < 0.95 else rng.choice([0, 1_000_001])
        grantee = rng.choice([*self._grantees(m), None]) if rng.random() < 0.9 else rng.randrange(PEOPLE)
        return ("join", who, node, share, grantee)

    def _commit(self, m: RunModel, who: int, slot: int) -> Action:
        rng, entry = self.rng, m.current()
        most = entry.slices.get(slot, (0, 0))[1] * m.terms.sequence_length
        tokens = rng.choice([most, most, rng.randint(0, most)]) if rng.random() < 0.95 else most + 1
        fingerprint = 7 if rng.random() < 0.9 else rng.choice([8, 9])
        size = m.terms.update_bytes if rng.random() < 0.97 else m.terms.update_bytes + 1
        return ("commit", who, m.round, tokens, fingerprint, size)

    # ------------------------------------------------------------------ anything that anybody might send

    def _any(self, m: RunModel) -> Action:
        rng = self.rng
        who = rng.randrange(PEOPLE)
        by = OWNER if rng.random() < 0.85 else rng.choice([who, AUTHORITY])
        authority = AUTHORITY if rng.random() < 0.9 else who
        number = max(0, m.round + rng.choice([0, 0, 0, -1, -1, -2, 1, 4]))
        writers: list[tuple[float, Callable[[], Action]]] = [
            (6, lambda: self._join(m, who)),
            (4, lambda: ("ready", who, rng.choice([m.checkpoint_root[0], 1, 99]))),
            (3, lambda: ("leave", who)),
            (3, lambda: ("set_share", who, rng.choice([1, 5, 2000, 0, 1_000_000]))),
            (4, lambda: ("commit", who, number, rng.choice([0, 128]), 7, m.terms.update_bytes)),
            (4, lambda: ("attest", who, number, tuple(s for s in range(9) if rng.random() < 0.4))),
            (3, lambda: ("checkpoint", who, rng.choice([m.final_rounds, number]), rng.choice([41, 42]))),
            (5, lambda: ("tick", who)),
            (6, lambda: ("wait", rng.choice([1, 1, 1, 2, 2, 5, 5, 20, 200]))),
            (0.1, lambda: ("wait", 6_480_000)),
            (2, lambda: self._set_config(m, by)),
            (2, lambda: ("set_model", by, rng.choice(MODEL_CHANGES))),
            (1.5, lambda: ("pause", by)),
            (2, lambda: ("resume", by)),
            (0.05, lambda: ("finish", by)),
            (1, lambda: ("close_run", by)),
            (2, lambda: ("kick", by, who)),
            (1.5, lambda: ("ban", by, rng.choice([0, 0, 1, 1, 2]), who, rng.random() < 0.1)),
            (1.5, lambda: self._lift(m, by)),
            (1.5, lambda: ("set_reward_rate", by, rng.choice([0, 10**6, 10**9, 10**10, 10**10 + 1]))),
            (1.5, lambda: ("fund", rng.choice([1, 10**4, 10**7]))),
            (3 if self.private else 0.5, lambda: ("authorize", authority, rng.choice([ANYONE, who, 0]))),
            (
                2 if self.private else 0.3,
                lambda: ("revoke", authority, rng.choice([ANYONE, 0, who]), rng.random() < 0.5),
            ),
            (1, lambda: self._delegate(m, who)),
            (3, lambda: ("archive", rng.choice([*m.members, who]))),
            (2, lambda: ("restore", self._receipt_owner(m, who), rng.randrange(10))),
            (3, lambda: ("claim", self._receipt_owner(m, who), rng.choice([None, None, rng.randrange(10)]))),
            (0.2, lambda: ("migrate", by)),
            (0.2, lambda: ("create",)),
            (1 + 3 * bool(m.stale), lambda: self._reclaim(m)),
        ]
        weights, makers = zip(*writers, strict=True)
        return rng.choices(makers, weights)[0]()

    def _lift(self, m: RunModel, by: int) -> Action:
        keys = [(kind, who) for who in range(PEOPLE) for kind in (0, 1)]
        known = {Play.wallets[who]: (0, who) for who in range(PEOPLE)} | {
            Play.nodes[who]: (1, who) for who in range(PEOPLE)
        }
        kind, who = self.rng.choice([known[key] for key in m.banned] or keys)
        return ("ban", by, kind, who, True)

    def _reclaim(self, m: RunModel) -> Action:
        rng = self.rng
        kind = rng.randrange(2)
        right = AUTHORITY if kind else PAYER
        return ("reclaim", right if rng.random() < 0.9 else OWNER, kind, rng.choice([ANYONE, rng.randrange(PEOPLE)]))

    def _delegate(self, m: RunModel, who: int) -> Action:
        rng = self.rng
        grantee = rng.choice([*self._grantees(m), who])
        signer = grantee if rng.random() < 0.9 and grantee != ANYONE else who
        return ("delegate", signer, grantee, rng.randrange(PEOPLE), rng.random() < 0.3)

    def _receipt_owner(self, m: RunModel, who: int) -> int:
        owners = [n for n in range(PEOPLE) if any(r.wallet == self._wallet(n) for r in m.receipts.values())]
        return self.rng.choice(owners) if owners and self.rng.random() < 0.6 else who

    def _set_config(self, m: RunModel, by: int) -> Action:
        rng = self.rng
        change = rng.choice(
            [
                ("batch", rng.choice([3, 11, 50, 0])),
                ("overlap", rng.choice([0, 1, 2])),
                ("max_missed", rng.choice([1, 4, 0])),
                ("rounds_per_epoch", rng.choice([1, 3, 10])),
                ("total_rounds", rng.choice([1, 10, 100, 100])),
                ("max_share", rng.choice([0, 100, 1_000_001])),
                ("max_members", rng.choice([4, 9, 256, 257])),
                ("min_members", rng.choice([1, 2, 3])),
                ("init_min_members", rng.choice([1, 3, 5])),
                ("witnesses", rng.choice([0, 1, 2, 33])),
                ("warmup_time", rng.choice([1, 30, 0])),
                ("round_witness_time", rng.choice([1, 30])),
                ("join_grace", rng.choice([0, 2**32 - 1])),
            ]
        )
        private = self.private if rng.random() < 0.9 else not self.private
        return ("set_config", by, (change,), private)


MODEL_CHANGES: list[tuple[tuple[str, int], ...]] = [
    (),
    (("model_root", 1),),
    (("model_root", 77),),
    (("samples", 5000),),
    (("samples", 100_000),),
    (("update_bytes", 4999),),
    (("topk", 64),),
    (("sequence_length", 64),),
    (("ramp_batch", 2), ("ramp_rounds", 4)),
    (("ramp_batch", 0), ("ramp_rounds", 0)),
    (("ramp_batch", 0), ("ramp_rounds", 7)),
]


class Player:
    """Plays schedules, and cuts down those that fail."""

    def __init__(self, program: bytes | None = None, seconds_to_cut: float = 30) -> None:
        self.program, self.played, self.seconds_to_cut = program, 0, seconds_to_cut
        self.chain = Chain(program=program)
        self.ended: Counter[str] = Counter()
        self.happened: Counter[str] = Counter()
        self.actions = 0

    def schedule(self, seed: int | str, steps: int = STEPS, log: Callable[[str], None] | None = None) -> None:
        """Raises Failure."""
        self.played += 1
        if self.played % CHAIN_LIFE == 0:
            self.chain = Chain(program=self.program)
        author = Author(random.Random(f"schedule {seed}"))
        play = Play(self.chain, author.limits, author.private, author.ramp)
        actions: list[Action] = []
        try:
            for _ in range(steps):
                actions.append(author.next(play.model))
                ended = play.do(actions[-1])
                name = "ok" if ended is None else getattr(ended, "name", str(ended))
                self.ended[f"{actions[-1][0]}: {name}"] += 1
                if log:
                    log(
                        f"slot {play.chain.slot} round {play.model.round} {play.model.phase.name}: {actions[-1]} {name}"
                    )
            self.actions += len(actions)
            self._count(play.model)
            play.wind_up()
        except (Mismatch, ProgramFault) as problem:
            short, why = self._cut(author, actions, problem)
            text = "\n".join(f"  {action}," for action in short)
            raise Failure(
                f"seed {seed}, after {len(actions)} actions: {problem}\n"
                f"cut down to {len(short)}: {why}\n"
                f"Play(chain, {author.limits}, private={author.private}, ramp={author.ramp}), then\n{text}\n"
                f"replay: python tests/coordinator/program/schedules.py --replay {seed}"
            ) from None

    def _count(self, m: RunModel) -> None:
        """What was reached at all, of a run and of the last rounds that it keeps: what the schedules are worth."""
        self.happened["rounds"] += m.round
        self.happened["void rounds"] += sum(not members for members in m.ever_included.values())
        for member in m.members.values():
            self.happened[f"members {member.status.name}"] += 1
        for entry in m.ring.values():
            self.happened["rounds kept"] += 1
            self.happened["of several ranges"] += len(entry.ranges) > 2
            self.happened["with somebody left out"] += bool(entry.included and entry.eligible - entry.included)
            self.happened["with other fingerprints"] += len({c.fingerprint for c in entry.commitments.values()}) > 1
            self.happened["with four or more included"] += len(entry.included) >= 4

    def _fails(self, author: Author, actions: list[Action]) -> str | None:
        play = Play(self.chain, author.limits, author.private, author.ramp)
        try:
            for action in actions:
                play.do(action)
            play.wind_up()
        except (Mismatch, ProgramFault) as problem:
            return str(problem)
        return None

    def _cut(self, author: Author, actions: list[Action], problem: Exception) -> tuple[list[Action], str]:
        """Leave out whatever the failure, or another one, does not need: halves first, then single actions."""
        why, size, until = str(problem), len(actions) // 2, time.monotonic() + self.seconds_to_cut
        while size and time.monotonic() < until:
            at = 0
            while at < len(actions) and time.monotonic() < until:
                tried = actions[:at] + actions[at + size :]
                found = self._fails(author, tried)
                if found is None:
                    at += size
                else:
                    actions, why = tried, found
            size //= 2
        return actions, why


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schedules", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=SEED, help="of the first one; the next has the next number")
    parser.add_argument("--replay", metavar="SEED")
    options = parser.parse_args()
    player, started = Player(), time.monotonic()
    if options.replay:
        player.schedule(options.replay, log=print)
        return 0
    for seed in range(options.seed, options.seed + options.schedules):
        player.schedule(seed)
    elapsed = time.monotonic() - started
    print(f"{options.schedules} schedules, {player.actions} actions in {elapsed:.0f} s, seeds from {options.seed}:")
    print(f"program and model agree; {dict(player.happened)}")
    for name, count in sorted(player.ended.items()):
        print(f"  {name} {count}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
