"""Certificates as an attacker would make them."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from psyche_node.network import certificates
from psyche_node.network.certificates import Leaf


def forge(
    *,
    extension: bytes | None,
    issuer_key: ec.EllipticCurvePrivateKey | None = None,
    key: ec.EllipticCurvePrivateKey | None = None,
    ca: bool = False,
    name: str = "forged.peer",
    days: tuple[float, float] = (-1, 1),
) -> Leaf:
    """Make a certificate as an attacker would: signed by the null CA unless said otherwise, with any extension."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    ca_key, ca_certificate = certificates._null_ca()
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(
            ca_certificate.subject if issuer_key is None else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        )
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if extension is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(certificates.EXTENSION, extension), critical=False)
    certificate = builder.sign(issuer_key or ca_key, hashes.SHA256())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Leaf(certificate.public_bytes(Encoding.PEM), pem, certificate.fingerprint(hashes.SHA256()), 0, name)


def extension_of(leaf: Leaf) -> bytes:
    certificate = x509.load_pem_x509_certificate(leaf.certificate)
    value = certificate.extensions.get_extension_for_oid(certificates.EXTENSION).value
    assert isinstance(value, x509.UnrecognizedExtension)
    return value.value
