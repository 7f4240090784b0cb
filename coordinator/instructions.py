"""The program's instructions, as solders `Instruction`s.

Instruction data is an 8-byte Anchor mark followed by fixed-size little-endian fields. Which keys sign: `join` needs
the wallet and the node key, `create_run_instructions` the owner (and the payer, if another), all others the wallet or
payer named.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Final

from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey
from solders.system_program import CreateAccountWithSeedParams, create_account_with_seed

from coordinator.addresses import RunAddresses, run_addresses, run_seeds
from coordinator.layout import LIMITS, MEMBERS_SIZE, ROUNDS_SIZE, RUN_SIZE, TERMS, discriminator
from coordinator.state import Limits, Terms, bitmap_words

__all__ = [
    "RunAddresses",
    "attest",
    "checkpoint",
    "commit",
    "create_run_instructions",
    "init_run",
    "join",
    "leave",
    "ready",
    "run_addresses",
    "tick",
]

MARKS: Final = {
    name: discriminator("global", name)
    for name in ("init_run", "join", "ready", "commit", "attest", "tick", "checkpoint", "leave")
}
MAX_SOURCE_BYTES: Final = 64
DEFAULT_SHARE: Final = 1000


def _fixed(value: bytes, size: int, what: str) -> bytes:
    if len(value) != size:
        raise ValueError(f"{what} has {len(value)} bytes, it must have {size}")
    return value


def _pack(layout: str, what: str, *values: int | bytes) -> bytes:
    try:
        return struct.pack("<" + layout, *values)
    except struct.error as error:
        raise ValueError(f"{what}: {error}") from error


def _pack_limits(limits: Limits) -> bytes:
    values = {field.name: getattr(limits, field.name) for field in fields(limits)}
    for name, value in values.items():
        if not 0 <= value < 2**32:
            raise ValueError(f"limits.{name} = {value} is outside 0..2^32-1")
    return LIMITS.pack(**values)


def _pack_terms(terms: Terms) -> bytes:
    values: dict[str, int | bytes] = {}
    for name, code in TERMS.fields:
        value = getattr(terms, name)
        if isinstance(value, str):
            encoded = value.encode("utf-8")
            if len(encoded) > MAX_SOURCE_BYTES or b"\0" in encoded:
                raise ValueError(f"terms.{name} has {len(encoded)} bytes; it may have {MAX_SOURCE_BYTES}, without NUL")
            values[name] = encoded
        elif isinstance(value, bytes):
            values[name] = _fixed(value, struct.calcsize(code), f"terms.{name}")
        else:
            if not 0 <= int(value) < 2 ** (8 * struct.calcsize(code)):
                raise ValueError(f"terms.{name} = {value} does not fit its {8 * struct.calcsize(code)}-bit field")
            values[name] = int(value)
    return TERMS.pack(**values)


def _metas(addresses: RunAddresses, *signers: Pubkey, written: str) -> list[AccountMeta]:
    """Signers first, then run, members, rounds; `written` names the accounts that the instruction writes."""
    metas = [AccountMeta(key, is_signer=True, is_writable=False) for key in signers]
    for name in ("run", "members", "rounds"):
        metas.append(AccountMeta(getattr(addresses, name), is_signer=False, is_writable=name in written.split()))
    return metas


def init_run(program_id: Pubkey, owner: Pubkey, run_id: str, limits: Limits, terms: Terms) -> Instruction:
    """Turn the three freshly created accounts of `run_id` into a run that waits for members. Signed by the owner."""
    addresses = run_addresses(program_id, owner, run_id)
    name = run_id.encode("utf-8")
    data = MARKS["init_run"] + name.ljust(32, b"\0") + _pack("B7x", "run id", len(name))
    data += _pack_limits(limits) + _pack_terms(terms)
    return Instruction(program_id, data, _metas(addresses, owner, written="run members rounds"))


def create_run_instructions(
    program_id: Pubkey,
    owner: Pubkey,
    run_id: str,
    limits: Limits,
    terms: Terms,
    rent: Callable[[int], int],
    payer: Pubkey | None = None,
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
    created = [
        create_account_with_seed(
            CreateAccountWithSeedParams(
                from_pubkey=payer or owner,
                to_pubkey=address,
                base=owner,
                seed=seed,
                lamports=rent(size),
                space=size,
                owner=program_id,
            )
        )
        for address, seed, size in accounts
    ]
    return [*created, init_run(program_id, owner, run_id, limits, terms)]


def join(
    addresses: RunAddresses, program_id: Pubkey, wallet: Pubkey, node_key: Pubkey | bytes, share: int = DEFAULT_SHARE
) -> Instruction:
    """Become a member, in WaitingForMembers or Warmup. Signed by the wallet and by the node key (Ed25519, 32 bytes)."""
    key = node_key if isinstance(node_key, Pubkey) else Pubkey.from_bytes(_fixed(node_key, 32, "node key"))
    data = MARKS["join"] + _pack("I", "share", share)
    return Instruction(program_id, data, _metas(addresses, wallet, key, written="members rounds"))


def ready(addresses: RunAddresses, program_id: Pubkey, wallet: Pubkey, model_root: bytes) -> Instruction:
    """Report the model loaded: in Warmup, or, after a desync, in any phase of training. The root is
    `run.checkpoint_root`."""
    data = MARKS["ready"] + _fixed(model_root, 32, "model root")
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
    body = _pack("I4x32sQQQ", "commit", round, _fixed(digest, 32, "digest"), length, tokens, fingerprint)
    return Instruction(program_id, MARKS["commit"] + body, _metas(addresses, wallet, written="rounds"))


def attest(
    addresses: RunAddresses, program_id: Pubkey, wallet: Pubkey, round: int, members: Iterable[int]
) -> Instruction:
    """As an elected witness of the closed `round`: the members (slots) whose committed updates it holds and has
    validated."""
    body = _pack("I4x4Q", "attest", round, *bitmap_words(members))
    return Instruction(program_id, MARKS["attest"] + body, _metas(addresses, wallet, written="rounds"))


def tick(addresses: RunAddresses, program_id: Pubkey, payer: Pubkey) -> Instruction:
    """Make the transition that is due. Anyone may; fails with NOT_DUE and no change when none is."""
    return Instruction(program_id, MARKS["tick"], _metas(addresses, payer, written="run members rounds"))


def checkpoint(addresses: RunAddresses, program_id: Pubkey, wallet: Pubkey, round: int, root: bytes) -> Instruction:
    """In Cooldown: the model root of the weights before `round`, which must be `run.final_rounds`."""
    body = _pack("I4x32s", "checkpoint", round, _fixed(root, 32, "model root"))
    return Instruction(program_id, MARKS["checkpoint"] + body, _metas(addresses, wallet, written="rounds"))


def leave(addresses: RunAddresses, program_id: Pubkey, wallet: Pubkey) -> Instruction:
    """Leave the run; credit and an update already committed stay."""
    return Instruction(program_id, MARKS["leave"], _metas(addresses, wallet, written="members rounds"))
