"""The real processes: python -m prefill_svc and python -m decode_svc."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine.checkpoint.random_checkpoint import make_random_checkpoint
from kvstore.embedded import EmbeddedServer
from kvstore.registry import RedisRegistry, WorkerRecord
from kvstore.store import Store

_ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.e2e


def _environment(role: str, **settings: object) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    own = {f"BATON_{role.upper()}_{name}": str(value) for name, value in settings.items()}
    return inherited | own


def _run(role: str, *options: str, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"{role}_svc", *options],
        cwd=_ROOT,
        env=_environment(role, **settings),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def _start(role: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", f"{role}_svc"], cwd=_ROOT, env=environment)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_random_checkpoint(directory, "llama")
    return directory


@pytest.fixture
def redis_url() -> Iterator[str]:
    server = EmbeddedServer()
    yield server.start()
    server.stop()


async def _until_listed(registry: RedisRegistry, is_there: bool) -> list[WorkerRecord]:
    async for records in registry.watch():
        if bool(records) is is_there:
            return records
    raise AssertionError("watch() ended")


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_worker_registers_serves_metrics_drains_and_leaves(
    role: str, checkpoint: Path, redis_url: str
) -> None:
    environment = _environment(
        role, MODEL=checkpoint, REDIS_URL=redis_url, SERVED_MODEL_NAME="tiny", NUM_BLOCKS=300, NUM_THREADS=1
    )
    process = _start(role, environment)
    store = Store(redis_url)
    registry = RedisRegistry(store, "tiny")
    try:
        (record,) = await _until_listed(registry, True)
        page, alive, ready = [
            await asyncio.to_thread(httpx.get, f"http://{record.metrics_address}/{path}")
            for path in ("metrics", "healthz", "readyz")
        ]
        process.send_signal(signal.SIGTERM)
        exit_code = await asyncio.to_thread(process.wait, 30)

        assert (record.role, record.model, record.num_blocks) == (role, "tiny", 300)
        assert record.load.num_free_blocks == 300
        assert "baton_engine_free_blocks 300.0" in page.text
        assert "baton_worker_store_up 1.0" in page.text
        assert (alive.status_code, ready.status_code) == (200, 200)
        assert exit_code == 0
        assert await registry.list() == []
    finally:
        process.kill()
        await store.close()


def test_checkpoint_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    result = _run("prefill", MODEL=tmp_path / "nowhere")

    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "nowhere" in result.stderr


def test_redis_url_that_cannot_be_read_is_one_clear_line(checkpoint: Path) -> None:
    result = _run("decode", MODEL=checkpoint, REDIS_URL="http://somewhere", NUM_BLOCKS=300)

    assert result.returncode == 2
    assert "http://somewhere" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
