"""Snapshots: a ledger's whole state as a sequence of checksummed chunks.

File: magic, then chunks. Chunk: length and CRC-32 of kind and payload (u32 each, little-endian), kind (one byte),
payload. Kinds: C chain (first), A accounts, R records of the history (oldest first), E end (last; the number of chunks
before it). Accounts are in no order.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Final

from solders.account import Account
from solders.message import Message, MessageV0
from solders.pubkey import Pubkey
from solders.transaction import VersionedTransaction
from solders.transaction_metadata import TransactionMetadata

from coordinator.ledger.state import Block, Capture, Chain, Record, State

MAGIC: Final = b"psyche-ledger snapshot 1\n"
_CHUNK: Final = struct.Struct("<II")
_CHAIN: Final = struct.Struct("<32sQQqQQ32s32sBHHI")
_BLOCK: Final = struct.Struct("<QQQq32s32s")
_BLOCKHASH: Final = struct.Struct("<32sQI")
_ACCOUNT: Final = struct.Struct("<32sQ32s?QI")
_RECORD: Final = struct.Struct("<QqHHHHII")
_CHUNK_TARGET: Final = 16 * 1024
_SLOT_HASH_BYTES: Final = 40
_HASH_BYTES: Final = 32


class Damaged(Exception):
    """A file is not what was written; the text says where."""


# ---------------------------------------------------------------------- writing


def encode(capture: Capture) -> Iterator[bytes]:
    """The file's content, in pieces of a few kilobytes (one account may be 10 MiB)."""
    yield MAGIC
    chunks = 0
    for kind, payload in _payloads(capture):
        yield _chunk(kind, payload)
        chunks += 1
    yield _chunk(b"E", struct.pack("<Q", chunks))


def _chunk(kind: bytes, payload: bytes) -> bytes:
    body = kind + payload
    return _CHUNK.pack(len(body), zlib.crc32(body)) + body


def _payloads(capture: Capture) -> Iterator[tuple[bytes, bytes]]:
    yield b"C", _chain_bytes(capture.chain)
    for kind, parts in (
        (b"A", (_account_bytes(key, account) for key, account in capture.accounts())),
        (b"R", (_record_bytes(record) for record in capture.records)),
    ):
        gathered = bytearray()
        for part in parts:
            gathered += part
            if len(gathered) >= _CHUNK_TARGET:
                yield kind, bytes(gathered)
                gathered.clear()
        if gathered:
            yield kind, bytes(gathered)


def _chain_bytes(chain: Chain) -> bytes:
    head = _CHAIN.pack(
        chain.genesis_hash,
        chain.slot,
        chain.block_height,
        chain.unix_time,
        chain.transaction_count,
        chain.airdrops,
        chain.entry,
        chain.bank_hash,
        len(chain.mixin),
        len(chain.slot_hashes),
        len(chain.blockhashes),
        len(chain.blocks),
    )
    parts = [head, chain.mixin, *chain.slot_hashes, *(_BLOCK.pack(*block) for block in chain.blocks)]
    for blockhash, height, seen in chain.blockhashes:
        parts += [_BLOCKHASH.pack(blockhash, height, len(seen)), *sorted(seen)]
    return b"".join(parts)


def _account_bytes(key: Pubkey, account: Account) -> bytes:
    data = account.data
    fixed = _ACCOUNT.pack(
        bytes(key), account.lamports, bytes(account.owner), account.executable, account.rent_epoch, len(data)
    )
    return fixed + data


def _record_bytes(record: Record) -> bytes:
    index = {key: at for at, key in enumerate(record.keys)}
    loaded = record.keys[record.loaded_from :]
    error, meta = json.dumps(record.error).encode(), bytes(record.meta)
    count = len(record.keys)
    return b"".join(
        (
            _RECORD.pack(
                record.slot,
                record.unix_time,
                len(loaded),
                len(record.writable),
                count,
                len(record.transaction),
                len(error),
                len(meta),
            ),
            record.transaction,
            *(bytes(key) for key in loaded),
            bytes(index[key] for key in record.writable),
            struct.pack(f"<{2 * count}Q", *record.balances_before, *record.balances_after),
            error,
            meta,
        )
    )


# ---------------------------------------------------------------------- reading


def decode(content: bytes) -> State:
    """The state that `encode` wrote; its accounts and records can be gone through once.

    Raises:
        Damaged: it is cut short, or a checksum does not match.
    """
    if not content.startswith(MAGIC):
        raise Damaged("it does not start as a snapshot of this version")
    # Everything is checked before anything is used.
    chunks = list(_chunks(memoryview(content)))
    if not chunks or chunks[-1][0] != b"E" or struct.unpack("<Q", chunks[-1][1]) != (len(chunks) - 1,):
        raise Damaged("it ends early")
    if chunks[0][0] != b"C":
        raise Damaged("its first chunk is not about the chain")
    chain = _read_chain(bytes(chunks[0][1]))
    return State(
        **{name: getattr(chain, name) for name in Chain.__slots__},
        accounts=_read_accounts(payload for kind, payload in chunks if kind == b"A"),
        records=_read_records(payload for kind, payload in chunks if kind == b"R"),
    )


def _chunks(view: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    at = len(MAGIC)
    while at < len(view):
        if len(view) - at < _CHUNK.size:
            raise Damaged(f"it ends early, at byte {len(view)}")
        length, crc = _CHUNK.unpack_from(view, at)
        body = view[at + _CHUNK.size : at + _CHUNK.size + length]
        if len(body) < max(length, 1) or zlib.crc32(body) != crc:
            raise Damaged(f"the checksum of its chunk at byte {at} does not match")
        yield bytes(body[:1]), body[1:]
        at += _CHUNK.size + length


def _read_chain(payload: bytes) -> Chain:
    *fixed, mixin_bytes, slot_hashes, blockhashes, blocks = _CHAIN.unpack_from(payload)
    at = _CHAIN.size
    mixin = payload[at : at + mixin_bytes]
    at += mixin_bytes
    hashes = tuple(payload[at + i * _SLOT_HASH_BYTES : at + (i + 1) * _SLOT_HASH_BYTES] for i in range(slot_hashes))
    at += slot_hashes * _SLOT_HASH_BYTES
    over = tuple(Block(*_BLOCK.unpack_from(payload, at + i * _BLOCK.size)) for i in range(blocks))
    at += blocks * _BLOCK.size
    window = []
    for _ in range(blockhashes):
        blockhash, height, count = _BLOCKHASH.unpack_from(payload, at)
        at += _BLOCKHASH.size
        window.append((blockhash, height, {payload[at + 32 * i : at + 32 * i + _HASH_BYTES] for i in range(count)}))
        at += 32 * count
    names = ("genesis_hash", "slot", "block_height", "unix_time", "transaction_count", "airdrops", "entry", "bank_hash")
    return Chain(
        **dict(zip(names, fixed, strict=True)), mixin=mixin, slot_hashes=hashes, blockhashes=tuple(window), blocks=over
    )


def _read_accounts(payloads: Iterable[memoryview]) -> Iterator[tuple[Pubkey, Account]]:
    for payload in payloads:
        at = 0
        while at < len(payload):
            key, lamports, owner, executable, rent_epoch, size = _ACCOUNT.unpack_from(payload, at)
            at += _ACCOUNT.size
            data = bytes(payload[at : at + size])
            at += size
            yield Pubkey(key), Account(lamports, data, Pubkey(owner), executable, rent_epoch)


def _read_records(payloads: Iterable[memoryview]) -> Iterator[Record]:
    for payload in payloads:
        at = 0
        while at < len(payload):
            record, at = _read_record(payload, at)
            yield record


def _read_record(payload: memoryview, at: int) -> tuple[Record, int]:
    slot, unix_time, loaded, writable, count, wire_bytes, error_bytes, meta_bytes = _RECORD.unpack_from(payload, at)
    at += _RECORD.size

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return bytes(payload[at - size : at])

    wire = take(wire_bytes)
    parsed = VersionedTransaction.from_bytes(wire)
    message = parsed.message
    assert isinstance(message, Message | MessageV0)
    keys = (*message.account_keys, *(Pubkey(take(32)) for _ in range(loaded)))
    may_write = tuple(keys[index] for index in take(writable))
    balances = struct.unpack(f"<{2 * count}Q", take(16 * count))
    error_text = take(error_bytes)
    record = Record(
        signature=parsed.signatures[0],
        slot=slot,
        unix_time=unix_time,
        transaction=wire,
        keys=keys,
        loaded_from=len(keys) - loaded,
        writable=may_write,
        error=None if error_text == b"null" else json.loads(error_text),
        meta=TransactionMetadata.from_bytes(take(meta_bytes)),
        balances_before=balances[:count],
        balances_after=balances[count:],
    )
    return record, at


# ---------------------------------------------------------------------- comparing


def state_hash(capture: Capture) -> str:
    """One SHA-256 over a whole state: chain, accounts, history. Equal for equal states, however they came about."""
    digest = hashlib.sha256(_chain_bytes(capture.chain))
    for one in sorted(_account_bytes(key, account) for key, account in capture.accounts()):
        digest.update(hashlib.sha256(one).digest())
    for record in capture.records:
        digest.update(hashlib.sha256(_record_bytes(record)).digest())
    return digest.hexdigest()
