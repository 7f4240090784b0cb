"""The format of an exported run: JSON lines in a hash chain, closed by a signature.

    {"kind": "run", "format": "psyche-run-record/1", ...}   which run, of which program and chain, its limits and terms
    {"kind": "event", ...}                                  what the program logged, in the chain's order
    {"kind": "round", ...}                                  who trained which positions, and whether it counts
    {"kind": "member", ...}, {"kind": "receipt", ...}       credit, as the accounts have it
    {"kind": "state", ...}                                  the run's account at the end
    {"kind": "signature", ...}                              the exporter's signature over all lines above

h(0) = SHA-256(format); h(i) = SHA-256 of h(i-1) followed by SHA-256(line i without its newline). What is signed
(Ed25519) is an off-chain message of Solana's, version 0, which cannot be taken for a transaction: 0xff, "solana
offchain", two zero bytes, the length of the text in 16 bits, and the text "FORMAT LINES HASH": the number of lines
before the signature, and the last hash in hex.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.signature import Signature

from coordinator.admin.exits import AdminExit
from coordinator.admin.failures import AdminError, UnusableFile

FORMAT: Final = "psyche-run-record/1"
MAX_LINE_BYTES: Final = 1 << 20
_OFFCHAIN_HEADER: Final = b"\xffsolana offchain\x00\x00"  # version 0, format 0: plain ASCII


class InvalidRecord(AdminError):
    """A record that is not what was signed, or that says what cannot be. Names the line, counted from 1."""

    status = AdminExit.RECORD_INVALID


@dataclass(frozen=True, slots=True)
class Line:
    """One object of a record and where it stands in the file, from 1."""

    number: int
    value: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        """Raises InvalidRecord for a key that is missing."""
        if key not in self.value:
            what = self.value.get("kind", "what is no line of a record")
            raise InvalidRecord(f"line {self.number}: {what} has no {key!r}")
        return self.value[key]

    def integer(self, key: str) -> int:
        """A whole number, not negative. Raises InvalidRecord."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
            raise InvalidRecord(f"line {self.number}: {key} is {value!r}, not a whole number")
        return value

    def slots(self, key: str) -> frozenset[int]:
        """A list of member slots. Raises InvalidRecord."""
        value = self[key]
        if not isinstance(value, list) or not all(isinstance(one, int) and 0 <= one < 256 for one in value):
            raise InvalidRecord(f"line {self.number}: {key} is not a list of member slots")
        return frozenset(value)


@dataclass(frozen=True, slots=True)
class Record:
    """A record whose hash chain and signature are right. `lines` are all but the signature."""

    lines: tuple[Line, ...]
    signer: Pubkey
    digest: str


def offchain_message(text: str) -> bytes:
    """What a wallet signs to say `text`, by Solana's specification of off-chain messages."""
    raw = text.encode("ascii")
    return _OFFCHAIN_HEADER + len(raw).to_bytes(2, "little") + raw


def signed_lines(objects: Iterable[dict[str, Any]], wallet: Keypair) -> Iterator[str]:
    """The lines of a record, the signature last."""
    chain, count = _start(), 0
    for one in objects:
        line = json.dumps(one, separators=(",", ":"), ensure_ascii=True)
        chain, count = _next(chain, line.encode()), count + 1
        yield line
    signature = wallet.sign_message(offchain_message(_statement(count, chain)))
    closing = {
        "kind": "signature",
        "lines": count,
        "hash": chain.hex(),
        "signer": str(wallet.pubkey()),
        "signature": str(signature),
    }
    yield json.dumps(closing, separators=(",", ":"))


def write_record(path: Path, objects: Iterable[dict[str, Any]], wallet: Keypair) -> int:
    """Write a record to a new file; the number of its lines. Raises UnusableFile."""
    count = 0
    try:
        with path.open("x", encoding="ascii") as file:
            for line in signed_lines(objects, wallet):
                file.write(line + "\n")
                count += 1
    except FileExistsError:
        raise UnusableFile(f"{path} exists already; an export never replaces a file") from None
    except OSError as error:
        raise UnusableFile(f"{path} cannot be written: {error.strerror or error}") from error
    return count


def read_record(path: Path) -> Record:
    """Read a record and check its hash chain and its signature.

    Raises:
        UnusableFile: there is no such file.
        InvalidRecord: it is not a record, or not what its signer has signed.
    """
    chain, lines = _start(), list[Line]()
    closing: Line | None = None
    try:
        with path.open("rb") as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number = len(lines) + 1
                if closing is not None:
                    raise InvalidRecord(f"line {number + 1}: something follows the signature, which nobody has signed")
                line = Line(number, _parse(raw, number))
                if line["kind"] == "signature":
                    closing = line
                    continue
                chain = _next(chain, raw.rstrip(b"\n"))
                lines.append(line)
    except OSError as error:
        raise UnusableFile(f"{path} cannot be read: {error.strerror or error}") from error
    if not lines or lines[0]["kind"] != "run" or lines[0]["format"] != FORMAT:
        raise InvalidRecord(f"{path} does not begin with a line of kind run and format {FORMAT}")
    if closing is None:
        raise InvalidRecord(f"{path} ends without a signature: it was cut off after line {len(lines)}")
    if closing["lines"] != len(lines) or closing["hash"] != chain.hex():
        raise InvalidRecord(
            f"the lines are not those that were signed: {len(lines)} lines with hash {chain.hex()[:16]}…, signed were "
            f"{closing['lines']} with {str(closing['hash'])[:16]}…"
        )
    try:
        signer, signature = Pubkey.from_string(closing["signer"]), Signature.from_string(closing["signature"])
    except (TypeError, ValueError):
        raise InvalidRecord(f"line {closing.number}: signer or signature is not base58") from None
    if not signature.verify(signer, offchain_message(_statement(len(lines), chain))):
        raise InvalidRecord(f"line {closing.number}: this is not the signature of {signer}")
    return Record(tuple(lines), signer, chain.hex())


def _parse(raw: bytes, number: int) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES or not raw.endswith(b"\n"):
        raise InvalidRecord(f"line {number}: it has no end, or is over {MAX_LINE_BYTES} bytes")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRecord(f"line {number}: it is not a JSON object")
    return value


def _start() -> bytes:
    return hashlib.sha256(FORMAT.encode()).digest()


def _next(chain: bytes, line: bytes) -> bytes:
    return hashlib.sha256(chain + hashlib.sha256(line).digest()).digest()


def _statement(lines: int, chain: bytes) -> str:
    return f"{FORMAT} {lines} {chain.hex()}"
