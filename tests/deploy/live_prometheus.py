"""A real Prometheus with the shipped rules, scraping a running Baton."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from baton.ports import free_port
from tests.deploy.tools import DEPLOY, program
from tests.e2e.stack import Stack, wait_until


class LivePrometheus:
    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=10)

    def close(self) -> None:
        self._client.close()

    @property
    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self._client.get("/-/ready").status_code == 200
        return False

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The instant vector. AssertionError with Prometheus's words when the query is refused."""
        answer = self._client.post("/api/v1/query", data={"query": expr}).json()
        assert answer["status"] == "success", f"{expr}: {answer.get('error')}"
        return list(answer["data"]["result"])

    def rule_errors(self) -> list[str]:
        groups = self._client.get("/api/v1/rules").json()["data"]["groups"]
        return [
            f"{rule['name']}: {rule['lastError']}"
            for group in groups
            for rule in group["rules"]
            if rule.get("lastError")
        ]


@contextlib.contextmanager
def running_prometheus(stack: Stack, work_dir: Path) -> Iterator[LivePrometheus]:
    binary = program("prometheus", "prometheus")
    work_dir.mkdir(parents=True, exist_ok=True)
    config = work_dir / "prometheus.yml"
    config.write_text(yaml.safe_dump(_config(stack)))
    address = f"127.0.0.1:{free_port()}"
    command = [binary, f"--config.file={config}", f"--storage.tsdb.path={work_dir / 'data'}"]
    with (work_dir / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdout=log, stderr=subprocess.STDOUT
        )
    prometheus = LivePrometheus(f"http://{address}")
    try:
        wait_until(lambda: prometheus.is_ready, "Prometheus is ready", timeout_s=30)
        yield prometheus
    finally:
        prometheus.close()
        process.terminate()
        process.wait(timeout=20)


def _config(stack: Stack) -> dict[str, Any]:
    jobs = [
        {
            "job_name": f"baton-{role}",
            "static_configs": [
                {"targets": [p["metrics_address"] for p in stack.processes(role)], "labels": {"role": role}}
            ],
        }
        for role in ("router", "prefill", "decode")
    ]
    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "2s"},
        "rule_files": [str(DEPLOY / "prometheus" / "rules" / "*.yml")],
        "scrape_configs": jobs,
    }
