"""Deploying a program through Solana's upgradeable loader: many small writes fill a buffer, which becomes the program.

Works against any Solana RPC endpoint. A program that is there already is upgraded if its bytes differ.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from typing import Final

from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.system_program import CreateAccountParams, create_account
from solders.sysvar import CLOCK, RENT

from coordinator.chain import Chain, ChainError

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


def program_data_address(program: Pubkey) -> Pubkey:
    """Where the loader keeps a program's bytes."""
    return Pubkey.find_program_address([bytes(program)], LOADER)[0]


async def deploy(chain: Chain, payer: Keypair, program: Keypair, so: bytes) -> Pubkey:
    """Make `so` the program at `program`'s address, with `payer` as its upgrade authority.

    Deploys, upgrades, or does nothing if these bytes are there already. Returns once the program can be called. If it
    fails, the deposit for the half-written buffer is taken back.

    Raises:
        DeployError: `so` is no program, the address is taken, or another key may upgrade it.
        ChainError: a transaction failed or could not be confirmed.
    """
    if so[:4] != b"\x7fELF" or len(so) > _MAX_PROGRAM_BYTES:
        raise DeployError(f"these {len(so)} bytes are not a Solana program (an ELF file of up to {_MAX_PROGRAM_BYTES})")
    await chain.load_rent()
    address = program.pubkey()
    present = await _present(chain, address)
    if present is not None:
        authority, data = present
        if data[: len(so)] == so and not any(data[len(so) :]):
            log.info("program %s is on the chain already, with the same bytes", address)
            return address
        if authority != payer.pubkey():
            raise DeployError(f"program {address} can only be upgraded by {authority}; pay with that wallet")
        if len(data) < len(so):
            more = max(len(so) - len(data), _LEAST_EXTENSION)
            await chain.send(_extend(address, payer.pubkey(), more), payer=payer)
    buffer = Keypair()
    try:
        await _fill(chain, payer, buffer, so)
        if present is None:
            await chain.send(
                *_create(chain, payer.pubkey(), address, buffer, so), extra_signers=(program,), payer=payer
            )
        else:
            await chain.send(_upgrade(address, payer.pubkey(), buffer.pubkey()), payer=payer)
    except BaseException:
        # Also when cancelled: the deposit is much of the cost. If it cannot be had back, the first error is the news.
        with contextlib.suppress(ChainError):
            if await chain.account(buffer.pubkey(), (0, 0)) is not None:
                await chain.send(_close(buffer.pubkey(), payer.pubkey()), payer=payer)
        raise
    await _visible(chain, address, so)
    log.info("program %s deployed, %d bytes", address, len(so))
    return address


async def _present(chain: Chain, address: Pubkey) -> tuple[Pubkey | None, bytes] | None:
    """Upgrade authority and bytes of a program, or None where nothing is."""
    account = await chain.account(address, (0, _PROGRAM_SIZE))
    if account is None:
        return None
    if account.owner != LOADER:
        raise DeployError(f"address {address} is taken by an account of {account.owner}; use another program keypair")
    stored = await chain.account(program_data_address(address))
    if stored is None or len(stored.data) < _PROGRAM_DATA_HEADER:
        raise DeployError(f"program {address} was closed; its address cannot be used again, use another keypair")
    authority = Pubkey.from_bytes(stored.data[13:45]) if stored.data[12] else None
    return authority, stored.data[_PROGRAM_DATA_HEADER:]


async def _fill(chain: Chain, payer: Keypair, buffer: Keypair, so: bytes) -> None:
    size = _BUFFER_HEADER + len(so)
    opened = create_account(
        CreateAccountParams(
            from_pubkey=payer.pubkey(),
            to_pubkey=buffer.pubkey(),
            lamports=chain.rent_exempt(size),
            space=size,
            owner=LOADER,
        )
    )
    claimed = Instruction(LOADER, struct.pack("<I", 0), [_meta(buffer.pubkey(), writable=True), _meta(payer.pubkey())])
    await chain.send(opened, claimed, extra_signers=(buffer,), payer=payer)
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
    async with asyncio.timeout(_VISIBLE_SECONDS):
        while await chain.slot() <= deployed:
            await asyncio.sleep(0.05)
    present = await _present(chain, address)
    if present is None or present[1][: len(so)] != so:
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
