"""The node's one key: libp2p identity, TLS identity and the key that ``join`` registers on chain.

It is an Ed25519 key, kept as its raw 32-byte seed in a file that only its owner can read.
"""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from solders.keypair import Keypair

SEED_BYTES = 32
KEY_BYTES = 32
SIGNATURE_BYTES = 64
# The PeerId of an Ed25519 key: an identity multihash (0x00, length 36) of libp2p's PublicKey {Ed25519, 32 bytes}.
_KEY_PROTOBUF = bytes.fromhex("08011220")
_IDENTITY_MULTIHASH = bytes.fromhex("0024")


class IdentityError(Exception):
    """A node key or a PeerId cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class NodeKey:
    """The node's Ed25519 key, from its 32-byte seed. Printing it does not show the seed."""

    seed: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.seed) != SEED_BYTES:
            raise IdentityError(f"a node key's seed is {SEED_BYTES} bytes, this one is {len(self.seed)}")

    @classmethod
    def generate(cls) -> NodeKey:
        return cls(secrets.token_bytes(SEED_BYTES))

    @cached_property
    def _private(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.seed)

    @cached_property
    def public(self) -> bytes:
        """The 32 bytes of the public key, as they are on chain."""
        return self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    @cached_property
    def node_id(self) -> str:
        """The libp2p PeerId of this key."""
        return node_id(self.public)

    @cached_property
    def keypair(self) -> Keypair:
        """The same key as a Solana signer: it co-signs ``join``."""
        return Keypair.from_seed(self.seed)

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature of ``message``."""
        return self._private.sign(message)


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Return whether ``signature`` is that of ``message`` by ``public``. Malformed input is False, not an exception."""
    if len(public) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def node_id(public: bytes) -> str:
    """Return the PeerId (``12D3Koo...``) of a 32-byte Ed25519 public key."""
    if len(public) != KEY_BYTES:
        raise IdentityError(f"an Ed25519 public key is {KEY_BYTES} bytes, this one is {len(public)}")
    return base58.b58encode(_IDENTITY_MULTIHASH + _KEY_PROTOBUF + public).decode()


def public_key(peer_id: str) -> bytes:
    """Return the 32-byte Ed25519 public key inside a PeerId. Raises IdentityError for any other kind of PeerId."""
    try:
        raw = base58.b58decode(peer_id) if len(peer_id) <= 64 else b""
    except ValueError:
        raw = b""
    prefix = _IDENTITY_MULTIHASH + _KEY_PROTOBUF
    if len(raw) != len(prefix) + KEY_BYTES or not raw.startswith(prefix):
        raise IdentityError(f"{peer_id[:64]!r} is not the PeerId of an Ed25519 key (those start with 12D3Koo)")
    return raw[len(prefix) :]


def load_or_create_node_key(path: Path) -> NodeKey:
    """Read the node key at ``path``, or make one there (mode 0600) when there is no file.

    Raises IdentityError when the file can be read by others, or is not a seed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return _create(path)
    except OSError as error:
        raise IdentityError(
            f"the node key {path} cannot be opened: {error.strerror}. Restore it from a backup, as a file of this user"
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & 0o077:
            raise IdentityError(f"the node key {path} has mode {mode:04o}: others can read it. Run: chmod 600 {path}")
        seed = file.read(SEED_BYTES + 1)
    if len(seed) != SEED_BYTES:
        raise IdentityError(
            f"{path} is not a node key: it must hold {SEED_BYTES} bytes. Restore it from a backup, or remove it: the "
            "node then makes a new key, and goes on as the same member under that one"
        )
    return NodeKey(seed)


def rotate_node_key(path: Path) -> tuple[NodeKey | None, NodeKey]:
    """Put a new node key at ``path`` and the old one beside it (``.old``); return (old, new).

    Raises IdentityError when there is a ``.old`` file already, or the old key cannot be used.
    """
    kept = path.with_name(f"{path.name}.old")
    if not path.exists():
        return None, _create(path)
    old = load_or_create_node_key(path)
    try:
        os.link(path, kept)
    except FileExistsError:
        raise IdentityError(
            f"{kept} exists: an earlier key is kept there. Remove it, or move it away, and try again"
        ) from None
    os.unlink(path)
    return old, _create(path)


def _create(path: Path) -> NodeKey:
    key = NodeKey.generate()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.seed)
            file.flush()
            os.fsync(descriptor)
        # A link, not a rename: of two processes that start at once, one wins and the other takes the winner's key.
        os.link(part, path)
    except FileExistsError:
        return load_or_create_node_key(path)
    finally:
        os.unlink(part)
    return key
