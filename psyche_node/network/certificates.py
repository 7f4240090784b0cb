"""TLS certificates that carry a libp2p identity, for gRPC.

Python's gRPC has no hook to verify a peer's certificate: a server either asks for a client certificate that chains to
a CA, or for none. So every leaf is signed by the *null CA*, whose private key is a published constant. Its signature
proves nothing; it only makes BoringSSL ask for a client certificate, check that the client holds its key, and pass it
on. The identity is in the leaf's libp2p extension, where the node key signs the leaf's public key, exactly as in
libp2p's TLS specification (https://github.com/libp2p/specs/blob/master/tls/tls.md).

Rules: identity comes from that extension and from nothing else (not from names, not from the issuer). The null CA is
never a client's root; a client pins the one leaf it verified. The leaf's key stays in memory.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import secrets
import time
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from psyche_node.identity import KEY_BYTES, SIGNATURE_BYTES, NodeKey

EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
LIFETIME_SECONDS = 14 * 86400
_PREFIX = b"libp2p-tls-handshake:"
# libp2p's protobuf PublicKey {type: Ed25519, data: 32 bytes}.
_KEY_PROTOBUF = bytes.fromhex("08011220")
# SEQUENCE { OCTET STRING (36 bytes), OCTET STRING (64 bytes) }: for Ed25519 the extension has exactly one form.
_DER_KEY = bytes.fromhex("3068" + "0424") + _KEY_PROTOBUF
_DER_SIGNATURE = bytes.fromhex("0440")
_SKEW = datetime.timedelta(hours=1)
_MAX_PEM = 8192
# What the parser raises; of its own errors only some are ValueErrors.
_UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


class BadCertificate(Exception):
    """A certificate gives no identity; the message says why."""


class ExpiredCertificate(BadCertificate):
    """It names a node, and its time is over or has not come."""


@dataclass(frozen=True)
class Leaf:
    """A certificate with its private key, both PEM. ``expires`` is in seconds since 1970."""

    certificate: bytes
    key: bytes = field(repr=False)
    der_hash: bytes
    expires: int
    name: str
    """What a client passes as the TLS target name."""


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """A verified certificate: who it is (``node_key``, 32 bytes), and what a client needs to pin it."""

    node_key: bytes
    pem: bytes
    der_hash: bytes
    expires: float
    name: str


@functools.cache
def _null_ca() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    scalar = int.from_bytes(hashlib.sha256(b"psyche-node null CA: this private key is public on purpose").digest()[:31])
    key = ec.derive_private_key(scalar, ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "psyche-node null CA (proves nothing)")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(2020, 1, 1))
        .not_valid_after(datetime.datetime(2120, 1, 1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def null_ca_pem() -> bytes:
    """Return the null CA's certificate: what a *server* passes as its client roots. Never a client's root."""
    return _null_ca()[1].public_bytes(Encoding.PEM)


def extension_value(key: NodeKey, spki: bytes) -> bytes:
    """Return the libp2p extension's value for a TLS key, given as DER SubjectPublicKeyInfo."""
    return _DER_KEY + key.public + _DER_SIGNATURE + key.sign(_PREFIX + spki)


def issue(key: NodeKey, lifetime: float = LIFETIME_SECONDS, now: float | None = None) -> Leaf:
    """Make a fresh TLS key and a leaf for it that carries the identity ``key``, valid for ``lifetime`` seconds."""
    tls_key = ec.generate_private_key(ec.SECP256R1())
    spki = tls_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    extension = extension_value(key, spki)
    start = datetime.datetime.fromtimestamp(time.time() if now is None else now, datetime.UTC)
    expires = start + datetime.timedelta(seconds=lifetime)
    # Unique per certificate: with equal subjects BoringSSL may pick the wrong root of a client's list.
    name = f"{secrets.token_hex(16)}.peer"
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(_null_ca()[1].subject)
        .public_key(tls_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _SKEW)
        .not_valid_after(expires)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        # Not critical: BoringSSL refuses critical extensions that it does not know.
        .add_extension(x509.UnrecognizedExtension(EXTENSION, extension), critical=False)
        .sign(_null_ca()[0], hashes.SHA256())
    )
    return Leaf(
        certificate.public_bytes(Encoding.PEM),
        tls_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        certificate.fingerprint(hashes.SHA256()),
        int(expires.timestamp()),
        name,
    )


def identify(pem: bytes) -> PeerCertificate:
    """Return whose certificate this is. Raises BadCertificate unless the node key it names signed it."""
    peer = _parse(pem)
    if peer.expires < time.time():
        raise ExpiredCertificate("the certificate has expired; the peer's clock or ours may be wrong")
    return peer


@functools.lru_cache(maxsize=1024)
def _parse(pem: bytes) -> PeerCertificate:
    if len(pem) > _MAX_PEM:
        raise BadCertificate(f"a certificate of {len(pem)} bytes; at most {_MAX_PEM} are read")
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        extension = certificate.extensions.get_extension_for_oid(EXTENSION).value
        public = certificate.public_key()
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except x509.ExtensionNotFound:
        raise BadCertificate("the certificate has no libp2p extension, so it names no node") from None
    except _UNREADABLE as error:
        raise BadCertificate(f"the certificate does not parse: {error}") from None
    now = datetime.datetime.now(datetime.UTC)
    if certificate.not_valid_before_utc > now:
        raise ExpiredCertificate("the certificate is not valid yet; the peer's clock or ours is wrong")
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(extension, x509.UnrecognizedExtension):
        raise BadCertificate("the certificate's key is not an elliptic curve one")
    value = extension.value
    after = len(_DER_KEY) + KEY_BYTES
    if (
        len(value) != after + len(_DER_SIGNATURE) + SIGNATURE_BYTES
        or not value.startswith(_DER_KEY)
        or value[after : after + len(_DER_SIGNATURE)] != _DER_SIGNATURE
    ):
        raise BadCertificate("the libp2p extension is not that of an Ed25519 node key")
    node_key, signature = value[len(_DER_KEY) : after], value[-SIGNATURE_BYTES:]
    spki = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    try:
        Ed25519PublicKey.from_public_bytes(node_key).verify(signature, _PREFIX + spki)
    except (InvalidSignature, ValueError):
        raise BadCertificate("the libp2p extension is not signed by the node key it names") from None
    return PeerCertificate(
        node_key,
        pem,
        certificate.fingerprint(hashes.SHA256()),
        certificate.not_valid_after_utc.timestamp(),
        str(names[0].value) if len(names) == 1 else "",
    )
