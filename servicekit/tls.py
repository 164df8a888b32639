"""Mutual TLS between Baton's processes: who has a certificate of the deployment's CA belongs to it.

Workers come and go at addresses that no certificate can list, so a worker's certificate carries one fixed DNS
name instead, and callers ask for that name. Servers ask callers for a certificate of the same CA.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

WORKER_NAME = "baton-worker"  # among the DNS names of every worker's certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files. All of them, or none for plain connections."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    channel: grpc.ChannelCredentials
    server: grpc.ServerCredentials


def check_tls_files(files: TlsFiles) -> None:
    """ValueError, beginning with the name of a setting, when only some are given."""
    given = {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": files.ca}
    missing = [name for name, path in given.items() if path is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"{missing[0]} must be set too: tls_cert, tls_key and tls_ca belong together")


def load_credentials(files: TlsFiles) -> Credentials | None:
    """None without files. ValueError when one cannot be read."""
    if files.cert is None or files.key is None or files.ca is None:
        return None
    cert, key, ca = (_read(path) for path in (files.cert, files.key, files.ca))
    return Credentials(
        channel=grpc.ssl_channel_credentials(ca, key, cert),
        server=grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True),
    )


def check_http_files(cert: Path | None, key: Path | None) -> None:
    """ValueError when HTTPS could not be served with these; nothing to check without them."""
    if cert is None or key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except OSError as error:  # also what ssl raises for a key that does not fit
        raise ValueError(f"cannot serve HTTPS with {cert} and {key}: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
