"""Deploying a program through Solana's upgradeable loader: many small writes fill a buffer, which becomes the program.

Works against any Solana RPC endpoint. A program that is there already is upgraded if its bytes differ.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.system_program import CreateAccountParams, create_account
from solders.sysvar import CLOCK, RENT

from coordinator.chain import Chain, ChainError, ChainUnavailable
from coordinator.run_config import ConfigError

log = logging.getLogger(__name__)

LOADER: Final = Pubkey.from_string("BPFLoaderUpgradeab1e11111111111111111111111")
_SYSTEM: Final = Pubkey.default()
_BUFFER_HEADER: Final = 37
_PROGRAM_SIZE: Final = 36
_PROGRAM_DATA_HEADER: Final = 45
_MAX_PROGRAM_BYTES: Final = 10 * 2**20 - _PROGRAM_DATA_HEADER
# Leaves room for the compute budget instructions in a transaction of 1,232 bytes.
_CHUNK_BYTES: Final = 900
_WRITES_IN_FLIGHT: Final = 8
# The loader refuses to extend a program by less.
_LEAST_EXTENSION: Final = 10_240
_VISIBLE_SECONDS: Final = 60.0


class DeployError(ChainError):
    """The program cannot be deployed as asked; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """A program as the loader keeps it. `authority` may upgrade it; None: nobody ever again. `data` is its bytes with
    the room behind them, `slot` that of its last deployment."""

    authority: Pubkey | None
    slot: int
    data: bytes

    def is_(self, so: bytes) -> bool:
        """Whether these are its bytes."""
        return self.data[: len(so)] == so and not any(self.data[len(so) :])

    @property
    def sha256(self) -> str:
        return program_hash(self.data)


@dataclass(frozen=True, slots=True)
class DeployCost:
    """What a deployment will take, in lamports: the deposit stays in the program's accounts, the fees are gone, and
    `lent` comes back at the end (the buffer of an upgrade)."""

    transactions: int
    deposit: int
    fees: int
    lent: int


def program_hash(so: bytes) -> str:
    """SHA-256 of a program in hex, without the zeros at its end: the loader keeps more room than the file needs."""
    return hashlib.sha256(so.rstrip(b"\0")).hexdigest()


def program_data_address(program: Pubkey) -> Pubkey:
    """Where the loader keeps a program's bytes."""
    return Pubkey.find_program_address([bytes(program)], LOADER)[0]


async def deploy(chain: Chain, payer: Keypair, program: Keypair, so: bytes) -> Pubkey:
    """Make `so` the program at `program`'s address, with `payer` as its upgrade authority.

    Deploys, upgrades, or does nothing if these bytes are there already. Returns once the program can be called. If it
    fails, the deposit for the half-written buffer is taken back.

    Raises:
        ConfigError: `so` is no program.
        DeployError: the address is taken, or another key may upgrade it.
        ChainError: a transaction failed or could not be confirmed.
    """
    check_program(so)
    address = program.pubkey()
    if await present(chain, address) is not None:
        return await upgrade(chain, payer, address, so)
    await chain.load_rent()
    buffer = Keypair()
    async with _taken_back(chain, payer, buffer):
        await _fill(chain, payer, buffer, so)
        await chain.send(*_create(chain, payer.pubkey(), address, buffer, so), extra_signers=(program,), payer=payer)
    await _visible(chain, address, so)
    log.info("program %s deployed, %d bytes", address, len(so))
    return address


async def upgrade(chain: Chain, payer: Keypair, address: Pubkey, so: bytes) -> Pubkey:
    """Make `so` the program at an address where there is one, or do nothing if these bytes are there already.

    Raises:
        ConfigError: `so` is no program.
        DeployError: there is no program at the address, or `payer` is not its upgrade authority.
        ChainError: a transaction failed or could not be confirmed.
    """
    check_program(so)
    await chain.load_rent()
    there = await present(chain, address)
    if there is None:
        raise DeployError(f"there is no program {address} on this chain; deploy it first")
    if there.is_(so):
        log.info("program %s is on the chain already, with the same bytes", address)
        return address
    if there.authority != payer.pubkey():
        raise DeployError(
            f"program {address} can be upgraded by nobody any more; deploy another one"
            if there.authority is None
            else f"program {address} can only be upgraded by {there.authority}; pay with that wallet"
        )
    if more := _extension(there, so):
        await chain.send(_extend(address, payer.pubkey(), more), payer=payer)
    buffer = Keypair()
    async with _taken_back(chain, payer, buffer):
        await _fill(chain, payer, buffer, so)
        await chain.send(_upgrade(address, payer.pubkey(), buffer.pubkey()), payer=payer)
    await _visible(chain, address, so)
    log.info("program %s upgraded, %d bytes", address, len(so))
    return address


def check_program(so: bytes) -> None:
    """Raises ConfigError for bytes that cannot be a program."""
    if so[:4] != b"\x7fELF" or len(so) > _MAX_PROGRAM_BYTES:
        raise ConfigError(f"these {len(so)} bytes are not a Solana program (an ELF file of up to {_MAX_PROGRAM_BYTES})")


async def deploy_cost(chain: Chain, there: Deployed | None, so: bytes, fee: Callable[[int], int]) -> DeployCost:
    """What it takes to deploy `so`, or to upgrade what is there. `fee` gives lamports by the number of signatures."""
    await chain.load_rent()
    writes = -(-len(so) // _CHUNK_BYTES)
    fees = fee(2) + writes * fee(1)
    if there is None:
        deposit = chain.rent_exempt(_PROGRAM_DATA_HEADER + len(so)) + chain.rent_exempt(_PROGRAM_SIZE)
        return DeployCost(writes + 2, deposit, fees + fee(2), 0)
    more = _extension(there, so)
    deposit = chain.rent_exempt(more) - chain.rent_exempt(0)
    lent = chain.rent_exempt(_BUFFER_HEADER + len(so))
    return DeployCost(writes + 2 + bool(more), deposit, fees + fee(1) * (2 if more else 1), lent)


def open_buffer(chain: Chain, payer: Pubkey, buffer: Pubkey, so: bytes) -> tuple[Instruction, Instruction]:
    """The first transaction of a deployment. Call `chain.load_rent` first."""
    size = _BUFFER_HEADER + len(so)
    opened = create_account(
        CreateAccountParams(
            from_pubkey=payer, to_pubkey=buffer, lamports=chain.rent_exempt(size), space=size, owner=LOADER
        )
    )
    return opened, Instruction(LOADER, struct.pack("<I", 0), [_meta(buffer, writable=True), _meta(payer)])


def _extension(there: Deployed, so: bytes) -> int:
    return 0 if len(there.data) >= len(so) else max(len(so) - len(there.data), _LEAST_EXTENSION)


@contextlib.asynccontextmanager
async def _taken_back(chain: Chain, payer: Keypair, buffer: Keypair) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        # Also when cancelled: the deposit is much of the cost. If it cannot be had back, the first error is the news.
        with contextlib.suppress(ChainError):
            if await chain.account(buffer.pubkey(), (0, 0)) is not None:
                await chain.send(_close(buffer.pubkey(), payer.pubkey()), payer=payer)
        raise


async def present(chain: Chain, address: Pubkey) -> Deployed | None:
    """The program at an address, or None where nothing is. Raises DeployError where something else is."""
    account = await chain.account(address, (0, _PROGRAM_SIZE))
    if account is None:
        return None
    if account.owner != LOADER:
        raise DeployError(
            f"what is at {address} is no program, but an account of {account.owner}. Check the address; to deploy, use "
            "another program keypair"
        )
    stored = await chain.account(program_data_address(address))
    if stored is None or len(stored.data) < _PROGRAM_DATA_HEADER:
        raise DeployError(f"program {address} was closed; its address cannot be used again, use another keypair")
    authority = Pubkey.from_bytes(stored.data[13:45]) if stored.data[12] else None
    return Deployed(authority, int.from_bytes(stored.data[4:12], "little"), stored.data[_PROGRAM_DATA_HEADER:])


async def _fill(chain: Chain, payer: Keypair, buffer: Keypair, so: bytes) -> None:
    await chain.send(*open_buffer(chain, payer.pubkey(), buffer.pubkey(), so), extra_signers=(buffer,), payer=payer)
    room = asyncio.Semaphore(_WRITES_IN_FLIGHT)

    async def write(offset: int) -> None:
        async with room:
            await chain.send(
                _write(buffer.pubkey(), payer.pubkey(), offset, so[offset : offset + _CHUNK_BYTES]), payer=payer
            )

    try:
        async with asyncio.TaskGroup() as group:
            for offset in range(0, len(so), _CHUNK_BYTES):
                group.create_task(write(offset))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _visible(chain: Chain, address: Pubkey, so: bytes) -> None:
    """Wait for the slot after the deployment, from which on the program can be called, and check what is there."""
    deployed = await chain.slot()
    try:
        async with asyncio.timeout(_VISIBLE_SECONDS):
            while await chain.slot() <= deployed:
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise ChainUnavailable(
            f"program {address} was sent, and in {_VISIBLE_SECONDS:.0f} s no slot has followed in which it can be "
            "called; does the chain stand still? Look at it again"
        ) from None
    there = await present(chain, address)
    if there is None or not there.is_(so):
        raise DeployError(f"program {address} was deployed, yet the endpoint shows other bytes; look at it again")


def _meta(key: Pubkey, *, writable: bool = False, signer: bool = False) -> AccountMeta:
    return AccountMeta(key, is_signer=signer, is_writable=writable)


def _write(buffer: Pubkey, authority: Pubkey, offset: int, part: bytes) -> Instruction:
    data = struct.pack("<IIQ", 1, offset, len(part)) + part
    return Instruction(LOADER, data, [_meta(buffer, writable=True), _meta(authority, signer=True)])


def _create(chain: Chain, payer: Pubkey, program: Pubkey, buffer: Keypair, so: bytes) -> tuple[Instruction, ...]:
    reserved = create_account(
        CreateAccountParams(
            from_pubkey=payer,
            to_pubkey=program,
            lamports=chain.rent_exempt(_PROGRAM_SIZE),
            space=_PROGRAM_SIZE,
            owner=LOADER,
        )
    )
    metas = [
        _meta(payer, writable=True, signer=True),
        _meta(program_data_address(program), writable=True),
        _meta(program, writable=True),
        _meta(buffer.pubkey(), writable=True),
        _meta(RENT),
        _meta(CLOCK),
        _meta(_SYSTEM),
        _meta(payer, signer=True),
    ]
    return reserved, Instruction(LOADER, struct.pack("<IQ", 2, len(so)), metas)


def _upgrade(program: Pubkey, authority: Pubkey, buffer: Pubkey) -> Instruction:
    metas = [
        _meta(program_data_address(program), writable=True),
        _meta(program, writable=True),
        _meta(buffer, writable=True),
        _meta(authority, writable=True),
        _meta(RENT),
        _meta(CLOCK),
        _meta(authority, signer=True),
    ]
    return Instruction(LOADER, struct.pack("<I", 3), metas)


def _extend(program: Pubkey, payer: Pubkey, more: int) -> Instruction:
    metas = [
        _meta(program_data_address(program), writable=True),
        _meta(program, writable=True),
        _meta(_SYSTEM),
        _meta(payer, writable=True, signer=True),
    ]
    return Instruction(LOADER, struct.pack("<II", 6, more), metas)


def _close(buffer: Pubkey, authority: Pubkey) -> Instruction:
    metas = [_meta(buffer, writable=True), _meta(authority, writable=True), _meta(authority, signer=True)]
    return Instruction(LOADER, struct.pack("<I", 5), metas)
