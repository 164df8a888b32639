"""The real processes, started as a user starts them: `baton up`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from baton.ports import free_port

_START_S = 90.0
_ROOT = Path(__file__).resolve().parents[2]


class Stack:
    """One `baton up`. Everything it started is gone after stop()."""

    def __init__(
        self,
        model_dir: Path | None,
        work_dir: Path,
        *options: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """None: the model that `baton up` serves when it is told none."""
        self._state_path = work_dir / "state.json"
        self.log_dir = work_dir / "logs"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = "baton-demo" if model_dir is None else "tiny"
        command = [sys.executable, "-m", "baton", "up", "--port", str(self.port)]
        if model_dir is not None:
            command += ["--model", str(model_dir), "--served-model-name", self.model]
        command += ["--state-file", str(self._state_path), "--log-dir", str(self.log_dir), *options]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("BATON_", "REDIS_URL"))}
        self._output = (work_dir / "console.log").open("wb")
        self.process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=clean | dict(environment or {}),
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        self.client = httpx.Client(base_url=self.url, timeout=60)

    @property
    def console(self) -> str:
        return Path(self._output.name).read_text(errors="replace")

    def wait_ready(self) -> Stack:
        def is_ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"baton up ended with {self.process.returncode}:\n{self.console}")
            return bool(self._state_path.exists() and self.state()["is_ready"])

        wait_until(is_ready, "the stack is ready", timeout_s=_START_S)
        return self

    def stop(self) -> int:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(timeout=30)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._output.close()

    def state(self) -> dict[str, Any]:
        return json.loads(self._state_path.read_text())

    def processes(self, role: str) -> list[dict[str, Any]]:
        return [p for p in self.state()["processes"] if p["role"] == role]

    def kill(self, name: str) -> None:
        [pid] = [p["pid"] for p in self.state()["processes"] if p["name"] == name]
        os.kill(pid, signal.SIGKILL)

    def metrics(self, process: dict[str, Any]) -> dict[str, float]:
        """Samples by name, summed over labels."""
        text = httpx.get(f"http://{process['metrics_address']}/metrics", timeout=10).text
        samples: dict[str, float] = {}
        for match in re.finditer(r"^(\w+)(?:\{[^}]*\})? ([-+\w.]+)$", text, re.MULTILINE):
            samples[match[1]] = samples.get(match[1], 0.0) + float(match[2])
        return samples

    def chat(self, content: str, **fields: Any) -> httpx.Response:
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        body = {"model": self.model, "prompt": prompt, "temperature": 0, **fields}
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def output_ids(self, prompt: list[int], max_tokens: int, **fields: Any) -> list[int]:
        fields = {"max_tokens": max_tokens, "ignore_eos": True, "return_token_ids": True, **fields}
        return self.complete(prompt, **fields)["choices"][0]["token_ids"]

    def assert_no_block_is_lost(self) -> None:
        """On every worker, soon: free + cached = total, nothing in use."""
        for process in [*self.processes("prefill"), *self.processes("decode")]:
            if process["state"] == "ready":
                wait_until(
                    lambda p=process: self._is_idle(p), f"{process['name']} holds no block", timeout_s=15
                )

    def _is_idle(self, process: dict[str, Any]) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            m = self.metrics(process)
            free_and_cached = m["baton_engine_free_blocks"] + m["baton_engine_cached_blocks"]
            return m["baton_engine_used_blocks"] == 0 and free_and_cached == m["baton_engine_total_blocks"]
        return False


@contextlib.contextmanager
def running_stack(
    model_dir: Path | None, work_dir: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Stack]:
    work_dir.mkdir(parents=True, exist_ok=True)
    stack = Stack(model_dir, work_dir, *options, environment=environment)
    try:
        yield stack.wait_ready()
    finally:
        stack.stop()


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.05)  # other processes change what is waited for: there is no event to wait on
