from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from baton.__main__ import main


def names_of(path: Path) -> list[str]:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in found]


def test_the_command_writes_a_ca_and_three_certificates(tmp_path: Path) -> None:
    directory = tmp_path / "certs"
    assert main(["certs", str(directory), "--host", "gpu-7.example", "--host", "10.0.0.7"]) == 0
    assert sorted(path.name for path in directory.iterdir()) == [
        "ca.pem",
        *(f"{role}.{kind}" for role in ("http", "router", "worker") for kind in ("key", "pem")),
    ]
    assert {"localhost", "127.0.0.1", "gpu-7.example", "10.0.0.7"} <= set(names_of(directory / "http.pem"))
    assert names_of(directory / "worker.pem") == ["baton-worker"]
    for role in ("http", "router", "worker"):
        key = serialization.load_pem_private_key((directory / f"{role}.key").read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((directory / f"{role}.pem").read_bytes())
        assert certificate.public_key() == key.public_key()


def test_a_directory_with_a_ca_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["certs", str(tmp_path)])
    before = (tmp_path / "ca.pem").read_bytes()
    assert main(["certs", str(tmp_path)]) == 2
    assert "holds a CA already" in capsys.readouterr().err
    assert (tmp_path / "ca.pem").read_bytes() == before


def test_up_wants_a_directory_that_certs_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--tls", str(tmp_path), "--port", "18991"]) == 2
    assert "baton certs" in capsys.readouterr().err


@pytest.mark.parametrize(("hosts", "is_trusted"), [([], False), (["127.0.0.2"], True)])
async def test_a_browser_trusts_the_names_that_were_given(
    tmp_path: Path, hosts: list[str], is_trusted: bool
) -> None:
    """A real handshake, to an address that only --host adds."""
    options = [option for host in hosts for option in ("--host", host)]
    await asyncio.to_thread(main, ["certs", str(tmp_path), *options])
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(tmp_path / "http.pem", tmp_path / "http.key")
    client_side = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))

    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(close, "127.0.0.2", 0, ssl=server_side) as server:
        port = server.sockets[0].getsockname()[1]
        try:
            _, writer = await asyncio.open_connection("127.0.0.2", port, ssl=client_side)
        except ssl.SSLCertVerificationError:
            assert not is_trusted
        else:
            assert is_trusted
            writer.close()
