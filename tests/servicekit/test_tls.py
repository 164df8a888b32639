"""Mutual TLS of gRPC, with the certificates that `baton certs` writes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from baton.certs import write_certificates
from servicekit.rpc import build_channel, build_server
from servicekit.tls import Credentials, TlsFiles, check_http_files, check_tls_files, load_credentials


def files_of(directory: Path, role: str) -> TlsFiles:
    return TlsFiles(cert=directory / f"{role}.pem", key=directory / f"{role}.key", ca=directory / "ca.pem")


def credentials_of(directory: Path, role: str) -> Credentials:
    credentials = load_credentials(files_of(directory, role))
    assert credentials is not None
    return credentials


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ours")
    write_certificates(directory, hosts=[], days=2)
    return directory


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("theirs")
    write_certificates(directory, hosts=[], days=2)
    return directory


async def _echo(request: bytes, context: object) -> bytes:
    return request


@asynccontextmanager
async def echo_server(credentials: Credentials | None) -> AsyncIterator[str]:
    handler = grpc.method_handlers_generic_handler(
        "Echo", {"Echo": grpc.unary_unary_rpc_method_handler(_echo)}
    )
    server, port = build_server([handler], host="127.0.0.1", port=0, credentials=credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def call(address: str, credentials: Credentials | None) -> bytes:
    async with build_channel(address, credentials) as channel:
        return await channel.unary_unary("/Echo/Echo")(b"hello", timeout=10)


async def test_both_sides_with_a_certificate_of_one_ca_talk(ours: Path) -> None:
    async with echo_server(credentials_of(ours, "worker")) as address:
        assert await call(address, credentials_of(ours, "router")) == b"hello"
        assert await call(address, credentials_of(ours, "worker")) == b"hello"  # a worker calls its peer


async def test_a_caller_of_another_ca_is_refused(ours: Path, theirs: Path) -> None:
    """It trusts the server, and shows a certificate that the server's CA did not sign."""
    mixed = TlsFiles(cert=theirs / "router.pem", key=theirs / "router.key", ca=ours / "ca.pem")
    async with echo_server(credentials_of(ours, "worker")) as address:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(address, load_credentials(mixed))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_caller_without_certificate_or_without_tls_is_refused(ours: Path) -> None:
    nameless = Credentials(
        channel=grpc.ssl_channel_credentials((ours / "ca.pem").read_bytes()),
        server=credentials_of(ours, "worker").server,
    )
    async with echo_server(credentials_of(ours, "worker")) as address:
        for credentials in (nameless, None):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(address, credentials)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_server_of_another_ca_is_not_spoken_to(ours: Path, theirs: Path) -> None:
    async with echo_server(credentials_of(theirs, "worker")) as address:
        with pytest.raises(grpc.aio.AioRpcError):
            await call(address, credentials_of(ours, "router"))


async def test_a_router_s_certificate_does_not_make_a_worker(ours: Path) -> None:
    async with echo_server(credentials_of(ours, "router")) as address:
        with pytest.raises(grpc.aio.AioRpcError):
            await call(address, credentials_of(ours, "router"))


async def test_a_plain_server_is_not_spoken_to_by_a_caller_with_credentials(ours: Path) -> None:
    async with echo_server(None) as address:
        with pytest.raises(grpc.aio.AioRpcError):
            await call(address, credentials_of(ours, "router"))


def test_some_of_the_files_are_a_mistake(ours: Path) -> None:
    with pytest.raises(ValueError, match=r"^tls_ca must be set too"):
        check_tls_files(TlsFiles(cert=ours / "router.pem", key=ours / "router.key"))
    check_tls_files(TlsFiles())
    assert load_credentials(TlsFiles()) is None


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"worker\.pem"):
        load_credentials(files_of(tmp_path, "worker"))


def test_https_files_that_do_not_fit_are_a_clear_mistake(ours: Path, theirs: Path) -> None:
    check_http_files(ours / "http.pem", ours / "http.key")
    check_http_files(None, None)
    for key in (theirs / "http.key", ours / "nothing.key"):
        with pytest.raises(ValueError, match="cannot serve HTTPS"):
            check_http_files(ours / "http.pem", key)


def test_keys_are_for_their_owner_only(ours: Path) -> None:
    assert all(path.stat().st_mode & 0o077 == 0 for path in ours.glob("*.key"))
    assert len(list(ours.glob("*.key"))) == 3
