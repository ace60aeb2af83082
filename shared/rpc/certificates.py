"""Certificates: a development authority that signs leaf certificates, and what a certificate file says of itself.

    authority(...)  -> a CA's certificate and key      issue(...) -> a leaf that it signed
    inspect(...)    -> names, validity and whether a key belongs to it, for reload, metrics and `sightline doctor`

Keys are ECDSA on P-256. An identity is a Subject Alternative Name (RFC 5280, 4.2.1.6): a URI such as
spiffe://example.org/edge/north (SPIFFE-ID, one a certificate) or a DNS name. The common name is for people and never
looked at. A real fleet has an authority of its own (SPIRE, step-ca, cert-manager); the services only see files.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import InvalidInput, InvalidSettings

# All that `cryptography` raises on bytes that are no certificate or key, or one of a kind that it does not know.
_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
_CLOCK_SKEW = datetime.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Names:
    """What a leaf certificate is good for: `uri` names a caller, `dns` and `ip` name a server (and a caller, too)."""

    common: str
    uri: Sequence[str] = ()
    dns: Sequence[str] = ()
    ip: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a PEM file's first certificate says. Times are UTC."""

    subject: str
    names: tuple[str, ...]
    not_before: datetime.datetime
    not_after: datetime.datetime
    public_key: bytes

    def seconds_left(self, now: datetime.datetime | None = None) -> float:
        """Until it expires; negative once it has."""
        return (self.not_after - (now or _utc_now())).total_seconds()


def authority(common: str, days: float) -> Pair:
    """A self-signed certificate authority, good for `days`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(common)
    builder = _builder(name, name, key, days).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    builder = builder.add_extension(_usage(signs_certificates=True), True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    return _pair(builder.sign(key, hashes.SHA256()), key)


def issue(ca: Pair, names: Names, days: float) -> Pair:
    """A leaf for servers and clients, good for `days` (negative: expired already). Raises InvalidInput."""
    ca_certificate = x509.load_pem_x509_certificate(ca.certificate)
    ca_key = serialization.load_pem_private_key(ca.key, None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise InvalidInput(f"expected an authority with an elliptic-curve key, got {type(ca_key).__name__}")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(names.common), ca_certificate.subject, key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(_usage(signs_certificates=False), True)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_certificate.public_key()),  # type: ignore[arg-type]
        False,
    )
    builder = builder.add_extension(x509.SubjectAlternativeName(_alternatives(names)), False)
    return _pair(builder.sign(ca_key, hashes.SHA256()), key)


def inspect(pem: bytes, what: str) -> Certificate:
    """Raises InvalidSettings that names `what` unless `pem` begins with a certificate."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        return Certificate(
            certificate.subject.rfc4514_string(),
            _alternative_names(certificate),
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
            certificate.public_key().public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            ),
        )
    except _UNREADABLE as error:
        raise InvalidSettings(f"{what} must hold a PEM certificate, got {len(pem)} bytes: {error}") from None


def require_pair(certificate: Certificate, key_pem: bytes, what: str) -> None:
    """Raises InvalidSettings that names `what` unless the key is the certificate's own and is not encrypted."""
    try:
        key = serialization.load_pem_private_key(key_pem, None)
    except _UNREADABLE as error:
        raise InvalidSettings(f"{what} must hold an unencrypted PEM private key, got: {error}") from None
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if public != certificate.public_key:
        raise InvalidSettings(f"{what} must hold the key of the certificate of {certificate.subject}, got another key")


def write(pair: Pair, certificate: Path, key: Path) -> None:
    """Writes both files, each whole or not at all, the key readable by its owner only."""
    for path, data, mode in ((key, pair.key, 0o600), (certificate, pair.certificate, 0o644)):
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)
        partial.touch(mode)
        partial.write_bytes(data)
        partial.replace(path)


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _name(common: str) -> x509.Name:
    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
    except ValueError as error:
        raise InvalidInput(f"a common name has 1 to 64 characters, got {common!r}: {error}") from None


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    now = _utc_now()
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _CLOCK_SKEW)
        .not_valid_after(end)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(names: Names) -> list[x509.GeneralName]:
    if not (names.uri or names.dns or names.ip):
        raise InvalidInput("a certificate needs at least one URI, DNS name or IP address, got none")
    try:
        return [
            *map(x509.UniformResourceIdentifier, names.uri),
            *map(x509.DNSName, names.dns),
            *(x509.IPAddress(ipaddress.ip_address(each)) for each in names.ip),
        ]
    except ValueError as error:
        raise InvalidInput(f"expected ASCII URIs and DNS names and IP addresses, got: {error}") from None


def _alternative_names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return (
        *found.get_values_for_type(x509.UniformResourceIdentifier),
        *(f"dns:{name}" for name in found.get_values_for_type(x509.DNSName)),
        *(f"ip:{address}" for address in found.get_values_for_type(x509.IPAddress)),
    )


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
