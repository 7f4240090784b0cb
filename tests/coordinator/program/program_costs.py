"""Compute units of every instruction with a given number of members, over paths chosen to be the dearest."""

from __future__ import annotations

from program_harness import Chain, Outcome, RunDriver

from coordinator import instructions as ix
from coordinator.state import Phase

BUDGET = 60_000
SMALL_BUDGET = 10_000
SMALL = ("commit", "attest")


def measure(members: int) -> dict[str, int]:
    """The highest compute units seen per instruction; ticks are named by the transition."""
    chain = Chain()
    chain.svm.airdrop(chain.payer.pubkey(), 10**14)
    run = RunDriver(
        chain,
        "cost",
        join_authority=RunDriver.wallet(900),
        init_min_members=members,
        min_members=1 + members // 8,
        batch=max(1000, 2 * members),
        rounds_per_epoch=4,
        total_rounds=7,
        witnesses=min(32, 1 + members // 8),
        max_missed=255,
    )
    worst: dict[str, int] = {}

    def note(name: str, outcome: Outcome) -> None:
        run.must(outcome)
        worst[name] = max(worst.get(name, 0), outcome.units)

    def tick(name: str) -> None:
        due = run.header.due_slot
        chain.set_slot(max(chain.slot, due))
        note(f"tick {name}", run.tick())

    everybody = range(members)
    odd = [member for member in everybody if member % 2]
    note("init_run", run.create())
    note("set_reward_rate", run.by_owner(ix.set_reward_rate, 10**9 + 7))
    authority, strangers = RunDriver.wallet(900), [RunDriver.wallet(901 + index) for index in range(32)]
    for key in (authority, run.wallet(0), run.wallet(1)):
        chain.svm.airdrop(key, 10**11)
    place = (run.addresses, chain.program)
    note("authorize", run.authorize(None))
    anyone = run.grant(None)
    note("authorize", run.authorize(strangers[0]))
    for key in strangers:
        note("delegate", chain.send(ix.delegate(*place, strangers[0], run.grant(strangers[0]), key)))
    for index in range(63):
        note("ban", run.ban(RunDriver.wallet(2000 + index)))
    for member in everybody:
        note("join", run.join(member, grant=anyone))
    tick("WaitingForMembers -> Warmup")
    for member in everybody:
        note("ready", run.ready(member))
    tick("Warmup -> RoundTrain")
    # Round 0 is whole. In round 1 every second member is left out, which tears the batch into the most ranges that come
    # back when round 2 ends; meanwhile everybody asks for another share, and the owner for another configuration. In
    # round 3 a scattered minority is out of sync, and the epoch drains two rounds at once.
    for number, (committers, vouched) in enumerate(
        [(list(everybody), list(everybody)), (list(everybody), odd), (odd, odd), (list(everybody), odd)]
    ):
        for member in committers:
            off = number == 3 and member % 4 == 1
            note("commit", run.commit(member, number, fingerprint=8 if off else 7))
        tick("RoundTrain -> RoundWitness")
        last = number == 3
        if number == 2:
            note("set_config", run.set_config(batch=run.limits.batch + 1))
            for member in everybody:
                note("set_share", run.set_share(member, 1001 + 9 * member))
        for witness in run.rounds[number].witnesses:
            note("attest", run.attest(witness, number, vouched))
        tick("RoundWitness -> Cooldown (two rounds final)" if last else "RoundWitness -> RoundTrain (one round final)")
    root = b"\x05" * 32
    for member in everybody:
        if run.members[member].status.name == "ACTIVE":
            note("checkpoint", run.checkpoint(member, root))
    for member in everybody:
        if run.members[member].status.name == "DESYNCED":
            note("ready", run.ready(member, b"\x01" * 32))
    tick("Cooldown -> RoundTrain")
    note("kick", run.kick(members - 2))
    note("ban", run.ban(run.node(members - 3)))
    note("leave", run.leave(members - 1))
    chain.svm.airdrop(run.addresses.run, 10**12)
    note("claim", run.claim(1))
    note("pause", run.pause())
    while run.run.phase is not Phase.PAUSED:
        chain.set_slot(max(chain.slot, run.header.due_slot))
        note("tick, any other", run.tick())
    outcome, receipt = run.archive(members - 1)
    note("archive", outcome)
    note("join", run.join(members - 1, grant=anyone))
    note("restore", run.restore(members - 1, receipt))
    note("revoke", chain.send(ix.revoke(*place, authority, anyone, eject=True)))
    note("set_model", run.by_owner(ix.set_model, run.terms))
    note("resume", run.resume())
    note("finish", run.finish())
    chain.advance()
    note("tick, any other", run.tick())
    run.chain.advance(6_480_000)
    note("close_run", run.by_owner(ix.close_run))
    return worst


def over_budget(costs: dict[str, int]) -> dict[str, int]:
    """The instructions that break the protocol's budgets."""
    return {name: units for name, units in costs.items() if units >= (SMALL_BUDGET if name in SMALL else BUDGET)}
