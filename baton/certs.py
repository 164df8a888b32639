"""`baton certs DIR`: a private CA, and certificates for the router's HTTPS and for mutual TLS inside.

Good for a test or a few machines of one owner. A larger deployment has a CA of its own; what it must issue is
in docs/security.md.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from baton.errors import CommandError
from servicekit.tls import WORKER_NAME

CA_FILE = "ca.pem"
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_BACKDATED = datetime.timedelta(minutes=5)  # clocks differ


@dataclass(frozen=True, slots=True)
class _Issued:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="made if it does not exist")
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME",
        help="name or IP address under which clients reach the router; may be given again "
        "(localhost is always there)",
    )
    parser.add_argument("--days", type=int, default=365, help="lifetime (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    if args.days < 1:
        raise CommandError(f"baton certs: --days {args.days}: must be at least 1")
    directory: Path = args.directory
    if (directory / CA_FILE).exists():
        raise CommandError(f"baton certs: {directory} holds a CA already; choose another directory")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_certificates(directory, hosts=args.host, days=args.days)
    except OSError as error:
        raise CommandError(f"baton certs: {directory}: {error.strerror}") from error
    print(f"{directory}: ca.pem, and a .pem and a .key each for http, router and worker")
    print(f"next: baton up --tls {directory}")
    return 0


def write_certificates(directory: Path, *, hosts: list[str], days: int) -> None:
    """The CA's own key is forgotten: nobody can add to this deployment later."""
    lifetime = datetime.timedelta(days=days)
    ca = _issue_ca(lifetime)
    names = {"http": [*_LOCAL_NAMES, *hosts], "router": ["baton-router"], "worker": [WORKER_NAME]}
    _write(directory / CA_FILE, ca.certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    for role, role_names in names.items():
        issued = _issue(ca, f"baton {role}", role_names, lifetime)
        pem = issued.certificate.public_bytes(serialization.Encoding.PEM)
        _write(directory / f"{role}.pem", pem, 0o644)
        _write(directory / f"{role}.key", _key_pem(issued.key), 0o600)


def _issue_ca(lifetime: datetime.timedelta) -> _Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("baton private CA")
    builder = (
        _builder(name, name, key, lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_ca=True), critical=True)
    )
    return _Issued(builder.sign(key, hashes.SHA256()), key)


def _issue(ca: _Issued, common_name: str, names: list[str], lifetime: datetime.timedelta) -> _Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    builder = (
        _builder(_name(common_name), ca.certificate.subject, key, lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(is_ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(authority, critical=False)
    )
    return _Issued(builder.sign(ca.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    public_key = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    """Never readable by more than `mode` says, not even for a moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
