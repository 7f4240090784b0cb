"""Addresses of a run's three accounts, derived from its owner and its name, and of its grants."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from solders.pubkey import Pubkey

MAX_RUN_ID_BYTES = 32


@dataclass(frozen=True, slots=True)
class RunAddresses:
    """The accounts of one run: the state machine, the member table, the round tables."""

    run: Pubkey
    members: Pubkey
    rounds: Pubkey


@dataclass(frozen=True, slots=True)
class RunSeeds:
    """The `create_account_with_seed` seeds (31 ASCII characters each) behind `RunAddresses`."""

    run: str
    members: str
    rounds: str


def run_seeds(run_id: str) -> RunSeeds:
    """Seeds of the accounts of `run_id`. Raises ValueError unless the name has 1 to 32 UTF-8 bytes and no NUL."""
    encoded = run_id.encode("utf-8")
    if not 1 <= len(encoded) <= MAX_RUN_ID_BYTES or b"\0" in encoded:
        raise ValueError(f"run id {run_id!r} has {len(encoded)} bytes; it must have 1 to 32, without NUL")
    stem = hashlib.sha256(encoded).digest()[:14].hex()
    return RunSeeds(stem + "run", stem + "mem", stem + "rnd")


def run_addresses(program_id: Pubkey, owner: Pubkey, run_id: str) -> RunAddresses:
    """Where the run `run_id` of `owner` lives. Only the owner's signature can create accounts at these addresses."""
    seeds = run_seeds(run_id)
    return RunAddresses(
        run=Pubkey.create_with_seed(owner, seeds.run, program_id),
        members=Pubkey.create_with_seed(owner, seeds.members, program_id),
        rounds=Pubkey.create_with_seed(owner, seeds.rounds, program_id),
    )


def grant_seed(run: Pubkey, grantee: Pubkey) -> str:
    """The `create_account_with_seed` seed of a grant; the base is the run's join authority."""
    return hashlib.sha256(bytes(run) + bytes(grantee)).digest()[:14].hex() + "grt"


def grant_address(program_id: Pubkey, authority: Pubkey, run: Pubkey, grantee: Pubkey) -> Pubkey:
    """Where the authority's grant to `grantee` lives (`Pubkey.default()`: the grant to anyone)."""
    return Pubkey.create_with_seed(authority, grant_seed(run, grantee), program_id)


def receipt_seed(run: Pubkey, wallet: Pubkey, slot: int) -> str:
    """A seed for the receipt of a member's credit, archived in chain slot `slot`; the base is who pays for it."""
    stem = hashlib.sha256(bytes(run) + bytes(wallet) + slot.to_bytes(8, "little")).digest()[:14].hex()
    return stem + "rct"
