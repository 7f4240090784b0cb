"""The program's instructions, as solders `Instruction`s: their accounts, in order, and their data.

Which keys sign: `join` needs the wallet and the node key, `create_run_instructions` the owner (and the payer, if
another), all others the owner, authority, grantee, wallet or payer named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey
from solders.system_program import (
    AllocateWithSeedParams,
    AssignWithSeedParams,
    CreateAccountWithSeedParams,
    TransferParams,
    allocate_with_seed,
    assign_with_seed,
    create_account_with_seed,
    transfer,
)

from coordinator.addresses import RunAddresses, grant_address, grant_seed, receipt_seed, run_addresses, run_seeds
from coordinator.instruction_data import MARKS, fixed, pack, pack_course, pack_limits, pack_terms
from coordinator.layout import GRANT_SIZE, MEMBERS_SIZE, RECEIPT_SIZE, ROUNDS_SIZE, RUN_SIZE
from coordinator.state import Limits, Terms, bitmap_words

DEFAULT_SHARE: Final = 1000


def _metas(addresses: RunAddresses, *signers: Pubkey, written: str, paid: bool = False) -> list[AccountMeta]:
    """Signers first, then run, members, rounds; `written` names the accounts that the instruction writes. `paid`: the
    signer gets lamports."""
    metas = [AccountMeta(key, is_signer=True, is_writable=paid) for key in signers]
    for name in ("run", "members", "rounds"):
        metas.append(AccountMeta(getattr(addresses, name), is_signer=False, is_writable=name in written.split()))
    return metas


def init_run(
    program_id: Pubkey,
    owner: Pubkey,
    run_id: str,
    limits: Limits,
    terms: Terms,
    join_authority: Pubkey | None = None,
) -> Instruction:
    """Turn the three freshly created accounts of `run_id` into a run that waits for members. Signed by the owner.
    `join_authority` None: anyone may join."""
    addresses = run_addresses(program_id, owner, run_id)
    name = run_id.encode("utf-8")
    data = MARKS["init_run"] + name.ljust(32, b"\0") + pack("B7x", "run id", len(name))
    data += pack_limits(limits) + pack_terms(terms) + bytes(join_authority or Pubkey.default()) + pack_course(terms)
    return Instruction(program_id, data, _metas(addresses, owner, written="run members rounds"))


def create_run_instructions(
    program_id: Pubkey,
    owner: Pubkey,
    run_id: str,
    limits: Limits,
    terms: Terms,
    rent: Callable[[int], int],
    payer: Pubkey | None = None,
    join_authority: Pubkey | None = None,
) -> list[Instruction]:
    """Create the run's accounts and initialise them: four instructions that fit in one transaction, in this order.

    `rent(size)` is the lamports that make `size` bytes rent-exempt. `payer` (default: the owner) funds the accounts
    and signs too. Raises ValueError for a value that does not fit its field; the program checks the rest.
    """
    addresses, seeds = run_addresses(program_id, owner, run_id), run_seeds(run_id)
    accounts = (
        (addresses.run, seeds.run, RUN_SIZE),
        (addresses.members, seeds.members, MEMBERS_SIZE),
        (addresses.rounds, seeds.rounds, ROUNDS_SIZE),
    )
    created = [_create(program_id, payer or owner, owner, *account, rent) for account in accounts]
    return [*created, init_run(program_id, owner, run_id, limits, terms, join_authority)]


def join(
    addresses: RunAddresses,
    program_id: Pubkey,
    wallet: Pubkey,
    node_key: Pubkey | bytes,
    share: int = DEFAULT_SHARE,
    grant: Pubkey | None = None,
) -> Instruction:
    """Become a member, in any phase but Finished, or go on under another node key. Signed by the wallet and by the node
    key (Ed25519, 32 bytes). `grant` is needed where the run has a join authority."""
    key = node_key if isinstance(node_key, Pubkey) else Pubkey.from_bytes(fixed(node_key, 32, "node key"))
    metas = _metas(addresses, wallet, key, written="members rounds")
    if grant is not None:
        metas.append(AccountMeta(grant, is_signer=False, is_writable=False))
    return Instruction(program_id, MARKS["join"] + pack("I4x", "share", share), metas)


def ready(addresses: RunAddresses, program_id: Pubkey, wallet: Pubkey, model_root: bytes) -> Instruction:
    """Report the model loaded: in Warmup, or, to join or after a desync, in any phase of training. The root is
    `run.checkpoint_root`."""
    data = MARKS["ready"] + fixed(model_root, 32, "model root")
    return Instruction(program_id, data, _metas(addresses, wallet, written="members rounds"))


def commit(
    addresses: RunAddresses,
    program_id: Pubkey,
    wallet: Pubkey,
    round: int,
    digest: bytes,
    length: int,
    tokens: int,
    fingerprint: int,
) -> Instruction:
    """Commit to the update of `round`: its digest (32 bytes) and length in bytes, tokens trained, 64-bit fingerprint
    of the weights trained on."""
    body = pack("I4x32sQQQ", "commit", round, fixed(digest, 32, "digest"), length, tokens, fingerprint)
    return Instruction(program_id, MARKS["commit"] + body, _metas(addresses, wallet, written="rounds"))


def attest(
    addresses: RunAddresses, program_id: Pubkey, wallet: Pubkey, round: int, members: Iterable[int]
) -> Instruction:
    """As an elected witness of the closed `round`: the members (slots) whose committed updates it holds and has
    validated."""
    body = pack("I4x4Q", "attest", round, *bitmap_words(members))
    return Instruction(program_id, MARKS["attest"] + body, _metas(addresses, wallet, written="rounds"))


def tick(addresses: RunAddresses, program_id: Pubkey, payer: Pubkey) -> Instruction:
    """Make the transition that is due. Anyone may; fails with NOT_DUE and no change when none is."""
    return Instruction(program_id, MARKS["tick"], _metas(addresses, payer, written="run members rounds"))


def checkpoint(addresses: RunAddresses, program_id: Pubkey, wallet: Pubkey, round: int, root: bytes) -> Instruction:
    """In Cooldown: the model root of the weights before `round`, which must be `run.final_rounds`."""
    body = pack("I4x32s", "checkpoint", round, fixed(root, 32, "model root"))
    return Instruction(program_id, MARKS["checkpoint"] + body, _metas(addresses, wallet, written="rounds"))


def leave(addresses: RunAddresses, program_id: Pubkey, wallet: Pubkey) -> Instruction:
    """Leave the run; credit and an update already committed stay."""
    return Instruction(program_id, MARKS["leave"], _metas(addresses, wallet, written="members rounds"))


def set_share(addresses: RunAddresses, program_id: Pubkey, wallet: Pubkey, share: int) -> Instruction:
    """Ask for another share of the batch, from the next round on."""
    data = MARKS["set_share"] + pack("I4x", "share", share)
    return Instruction(program_id, data, _metas(addresses, wallet, written="members"))


# ---------------------------------------------------------------------- the owner's; `owner` signs


def set_config(
    addresses: RunAddresses, program_id: Pubkey, owner: Pubkey, limits: Limits, join_authority: Pubkey | None
) -> Instruction:
    """New limits from the next round on (at once while no round is open), and the join authority at once."""
    data = MARKS["set_config"] + pack_limits(limits) + bytes(join_authority or Pubkey.default())
    return Instruction(program_id, data, _metas(addresses, owner, written="run rounds"))


def set_model(addresses: RunAddresses, program_id: Pubkey, owner: Pubkey, terms: Terms) -> Instruction:
    """In WaitingForMembers or Paused: another model, other data or optimizer settings. All members warm up again."""
    data = MARKS["set_model"] + pack_terms(terms) + pack_course(terms)
    return Instruction(program_id, data, _metas(addresses, owner, written="run members rounds"))


def pause(addresses: RunAddresses, program_id: Pubkey, owner: Pubkey) -> Instruction:
    """Pause the run once the round in flight is final and its checkpoint agreed."""
    return Instruction(program_id, MARKS["pause"], _metas(addresses, owner, written="run rounds"))


def resume(addresses: RunAddresses, program_id: Pubkey, owner: Pubkey) -> Instruction:
    """Let a paused run go on, or take back a pause that has not come about yet."""
    return Instruction(program_id, MARKS["resume"], _metas(addresses, owner, written="run members rounds"))


def finish(addresses: RunAddresses, program_id: Pubkey, owner: Pubkey) -> Instruction:
    """End the run once the round in flight is final and its checkpoint agreed."""
    return Instruction(program_id, MARKS["finish"], _metas(addresses, owner, written="run rounds"))


def close_run(addresses: RunAddresses, program_id: Pubkey, owner: Pubkey) -> Instruction:
    """Delete a finished run; the accounts' lamports go to the owner."""
    metas = _metas(addresses, owner, written="run members rounds", paid=True)
    return Instruction(program_id, MARKS["close_run"], metas)


def kick(addresses: RunAddresses, program_id: Pubkey, owner: Pubkey, wallet: Pubkey) -> Instruction:
    """Put a member out at once. It may join again."""
    metas = _metas(addresses, owner, written="run members rounds")
    return Instruction(program_id, MARKS["kick"] + bytes(wallet), metas)


def ban(addresses: RunAddresses, program_id: Pubkey, owner: Pubkey, key: Pubkey, *, lift: bool = False) -> Instruction:
    """Keep a wallet, node key or grantee out of the run, and put a member that has it out at once; or `lift` that."""
    metas = _metas(addresses, owner, written="run members rounds")
    return Instruction(program_id, MARKS["ban"] + bytes(key) + pack("I4x", "lift", lift), metas)


def set_reward_rate(addresses: RunAddresses, program_id: Pubkey, owner: Pubkey, rate: int) -> Instruction:
    """Lamports per million tokens of credit earned from now on."""
    data = MARKS["set_reward_rate"] + pack("Q", "reward rate", rate)
    return Instruction(program_id, data, _metas(addresses, owner, written="run rounds"))


def migrate(addresses: RunAddresses, program_id: Pubkey, payer: Pubkey) -> Instruction:
    """Bring the accounts of the version before to this version's layout. Anyone may."""
    return Instruction(program_id, MARKS["migrate"], _metas(addresses, payer, written="run members rounds"))


# ---------------------------------------------------------------------- grants


def authorize(
    addresses: RunAddresses,
    program_id: Pubkey,
    authority: Pubkey,
    grantee: Pubkey | None,
    rent: Callable[[int], int],
    held: int = 0,
) -> list[Instruction]:
    """Let `grantee` (None: anyone) join: creates the grant account, at `grant_address`, and fills it. Signed by the
    authority, which pays. `held`: lamports that lie at that address already; anyone can send some, and an address with
    lamports is not created but allocated."""
    key = grantee or Pubkey.default()
    address = grant_address(program_id, authority, addresses.run, key)
    seed = grant_seed(addresses.run, key)
    created = [_create(program_id, authority, authority, address, seed, GRANT_SIZE, rent)]
    if held:
        created = _allocate(program_id, authority, address, seed, GRANT_SIZE, rent(GRANT_SIZE) - held)
    metas = [*_metas(addresses, authority, written=""), AccountMeta(address, is_signer=False, is_writable=True)]
    return [*created, Instruction(program_id, MARKS["authorize"] + bytes(key), metas)]


def revoke(
    addresses: RunAddresses, program_id: Pubkey, authority: Pubkey, grant: Pubkey, *, eject: bool = False
) -> Instruction:
    """Take a grant back; its lamports go to the authority. `eject`: members that joined under it are put out, too."""
    metas = _metas(addresses, authority, written="run members rounds", paid=True)
    metas.append(AccountMeta(grant, is_signer=False, is_writable=True))
    return Instruction(program_id, MARKS["revoke"] + pack("I4x", "eject", eject), metas)


def delegate(
    addresses: RunAddresses,
    program_id: Pubkey,
    grantee: Pubkey,
    grant: Pubkey,
    key: Pubkey,
    *,
    remove: bool = False,
) -> Instruction:
    """Let another key of the grantee's join under its grant, or `remove` it. Signed by the grantee."""
    metas = [*_metas(addresses, grantee, written=""), AccountMeta(grant, is_signer=False, is_writable=True)]
    return Instruction(program_id, MARKS["delegate"] + bytes(key) + pack("I4x", "remove", remove), metas)


# ---------------------------------------------------------------------- credit


def archive(
    addresses: RunAddresses,
    program_id: Pubkey,
    payer: Pubkey,
    slot: int,
    wallet: Pubkey,
    chain_slot: int,
    rent: Callable[[int], int],
) -> list[Instruction]:
    """Move the credit of a member that is gone (`wallet`, in `slot`) into a receipt, so that its slot is free. The
    receipt's address is new for every `chain_slot`."""
    seed = receipt_seed(addresses.run, wallet, chain_slot)
    address = Pubkey.create_with_seed(payer, seed, program_id)
    created = _create(program_id, payer, payer, address, seed, RECEIPT_SIZE, rent)
    metas = [*_metas(addresses, payer, written="members"), AccountMeta(address, is_signer=False, is_writable=True)]
    return [created, Instruction(program_id, MARKS["archive"] + pack("I4x", "slot", slot), metas)]


def restore(addresses: RunAddresses, program_id: Pubkey, wallet: Pubkey, receipt: Pubkey, payer: Pubkey) -> Instruction:
    """Move a receipt's credit into the wallet's present slot; the receipt's lamports go back to its `payer`."""
    metas = _metas(addresses, wallet, written="members")
    metas.append(AccountMeta(receipt, is_signer=False, is_writable=True))
    metas.append(AccountMeta(payer, is_signer=False, is_writable=True))
    return Instruction(program_id, MARKS["restore"], metas)


def reclaim(run: Pubkey, program_id: Pubkey, payer: Pubkey, record: Pubkey) -> Instruction:
    """After a run was closed: the lamports of one of its receipts go back to who paid for it, of a grant to the
    authority."""
    metas = [
        AccountMeta(payer, is_signer=True, is_writable=True),
        AccountMeta(run, is_signer=False, is_writable=False),
        AccountMeta(record, is_signer=False, is_writable=True),
    ]
    return Instruction(program_id, MARKS["reclaim"], metas)


def claim(addresses: RunAddresses, program_id: Pubkey, wallet: Pubkey, receipt: Pubkey | None = None) -> Instruction:
    """Have the rewards paid that were earned and not claimed: in the wallet's slot, or in a receipt."""
    metas = _metas(addresses, wallet, written="run members", paid=True)
    if receipt is not None:
        metas.append(AccountMeta(receipt, is_signer=False, is_writable=True))
    return Instruction(program_id, MARKS["claim"], metas)


def _allocate(
    program_id: Pubkey, payer: Pubkey, address: Pubkey, seed: str, size: int, lacking: int
) -> list[Instruction]:
    """What `_create` does, where lamports lie already; `lacking`: so many are still needed for rent."""
    topped = [transfer(TransferParams(from_pubkey=payer, to_pubkey=address, lamports=lacking))] if lacking > 0 else []
    return [
        *topped,
        allocate_with_seed(
            AllocateWithSeedParams(address=address, base=payer, seed=seed, space=size, owner=program_id)
        ),
        assign_with_seed(AssignWithSeedParams(address=address, base=payer, seed=seed, owner=program_id)),
    ]


def _create(
    program_id: Pubkey, payer: Pubkey, base: Pubkey, address: Pubkey, seed: str, size: int, rent: Callable[[int], int]
) -> Instruction:
    """Create an account of the program's at the address that `base` and `seed` give. Signed by both keys."""
    return create_account_with_seed(
        CreateAccountWithSeedParams(
            from_pubkey=payer,
            to_pubkey=address,
            base=base,
            seed=seed,
            lamports=rent(size),
            space=size,
            owner=program_id,
        )
    )
