"""Every error number of the program is reached by the instruction that should give it, and changes no account."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from program_harness import TERMS, Chain, Outcome, RunDriver
from solders.account import Account
from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey

from coordinator import instructions as ix
from coordinator import layout
from coordinator.errors import ErrorCode
from coordinator.state import MemberStatus, Terms

E = ErrorCode
REACHED: set[ErrorCode] = set()


@pytest.fixture(scope="module")
def chain() -> Chain:
    return Chain()


class Names:
    """Distinct run ids on the shared chain."""

    count = 0

    @classmethod
    def fresh(cls) -> str:
        cls.count += 1
        return f"run-{cls.count}"


def new_run(chain: Chain, **limits: int) -> RunDriver:
    return RunDriver(chain, Names.fresh(), **limits)


def waiting(chain: Chain) -> RunDriver:
    run = new_run(chain)
    run.must(run.create())
    for member in range(3):
        run.must(run.join(member))
    return run


def training(chain: Chain, **limits: int) -> RunDriver:
    run = new_run(chain, **limits)
    run.start()
    return run


def refused(run: RunDriver, code: ErrorCode, act: Callable[[], Outcome]) -> None:
    before = run.snapshot()
    outcome = act()
    assert outcome.code == code, f"expected {code.name}, got {outcome}"
    assert run.snapshot() == before
    REACHED.add(code)


def changed(
    instruction: Instruction, *, data: bytes | None = None, accounts: list[AccountMeta] | None = None
) -> Instruction:
    return Instruction(
        instruction.program_id,
        instruction.data if data is None else data,
        instruction.accounts if accounts is None else accounts,
    )


def with_meta(instruction: Instruction, index: int, **flags: object) -> Instruction:
    metas = instruction.accounts
    old = metas[index]
    metas[index] = AccountMeta(
        flags.get("pubkey", old.pubkey),  # type: ignore[arg-type]
        bool(flags.get("signer", old.is_signer)),
        bool(flags.get("writable", old.is_writable)),
    )
    return changed(instruction, accounts=metas)


def every_instruction(run: RunDriver) -> dict[str, Instruction]:
    a, p, w = run.addresses, run.chain.program, run.wallet(0)
    return {
        "join": ix.join(a, p, run.wallet(50), run.node(50)),
        "ready": ix.ready(a, p, w, bytes(32)),
        "commit": ix.commit(a, p, w, 0, bytes(32), 5000, 1, 1),
        "attest": ix.attest(a, p, w, 0, [0]),
        "tick": ix.tick(a, p, w),
        "checkpoint": ix.checkpoint(a, p, w, 0, bytes(32)),
        "leave": ix.leave(a, p, w),
        "set_share": ix.set_share(a, p, w, 5),
        "claim": ix.claim(a, p, w),
        "set_config": ix.set_config(a, p, run.owner, run.limits, None),
        "set_model": ix.set_model(a, p, run.owner, run.terms),
        "pause": ix.pause(a, p, run.owner),
        "resume": ix.resume(a, p, run.owner),
        "finish": ix.finish(a, p, run.owner),
        "close_run": ix.close_run(a, p, run.owner),
        "kick": ix.kick(a, p, run.owner, w),
        "ban": ix.ban(a, p, run.owner, w),
        "set_reward_rate": ix.set_reward_rate(a, p, run.owner, 5),
    }


def test_instruction_data(chain: Chain) -> None:
    run = training(chain)
    send = chain.send
    for name, instruction in every_instruction(run).items():
        longer = changed(instruction, data=instruction.data + b"\0")
        shorter = changed(instruction, data=instruction.data[:-1])
        refused(run, E.BAD_INSTRUCTION_DATA, lambda i=longer: send(i))
        refused(run, E.BAD_INSTRUCTION_DATA, lambda i=shorter: send(i))
        unknown = changed(instruction, data=b"\xff" + instruction.data[1:])
        refused(run, E.UNKNOWN_INSTRUCTION, lambda i=unknown: send(i))
        at = {"commit": 12, "attest": 12, "checkpoint": 12, "join": 12, "set_share": 12, "ban": 44}.get(name)
        if at:
            reserved = changed(instruction, data=instruction.data[:at] + b"\1" + instruction.data[at + 1 :])
            refused(run, E.BAD_INSTRUCTION_DATA, lambda i=reserved: send(i))
    refused(run, E.BAD_INSTRUCTION_DATA, lambda: chain.send(Instruction(chain.program, b"", [])))


@pytest.mark.parametrize(
    "name",
    [
        *("join", "ready", "commit", "attest", "tick", "checkpoint", "leave", "set_share", "claim", "set_config"),
        *("set_model", "pause", "resume", "finish", "close_run", "kick", "ban", "set_reward_rate"),
    ],
)
def test_accounts(chain: Chain, name: str) -> None:
    run, other = training(chain), training(chain)
    instruction = every_instruction(run)[name]
    signers = 2 if name == "join" else 1
    send = chain.send
    refused(run, E.MISSING_ACCOUNTS, lambda: send(changed(instruction, accounts=instruction.accounts[:-1])))
    refused(run, E.MISSING_ACCOUNTS, lambda: send(changed(instruction, accounts=[])))
    for index in range(signers):
        refused(run, E.MISSING_SIGNER, lambda i=index: send(with_meta(instruction, i, signer=False)))
    for index, field in enumerate(("run", "members", "rounds"), start=signers):
        foreign = getattr(other.addresses, field)
        refused(run, E.ACCOUNT_MISMATCH, lambda i=index, f=foreign: send(with_meta(instruction, i, pubkey=f)))
        stranger = run.wallet(0)
        refused(run, E.WRONG_ACCOUNT_OWNER, lambda i=index, s=stranger: send(with_meta(instruction, i, pubkey=s)))
        wrong_kind = run.addresses.members if field != "members" else run.addresses.rounds
        refused(run, E.WRONG_ACCOUNT_SIZE, lambda i=index, k=wrong_kind: send(with_meta(instruction, i, pubkey=k)))
        if instruction.accounts[index].is_writable:
            refused(run, E.ACCOUNT_NOT_WRITABLE, lambda i=index: send(with_meta(instruction, i, writable=False)))
        address = getattr(run.addresses, field)
        for offset, size, code in ((0, 8, E.WRONG_ACCOUNT_TYPE), (8, 4, E.WRONG_ACCOUNT_VERSION)):
            good = run.data(address)[offset : offset + size]
            run.patch(address, offset, bytes([good[0] ^ 1]) + good[1:])
            refused(run, code, lambda: send(instruction))
            run.patch(address, offset, good)


def test_links_stored_in_the_tables_are_checked(chain: Chain) -> None:
    run = training(chain)
    for address, offset in ((run.addresses.members, 16), (run.addresses.rounds, 16)):
        good = run.data(address)[offset : offset + 32]
        run.patch(address, offset, bytes(32))
        refused(run, E.ACCOUNT_MISMATCH, lambda: run.commit(0))
        run.patch(address, offset, good)
    run.must(run.commit(0))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"min_members": 0}, E.BAD_MEMBER_LIMITS),
        ({"min_members": 5}, E.BAD_MEMBER_LIMITS),
        ({"max_members": 3}, E.BAD_MEMBER_LIMITS),
        ({"max_members": 257}, E.BAD_MEMBER_LIMITS),
        ({"witnesses": 4}, E.BAD_WITNESSES),
        ({"witnesses": 33, "min_members": 40, "init_min_members": 40}, E.BAD_WITNESSES),
        ({"overlap": 2}, E.BAD_OVERLAP),
        ({"max_missed": 0}, E.BAD_MAX_MISSED),
        ({"max_missed": 256}, E.BAD_MAX_MISSED),
        ({"warmup_time": 0}, E.BAD_TIMES),
        ({"max_round_train_time": 0}, E.BAD_TIMES),
        ({"round_witness_time": 0}, E.BAD_TIMES),
        ({"cooldown_time": 0}, E.BAD_TIMES),
        ({"adaptive_grace": 1001}, E.BAD_TIMES),
        ({"batch": 2}, E.BAD_BATCH),
        ({"batch": 2**24 + 1}, E.BAD_BATCH),
        ({"rounds_per_epoch": 0}, E.BAD_ROUNDS),
        ({"total_rounds": 0}, E.BAD_ROUNDS),
        ({"total_rounds": 2**31}, E.BAD_ROUNDS),
    ],
)
def test_limits(chain: Chain, change: dict[str, int], code: ErrorCode) -> None:
    run = RunDriver(chain, "limits", **change)
    assert run.create().code == code
    assert chain.svm.get_account(run.addresses.run) is None
    REACHED.add(code)


@pytest.mark.parametrize(
    ("terms", "code"),
    [
        (replace(TERMS, samples=0), E.BAD_DATA_TERMS),
        (replace(TERMS, sequence_length=0), E.BAD_DATA_TERMS),
        (replace(TERMS, sequence_length=2**24 + 1), E.BAD_DATA_TERMS),
        (replace(TERMS, update_bytes=0), E.BAD_UPDATE_TERMS),
        (replace(TERMS, update_bytes=2**40 + 1), E.BAD_UPDATE_TERMS),
        (replace(TERMS, topk=0), E.BAD_UPDATE_TERMS),
        (replace(TERMS, topk=2**16 + 1), E.BAD_UPDATE_TERMS),
        (replace(TERMS, schedule=4), E.BAD_OPTIMIZER_TERMS),
        (replace(TERMS, decay_bits=0x3F800000), E.BAD_OPTIMIZER_TERMS),
        (replace(TERMS, peak_lr_bits=0), E.BAD_OPTIMIZER_TERMS),
        (replace(TERMS, peak_lr_bits=0x7F800000), E.BAD_OPTIMIZER_TERMS),
        (replace(TERMS, final_lr_bits=0x80000001), E.BAD_OPTIMIZER_TERMS),
        (replace(TERMS, weight_decay_bits=0x7FC00000), E.BAD_OPTIMIZER_TERMS),
        (replace(TERMS, clip_norm_bits=0xFF800000), E.BAD_OPTIMIZER_TERMS),
        (replace(TERMS, z_loss_bits=0x7F800000), E.BAD_OPTIMIZER_TERMS),
        (replace(TERMS, ramp_rounds=5), E.BAD_RAMP),
        (replace(TERMS, ramp_batch=5), E.BAD_RAMP),
        (replace(TERMS, ramp_batch=2**24 + 1, ramp_rounds=1), E.BAD_RAMP),
    ],
)
def test_terms(chain: Chain, terms: Terms, code: ErrorCode) -> None:
    run = RunDriver(chain, "terms", terms)
    assert run.create().code == code
    REACHED.add(code)


def init_with(chain: Chain, run: RunDriver, offset: int, new: bytes) -> Outcome:
    """The creating transaction with some bytes of init_run's data (behind the mark) replaced."""
    rent = chain.svm.minimum_balance_for_rent_exemption
    *created, init = ix.create_run_instructions(
        chain.program, run.owner, run.run_id, run.limits, run.terms, rent, chain.payer.pubkey()
    )
    data = bytearray(init.data)
    data[8 + offset : 8 + offset + len(new)] = new
    return chain.send([*created, changed(init, data=bytes(data))])


@pytest.mark.parametrize(
    ("offset", "new", "code"),
    [
        (0, b"\0", E.BAD_RUN_ID),
        (31, b"x", E.BAD_RUN_ID),
        (32, b"\0", E.BAD_RUN_ID),
        (32, b"\x21", E.BAD_RUN_ID),
        (32, b"\x05", E.BAD_RUN_ID),
        (33, b"\1", E.BAD_INSTRUCTION_DATA),
        (40 + layout.LIMITS.offsets["max_share"], b"\1\2\3\4", E.BAD_SHARE),
        (104 + layout.TERMS.offsets["window"], b"\x09", E.BAD_OPTIMIZER_TERMS),
        (104 + layout.TERMS.offsets["lookahead"], b"\2", E.BAD_OPTIMIZER_TERMS),
        (104 + layout.TERMS.offsets["clip_votes"], b"\2", E.BAD_OPTIMIZER_TERMS),
        (104 + layout.TERMS.offsets["model_source"] + 63, b"x", E.BAD_SOURCE),
        (104 + layout.TERMS.offsets["data_source"] + 20, b"x", E.BAD_SOURCE),
        (416 + layout.COURSE.offsets["reserved"], b"\1", E.BAD_INSTRUCTION_DATA),
        (0, b"another", E.WRONG_ADDRESS),
    ],
)
def test_init_data(chain: Chain, offset: int, new: bytes, code: ErrorCode) -> None:
    run = RunDriver(chain, "init-data"[:7])
    assert init_with(chain, run, offset, new).code == code
    REACHED.add(code)


def test_init_accounts(chain: Chain) -> None:
    run = new_run(chain)
    rent = chain.svm.minimum_balance_for_rent_exemption
    *created, init = ix.create_run_instructions(
        chain.program, run.owner, run.run_id, run.limits, run.terms, rent, chain.payer.pubkey()
    )
    assert chain.send(init).code == E.WRONG_ACCOUNT_OWNER, "the accounts must exist and be the program's"
    assert chain.send([*created, changed(init, accounts=init.accounts[:3])]).code == E.MISSING_ACCOUNTS
    for index in (1, 2, 3):
        assert chain.send([*created[: index - 1], *created[index:], init]).code == E.WRONG_ACCOUNT_OWNER
    swapped = [init.accounts[0], init.accounts[2], init.accounts[1], init.accounts[3]]
    assert chain.send([*created, changed(init, accounts=swapped)]).code == E.WRONG_ACCOUNT_SIZE
    run.must(chain.send([*created, init]))
    refused(run, E.ALREADY_INITIALIZED, lambda: chain.send(init))
    # another owner cannot pass this owner's accounts off as its own
    thief = new_run(chain)
    for address, size in zip(
        (thief.addresses.run, thief.addresses.members, thief.addresses.rounds),
        (layout.RUN_SIZE, layout.MEMBERS_SIZE, layout.ROUNDS_SIZE),
        strict=True,
    ):
        chain.svm.set_account(address, Account(rent(size), bytes(size), chain.program, False, 0))
    genuine = ix.init_run(chain.program, thief.owner, thief.run_id, thief.limits, thief.terms)
    refused(thief, E.MISSING_SIGNER, lambda: chain.send(with_meta(genuine, 0, signer=False)))
    refused(thief, E.WRONG_ADDRESS, lambda: chain.send(with_meta(genuine, 0, pubkey=thief.wallet(3))))
    for index in (1, 2, 3):
        refused(thief, E.ACCOUNT_NOT_WRITABLE, lambda i=index: chain.send(with_meta(genuine, i, writable=False)))
    thief.must(chain.send(genuine))


def test_the_runtime_refuses_accounts_that_are_not_rent_exempt(chain: Chain) -> None:
    run = new_run(chain)
    full = chain.svm.minimum_balance_for_rent_exemption
    short = ix.create_run_instructions(
        chain.program, run.owner, run.run_id, run.limits, run.terms, lambda s: full(s) - 1, chain.payer.pubkey()
    )
    outcome = chain.send(short)
    assert not outcome.ok
    assert "InsufficientFundsForRent" in str(outcome.other)


def test_join(chain: Chain) -> None:
    run = waiting(chain)
    refused(run, E.ALREADY_A_MEMBER, lambda: run.join(1))
    refused(run, E.NODE_KEY_IN_USE, lambda: run.join(9, node=1))
    refused(run, E.BAD_SHARE, lambda: run.join(9, share=0))
    refused(run, E.BAD_SHARE, lambda: run.join(9, share=1_000_001))
    run.must(run.ban(run.wallet(2)))
    run.must(run.ban(run.node(8)))
    refused(run, E.BANNED, lambda: run.join(2, node=9))
    refused(run, E.BANNED, lambda: run.join(9, node=8))
    run.must(run.join(9))
    run.must(run.join(9, node=10))
    assert run.members[3].node_key == bytes(run.node(10)), "a live member goes on under its new node key"
    capped = new_run(chain, max_share=2000)
    capped.must(capped.create())
    refused(capped, E.BAD_SHARE, lambda: capped.join(1, share=2001))
    capped.must(capped.join(1, share=2000))
    refused(capped, E.BAD_SHARE, lambda: capped.set_share(1, 2001))


def test_join_by_grant(chain: Chain) -> None:
    authority = RunDriver.wallet(700)
    chain.svm.airdrop(authority, 10**10)
    run = RunDriver(chain, Names.fresh(), join_authority=authority)
    run.must(run.create())
    refused(run, E.NOT_PERMISSIONLESS, lambda: run.join(1))
    refused(run, E.NOT_AUTHORITY, lambda: run.authorize(run.wallet(1), run.owner))
    mine, members = run.grant(run.wallet(1)), run.addresses.members
    refused(run, E.WRONG_ACCOUNT_OWNER, lambda: run.join(1, grant=mine))
    refused(run, E.WRONG_ACCOUNT_SIZE, lambda: run.join(1, grant=members))
    run.must(run.authorize(run.wallet(1)))
    create, grant_it = ix.authorize(run.addresses, chain.program, authority, run.wallet(1), lambda size: 0)
    del create
    refused(run, E.ALREADY_INITIALIZED, lambda: chain.send(grant_it))
    refused(run, E.MISSING_ACCOUNTS, lambda: chain.send(changed(grant_it, accounts=grant_it.accounts[:-1])))
    refused(run, E.NOT_AUTHORIZED, lambda: run.join(2, grant=mine))
    run.must(run.join(1, grant=mine))

    def delegate(key: Pubkey, by: int = 1, *, remove: bool = False) -> Outcome:
        return chain.send(ix.delegate(run.addresses, chain.program, run.wallet(by), mine, key, remove=remove))

    refused(run, E.NOT_THE_GRANTEE, lambda: delegate(run.wallet(2), by=2))
    refused(run, E.BAD_KEY, lambda: delegate(Pubkey.default()))
    refused(run, E.NOT_A_DELEGATE, lambda: delegate(run.wallet(2), remove=True))
    run.must(delegate(run.wallet(2)))
    refused(run, E.ALREADY_A_DELEGATE, lambda: delegate(run.wallet(2)))
    run.must(run.join(2, grant=mine))
    for index in range(31):
        run.must(delegate(run.wallet(800 + index)))
    refused(run, E.DELEGATES_FULL, lambda: delegate(run.wallet(900)))
    run.must(delegate(run.wallet(2), remove=True))
    # a delegate that was removed is still a member: 33 members come by one grant, whoever its delegates are
    for index in range(31):
        run.must(run.join(800 + index, grant=mine))
    run.must(delegate(run.wallet(900)))
    refused(run, E.GRANT_FULL, lambda: run.join(900, grant=mine))

    def revoke(by: Pubkey, **options: bool) -> Outcome:
        return chain.send(ix.revoke(run.addresses, chain.program, by, mine, **options))

    refused(run, E.NOT_AUTHORITY, lambda: revoke(run.wallet(1)))
    other = RunDriver(chain, Names.fresh(), join_authority=authority)
    other.must(other.create())
    refused(other, E.ACCOUNT_MISMATCH, lambda: other.join(1, grant=mine))
    run.must(run.ban(run.wallet(1)))
    refused(run, E.BANNED, lambda: run.join(801, grant=mine))
    run.must(run.by_owner(ix.set_config, run.run.limits, run.owner))
    run.must(run.ban(run.wallet(1), lift=True))
    refused(run, E.NOT_AUTHORIZED, lambda: run.join(801, grant=mine))
    refused(run, E.NOT_AUTHORITY, lambda: revoke(authority, eject=True))
    run.must(revoke(authority))


def test_bans(chain: Chain) -> None:
    run = waiting(chain)
    key = run.wallet(50)
    refused(run, E.BAD_KEY, lambda: run.ban(Pubkey.default()))
    refused(run, E.NOT_BANNED, lambda: run.ban(key, lift=True))
    run.must(run.ban(key))
    refused(run, E.ALREADY_BANNED, lambda: run.ban(key))
    for index in range(63):
        run.must(run.ban(run.wallet(100 + index)))
    refused(run, E.BAN_LIST_FULL, lambda: run.ban(run.wallet(1)))
    refused(run, E.NOT_A_MEMBER, lambda: run.kick(50))
    run.must(run.kick(1))
    refused(run, E.MEMBER_NOT_ACTIVE, lambda: run.kick(1))


def test_owner(chain: Chain) -> None:
    run = training(chain)
    stranger = run.wallet(0)
    for build, arguments in (
        (ix.pause, ()),
        (ix.resume, ()),
        (ix.finish, ()),
        (ix.close_run, ()),
        (ix.kick, (run.wallet(1),)),
        (ix.ban, (run.wallet(1),)),
        (ix.set_reward_rate, (5,)),
        (ix.set_config, (run.limits, None)),
        (ix.set_model, (run.terms,)),
    ):
        instruction = build(run.addresses, chain.program, stranger, *arguments)
        refused(run, E.NOT_OWNER, lambda i=instruction: chain.send(i))
    refused(run, E.NOT_PAUSED, run.resume)
    refused(run, E.WRONG_PHASE, lambda: run.by_owner(ix.set_model, run.terms))
    refused(run, E.NOT_FINISHED, lambda: run.by_owner(ix.close_run))
    refused(run, E.BAD_REWARD_RATE, lambda: run.by_owner(ix.set_reward_rate, 10**10 + 1))
    refused(run, E.BAD_BATCH, lambda: run.set_config(batch=1))
    refused(run, E.WRONG_ACCOUNT_VERSION, lambda: run.by_owner(ix.migrate))
    run.must(run.pause())
    refused(run, E.ALREADY_REQUESTED, run.pause)
    run.must(run.finish())
    refused(run, E.ALREADY_REQUESTED, run.finish)
    refused(run, E.ALREADY_REQUESTED, run.resume)


def test_credit_instructions(chain: Chain) -> None:
    run = training(chain, overlap=0, rounds_per_epoch=1, total_rounds=1)
    run.must(run.by_owner(ix.set_reward_rate, 10**9))
    refused(run, E.NOTHING_TO_CLAIM, lambda: run.claim(0))
    refused(run, E.NOT_A_MEMBER, lambda: run.claim(77))
    refused(run, E.NOTHING_TO_ARCHIVE, lambda: run.archive(9)[0])
    run.train(range(4))
    run.must(run.leave(3))
    refused(run, E.SLOT_IN_USE, lambda: run.archive(3)[0])
    refused(run, E.SLOT_IN_USE, lambda: run.archive(0)[0])
    run.attest_all(0, [0, 1, 2], range(4))
    run.tick_when_due()
    refused(run, E.REWARDS_UNFUNDED, lambda: run.claim(0))
    for wallet in (0, 3):
        chain.svm.airdrop(run.wallet(wallet), 10**9)
    outcome, receipt = run.archive(3)
    run.must(outcome)
    refused(run, E.WRONG_RECEIPT, lambda: run.restore(0, receipt))
    refused(run, E.WRONG_RECEIPT, lambda: run.claim(0, receipt))
    refused(run, E.NOT_A_MEMBER, lambda: run.restore(3, receipt))
    instruction = ix.archive(run.addresses, chain.program, run.owner, 2, run.wallet(2), 1, lambda size: 0)[1]
    run.must(run.leave(2))
    refused(run, E.MISSING_ACCOUNTS, lambda: chain.send(changed(instruction, accounts=instruction.accounts[:-1])))
    run.tick_when_due()
    refused(run, E.REWARDS_OWED, lambda: run.by_owner(ix.close_run))
    payer = chain.payer.pubkey()
    reclaim = ix.reclaim(run.addresses.run, chain.program, payer, receipt)
    refused(run, E.NOT_CLOSED, lambda: chain.send(reclaim))
    refused(run, E.MISSING_ACCOUNTS, lambda: chain.send(changed(reclaim, accounts=reclaim.accounts[:2])))
    refused(run, E.MISSING_SIGNER, lambda: chain.send(with_meta(reclaim, 0, signer=False, pubkey=run.wallet(5))))
    refused(run, E.ACCOUNT_MISMATCH, lambda: chain.send(with_meta(reclaim, 1, pubkey=run.wallet(5))))
    refused(run, E.WRONG_ACCOUNT_TYPE, lambda: chain.send(with_meta(reclaim, 2, pubkey=run.addresses.run)))
    refused(run, E.WRONG_ACCOUNT_OWNER, lambda: chain.send(with_meta(reclaim, 2, pubkey=run.wallet(0))))
    refused(run, E.BAD_INSTRUCTION_DATA, lambda: chain.send(changed(reclaim, data=reclaim.data + b"x")))


def test_run_full(chain: Chain) -> None:
    run = new_run(chain, max_members=4)
    run.must(run.create())
    for member in range(4):
        run.must(run.join(member))
    refused(run, E.RUN_FULL, lambda: run.join(4))
    run.must(run.leave(2))
    run.must(run.join(4))


def test_slots_with_credit_are_not_given_away(chain: Chain) -> None:
    run = new_run(chain)
    run.must(run.create())
    base, size = layout.MEMBERS.offsets["member"], layout.MEMBER.size
    for slot in range(256):
        record = layout.MEMBER.pack(
            wallet=bytes(run.wallet(1000 + slot)),
            node_key=bytes(run.node(1000 + slot)),
            status=MemberStatus.LEFT,
            credit=0 if slot == 77 else 5,
        )
        run.patch(run.addresses.members, base + slot * size, record)
    run.must(run.join(1))
    assert run.members[77].wallet == run.wallet(1)
    refused(run, E.RUN_FULL, lambda: run.join(2))
    run.must(run.archive(200)[0])
    run.must(run.join(2))
    assert run.members[200].wallet == run.wallet(2), "archived credit makes room"
    run.must(run.join(1003))
    assert (run.members[3].status, run.members[3].credit) == (MemberStatus.PENDING, 5)


def test_ready(chain: Chain) -> None:
    run = waiting(chain)
    refused(run, E.WRONG_PHASE, lambda: run.ready(0))
    run.must(run.join(3))
    run.tick_when_due()
    refused(run, E.NOT_A_MEMBER, lambda: run.ready(9))
    refused(run, E.WRONG_MODEL_ROOT, lambda: run.ready(0, bytes(32)))
    run.must(run.ready(0))
    refused(run, E.ALREADY_READY, lambda: run.ready(0))
    run.must(run.leave(1))
    refused(run, E.MEMBER_NOT_ACTIVE, lambda: run.ready(1))
    refused(run, E.MEMBER_NOT_ACTIVE, lambda: run.leave(1))
    refused(run, E.NOT_A_MEMBER, lambda: run.leave(9))
    active = training(chain)
    refused(active, E.MEMBER_NOT_ACTIVE, lambda: active.ready(0))


def test_commit(chain: Chain) -> None:
    run = training(chain)
    refused(run, E.WRONG_ROUND, lambda: run.commit(0, 1))
    refused(run, E.NOT_A_MEMBER, lambda: run.commit(9))
    refused(run, E.WRONG_LENGTH, lambda: run.commit(0, length=4999))
    limit = 16 * run.terms.sequence_length
    refused(run, E.TOO_MANY_TOKENS, lambda: run.commit(0, tokens=limit + 1))
    refused(run, E.TOO_MANY_TOKENS, lambda: run.commit(0, tokens=2**64 - 1))
    run.must(run.commit(0, tokens=limit))
    refused(run, E.ALREADY_COMMITTED, lambda: run.commit(0))
    run.must(run.leave(1))
    refused(run, E.MEMBER_NOT_ACTIVE, lambda: run.commit(1))
    run.must(run.commit(2))
    run.must(run.commit(3))
    run.tick_when_due()
    refused(run, E.WRONG_PHASE, lambda: run.commit(2))
    tiny = new_run(chain, batch=3)
    tiny.start()
    idle = next(slot for slot, (_, count) in tiny.rounds[0].slices.items() if count == 0)
    refused(tiny, E.NOTHING_ASSIGNED, lambda: tiny.commit(idle))


def test_attest(chain: Chain) -> None:
    run = training(chain, witnesses=2, overlap=0)
    refused(run, E.ROUND_NOT_CLOSED, lambda: run.attest(0, 0, [0]))
    refused(run, E.WRONG_ROUND, lambda: run.attest(0, 4, [0]))
    refused(run, E.WRONG_ROUND, lambda: run.attest(0, 2**32 - 1, [0]))
    run.train([0, 1, 2])
    elected = run.rounds[0].witnesses
    other = next(slot for slot in range(4) if slot not in elected)
    refused(run, E.NOT_A_WITNESS, lambda: run.attest(other, 0, [0]))
    refused(run, E.NOT_A_MEMBER, lambda: run.attest(9, 0, [0]))
    refused(run, E.ATTESTED_UNCOMMITTED, lambda: run.attest(elected[0], 0, [0, 3]))
    refused(run, E.ATTESTED_UNCOMMITTED, lambda: run.attest(elected[0], 0, [255]))
    run.must(run.attest(elected[0], 0, [0, 1, 2]))
    refused(run, E.ALREADY_ATTESTED, lambda: run.attest(elected[0], 0, [0, 1, 2]))
    run.must(run.leave(elected[1]))
    refused(run, E.MEMBER_NOT_ACTIVE, lambda: run.attest(elected[1], 0, [0]))
    run.tick_when_due()
    refused(run, E.ROUND_FINAL, lambda: run.attest(elected[0], 0, [0]))


def test_tick_checkpoint_and_the_end(chain: Chain) -> None:
    run = training(chain, rounds_per_epoch=1, total_rounds=1)
    refused(run, E.NOT_DUE, run.tick)
    refused(run, E.WRONG_PHASE, lambda: run.checkpoint(0, bytes(32)))
    run.train([0, 1, 2])
    run.attest_all(0, range(4), [0, 1, 2])
    run.tick_when_due()
    refused(run, E.NOT_DUE, run.tick)
    refused(run, E.WRONG_ROUND, lambda: run.checkpoint(0, bytes(32), 0))
    refused(run, E.NOT_A_MEMBER, lambda: run.checkpoint(9, bytes(32)))
    run.must(run.checkpoint(0, bytes(32)))
    refused(run, E.ALREADY_VOTED, lambda: run.checkpoint(0, bytes(32)))
    run.must(run.leave(1))
    refused(run, E.MEMBER_NOT_ACTIVE, lambda: run.checkpoint(1, bytes(32)))
    run.tick_when_due()
    for act in (
        run.tick,
        lambda: run.join(9),
        lambda: run.ready(0),
        lambda: run.commit(0),
        lambda: run.checkpoint(0, bytes(32)),
        lambda: run.leave(0),
        run.pause,
        run.resume,
        run.finish,
        lambda: run.kick(0),
        lambda: run.ban(run.wallet(0)),
        lambda: run.set_config(batch=100),
        lambda: run.by_owner(ix.set_model, run.terms),
        lambda: run.by_owner(ix.set_reward_rate, 1),
        lambda: run.set_share(0, 1),
        lambda: run.archive(1)[0],
    ):
        refused(run, E.RUN_FINISHED, act)
    waits = waiting(chain)
    refused(waits, E.NOT_DUE, waits.tick)


def test_every_error_is_reached() -> None:
    """Last in the file: the tests above name them all (they must have run, in one process)."""
    if len(REACHED) < 40:
        pytest.skip("run the whole file")
    assert set(ErrorCode) - REACHED == set()
