"""Instructions as the parties of a run would send them in some scene: what the fuzzing starts from."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from program_scenes import AUTHORITY, Scene
from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey

from coordinator import instructions as ix
from coordinator.layout import RECEIPT_SIZE


def fresh_key(size: int) -> Pubkey:
    """Where the world has an empty account of the program of this size."""
    return Pubkey(b"size" + size.to_bytes(28, "big"))


class View:
    """What someone who reads the chain knows at the start of a case: enough to build instructions that succeed."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.scene, self.rng, self.run = scene, rng, scene.run
        self.place = (scene.run.addresses, scene.run.chain.program)

    def person(self) -> Pubkey:
        return self.run.wallet(self.rng.randrange(self.scene.people))

    def owner(self) -> Pubkey:
        return self.run.owner if self.rng.random() < 0.95 else self.person()

    def grant(self) -> tuple[Pubkey, int | None]:
        """One of the run's, or the place of one that could be."""
        last = self.scene.people - 1
        empty = self.run.grant(self.run.wallet(last), AUTHORITY)
        return self.rng.choice([*self.scene.records.grants, (empty, last)])

    def receipt(self) -> tuple[Pubkey, int] | None:
        return self.rng.choice([*self.scene.records.receipts, None])

    def round(self) -> int:
        if self.rng.random() < 0.8:
            return self.scene.header.round
        return max(0, self.scene.header.round + self.rng.choice((-2, -1, 1, 4)))


def _join(v: View) -> Instruction:
    new = v.rng.choice([v.rng.randrange(v.scene.people), v.scene.people - 1])
    grants = {grantee: address for address, grantee in v.scene.records.grants}
    grant = grants.get(new, grants.get(None)) if v.rng.random() < 0.9 else v.grant()[0]
    return ix.join(*v.place, v.run.wallet(new), v.run.node(new), v.rng.choice([1, 1000, 1_000_000]), grant)


def _ready(v: View) -> Instruction:
    return ix.ready(*v.place, v.person(), v.scene.state.checkpoint_root)


def _commit(v: View) -> Instruction:
    tokens, fingerprint = v.rng.choice([0, 1, 100]), v.rng.choice([7, 7, 7, 8])
    size = v.scene.state.terms.update_bytes
    return ix.commit(*v.place, v.person(), v.round(), v.rng.randbytes(32), size, tokens, fingerprint)


def _attest(v: View) -> Instruction:
    closed = [entry for entry in v.scene.rounds.values() if entry.closed]
    if not closed:
        return ix.attest(*v.place, v.person(), v.round(), [])
    entry = v.rng.choice(closed)
    witness = v.rng.choice([*entry.witnesses, v.rng.randrange(v.scene.people)])
    named = [slot for slot in entry.commitments if v.rng.random() < 0.9]
    return ix.attest(*v.place, v.run.wallet(witness), entry.round, named)


def _tick(v: View) -> Instruction:
    return ix.tick(*v.place, v.person())


def _checkpoint(v: View) -> Instruction:
    root = v.rng.choice([b"\x55", b"\x66"]) * 32
    return ix.checkpoint(*v.place, v.person(), v.scene.state.final_rounds, root)


def _leave(v: View) -> Instruction:
    return ix.leave(*v.place, v.person())


def _init_run(v: View) -> Instruction:
    chosen = v.scene.spare if v.rng.random() < 0.8 else v.run
    program = v.run.chain.program
    return ix.init_run(program, chosen.owner, chosen.run_id, chosen.limits, chosen.terms, chosen.join_authority)


def _set_share(v: View) -> Instruction:
    return ix.set_share(*v.place, v.person(), v.rng.choice([1, 500, 1_000_000]))


def _set_config(v: View) -> Instruction:
    changes: dict[str, int] = v.rng.choice(
        [{}, {"batch": 3}, {"overlap": 0}, {"witnesses": 1}, {"max_share": 5}, {"total_rounds": 1}, {"warmup_time": 1}]
    )
    authority = v.rng.choice([v.scene.state.join_authority, None, AUTHORITY])
    return ix.set_config(*v.place, v.owner(), replace(v.scene.state.limits, **changes), authority)


def _set_model(v: View) -> Instruction:
    changes: dict[str, Any] = v.rng.choice(
        [{}, {"model_root": b"\x77" * 32}, {"samples": 5}, {"ramp_batch": 9, "ramp_rounds": 5}]
    )
    return ix.set_model(*v.place, v.owner(), replace(v.scene.state.terms, **changes))


def _kick(v: View) -> Instruction:
    return ix.kick(*v.place, v.owner(), v.person())


def _ban(v: View) -> Instruction:
    number = v.rng.randrange(v.scene.people)
    key = v.rng.choice([v.run.wallet(number), v.run.node(number), v.run.node(100)])
    return ix.ban(*v.place, v.owner(), key, lift=v.rng.random() < 0.3)


def _set_reward_rate(v: View) -> Instruction:
    return ix.set_reward_rate(*v.place, v.owner(), v.rng.choice([0, 1, 10**10]))


def _authorize(v: View) -> Instruction:
    last = v.run.wallet(v.scene.people - 1)
    _, instruction = ix.authorize(*v.place, v.scene.state.join_authority or AUTHORITY, last, lambda size: size)
    return instruction


def _revoke(v: View) -> Instruction:
    return ix.revoke(*v.place, AUTHORITY, v.grant()[0], eject=v.rng.random() < 0.5)


def _delegate(v: View) -> Instruction:
    grant, grantee = v.grant()
    signer = v.person() if grantee is None else v.run.wallet(grantee)
    key = v.run.wallet(v.rng.choice([2, 100, v.rng.randrange(v.scene.people)]))
    return ix.delegate(*v.place, signer, grant, key, remove=v.rng.random() < 0.4)


def _archive(v: View) -> Instruction:
    gone = [slot for slot, member in v.scene.members.items() if not member.live]
    slot = v.rng.choice([*gone, *gone, v.rng.randrange(256)])
    payer = v.person()
    _, instruction = ix.archive(*v.place, payer, slot, payer, 0, lambda size: size)
    metas = [*instruction.accounts[:4], AccountMeta(fresh_key(RECEIPT_SIZE), is_signer=False, is_writable=True)]
    return Instruction(instruction.program_id, instruction.data, metas)


def _restore(v: View) -> Instruction:
    receipt, member = v.receipt() or (fresh_key(RECEIPT_SIZE), 0)
    return ix.restore(*v.place, v.run.wallet(member), receipt, v.run.chain.payer.pubkey())


def _reclaim(v: View) -> Instruction:
    closed = v.scene.records.closed
    if closed and v.rng.random() < 0.9:
        record, heir = v.rng.choice(closed)
        return ix.reclaim(v.run.addresses.run, v.run.chain.program, heir, record)
    return ix.reclaim(v.run.addresses.run, v.run.chain.program, AUTHORITY, v.grant()[0])


def _claim(v: View) -> Instruction:
    receipt = v.receipt()
    if receipt is None:
        owed = [member.wallet for member in v.scene.members.values() if member.reward > member.reward_claimed]
        return ix.claim(*v.place, v.rng.choice(owed or [v.person()]))
    return ix.claim(*v.place, v.run.wallet(receipt[1]), receipt[0])


BUILDERS: dict[str, Callable[[View], Instruction]] = {
    "join": _join,
    "ready": _ready,
    "commit": _commit,
    "attest": _attest,
    "tick": _tick,
    "checkpoint": _checkpoint,
    "leave": _leave,
    "init_run": _init_run,
    "migrate": lambda v: ix.migrate(*v.place, v.owner()),
    "set_config": _set_config,
    "set_model": _set_model,
    "pause": lambda v: ix.pause(*v.place, v.owner()),
    "resume": lambda v: ix.resume(*v.place, v.owner()),
    "finish": lambda v: ix.finish(*v.place, v.owner()),
    "close_run": lambda v: ix.close_run(*v.place, v.owner()),
    "kick": _kick,
    "ban": _ban,
    "set_reward_rate": _set_reward_rate,
    "set_share": _set_share,
    "authorize": _authorize,
    "revoke": _revoke,
    "delegate": _delegate,
    "archive": _archive,
    "restore": _restore,
    "reclaim": _reclaim,
    "claim": _claim,
}
