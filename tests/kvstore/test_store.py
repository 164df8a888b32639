from __future__ import annotations

import asyncio
import os
import shutil
import signal
import ssl
import subprocess
from pathlib import Path

import pytest
from redis.exceptions import ResponseError

from kvstore import keys
from kvstore import store as store_module
from kvstore.embedded import EmbeddedServer
from kvstore.store import Backoff, Outage, Store, StoreUnavailable, redacted

PASSWORD = "hunter2-and-more"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"redis://:{PASSWORD}@cache:6379/0", "redis://cache:6379/0"),
        (f"rediss://user:{PASSWORD}@cache:6380", "rediss://cache:6380"),
        (f"redis://cache?password={PASSWORD}", "redis://cache"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_what_is_shown_of_a_url_has_no_password(url: str, shown: str) -> None:
    assert redacted(url) == shown


@pytest.mark.parametrize(
    "url", ["", "cache:6379", f"http://:{PASSWORD}@cache", f"redis://:{PASSWORD}@cache:port"]
)
def test_a_url_that_cannot_be_read_is_a_value_error_without_the_password(url: str) -> None:
    with pytest.raises(ValueError, match="Redis URL") as caught:
        Store(url)
    assert PASSWORD not in str(caught.value)


async def test_the_password_of_the_url_is_used_and_never_shown(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store
) -> None:
    _, url = mortal_redis
    await mortal_store.redis.config_set("requirepass", PASSWORD)
    authorised = Store(url.replace("unix://", f"unix://:{PASSWORD}@"))
    assert not authorised.is_up
    await authorised.ping()
    assert authorised.is_up
    await authorised.close()
    intruder = Store(url.replace("unix://", "unix://:wrong-guess@"))
    with pytest.raises(StoreUnavailable) as caught:
        await intruder.ping()
    assert not intruder.is_up
    await intruder.close()
    assert "wrong-guess" not in str(caught.value)
    assert "invalid username-password pair" in str(caught.value)


@pytest.fixture
def certificate_and_key(tmp_path: Path) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make a certificate with")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    files = ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run([*command, *subject, "-days", "2", *files], check=True, capture_output=True)
    return certificate, key


async def test_tls_urls_reach_the_server(redis_url: str, certificate_and_key: tuple[Path, Path]) -> None:
    certificate, key = certificate_and_key
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    socket_path = redis_url.removeprefix("unix://")

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(socket_path)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(carry(reader, server_writer))
            tasks.create_task(carry(server_reader, writer))

    async with await asyncio.start_server(connect, "127.0.0.1", 0, ssl=context) as terminator:
        port = terminator.sockets[0].getsockname()[1]
        trusting = Store(f"rediss://localhost:{port}?ssl_ca_certs={certificate}")
        await trusting.ping()
        await trusting.close()
        careful = Store(f"rediss://localhost:{port}")
        with pytest.raises(StoreUnavailable):
            await careful.ping()
        await careful.close()


async def test_a_server_that_is_not_there_is_store_unavailable(tmp_path: Path) -> None:
    store = Store(f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(StoreUnavailable, match="nothing.sock"):
        await store.ping()
    await store.close()


async def test_a_server_that_does_not_answer_is_store_unavailable(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = mortal_redis
    monkeypatch.setattr(store_module, "ANSWER_TIMEOUT_S", 0.2)
    await mortal_store.ping()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(StoreUnavailable, match="TimeoutError"):
            await mortal_store.ping()
    finally:
        os.kill(server.pid, signal.SIGCONT)
    await mortal_store.ping()


async def test_a_full_server_is_store_unavailable(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store
) -> None:
    await mortal_store.redis.config_set("maxmemory", "1mb")
    with pytest.raises(StoreUnavailable, match="OutOfMemory"):
        async with mortal_store.exchange():
            await mortal_store.redis.set("key", b"x" * 2_000_000)
            await mortal_store.redis.set("another", b"x")


async def test_a_mistake_of_ours_is_not_hidden_as_an_outage(store: Store) -> None:
    await store.redis.set(keys.index_writers("tiny"), "not a hash")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await store.run_script("index_writers", [keys.index_writers("tiny")])


async def test_scripts_are_loaded_again_after_a_restart(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store
) -> None:
    server, _ = mortal_redis
    assert await mortal_store.run_script("index_writers", [keys.index_writers("tiny")]) == []
    server.kill()
    server.start()
    assert await mortal_store.run_script("index_writers", [keys.index_writers("tiny")]) == []


@pytest.mark.parametrize("num_steps", range(12))
async def test_a_cancelled_call_ends_its_task_whenever_the_cancellation_arrives(
    store: Store, num_steps: int
) -> None:
    async def call_for_ever() -> None:
        while True:
            await store.run_script("index_writers", [keys.index_writers("tiny")])

    task = asyncio.create_task(call_for_ever())
    for _ in range(num_steps):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=5.0)
    assert done
    assert task.cancelled()


def test_backoff_doubles_up_to_its_cap_and_starts_again_after_success() -> None:
    backoff = Backoff(first_s=1.0, max_s=3.0)
    waits = [backoff.next_s() for _ in range(4)]
    assert all(
        half <= wait <= whole
        for wait, half, whole in zip(waits, (0.5, 1, 1.5, 1.5), (1, 2, 3, 3), strict=True)
    )
    backoff.reset()
    assert backoff.next_s() <= 1.0


def test_an_outage_is_logged_when_it_begins_and_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    outage = Outage("mirror")
    outage.end()
    waits = [outage.go_on(StoreUnavailable("refused")) for _ in range(3)]
    outage.end()
    outage.end()
    assert [record.getMessage() for record in caplog.records] == ["mirror_lost_redis", "mirror_found_redis"]
    assert all(wait > 0 for wait in waits)


def test_no_two_models_share_a_key() -> None:
    models = ["a", "a:wrk", "a}:wrk", "{a}", "a b", ""]
    assert len({keys.workers(model) for model in models}) == len(models)
    assert len({keys.worker_blocks("m", worker_id, "1") for worker_id in ("a", "a:1", "a%3A1")}) == 3
