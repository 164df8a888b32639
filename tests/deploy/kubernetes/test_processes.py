"""The containers of the laptop overlay as processes here, with exactly their commands and settings.

Changed is only what a machine has once and a pod has for itself: addresses, ports and paths.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, RedisError

from baton.ports import free_port
from kvstore.embedded import server_binary
from tests.deploy.kubernetes.rendering import Manifests, Object
from tests.deploy.kubernetes.start import container_environment, with_local_files
from tests.deploy.tools import ROOT
from tests.e2e.stack import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

_ONE_IN_FLIGHT = re.compile(r"^baton_router_requests_in_flight(\{.*\})? 1\.0$", re.MULTILINE)
_LOCAL_PORTS = {"http": "ROUTER_PORT", "grpc": "{role}_PORT", "metrics": "{role}_METRICS_PORT"}


@dataclass
class LocalPod:
    """The main container of a pod, running here."""

    container: Object
    process: subprocess.Popen[bytes]
    ports: dict[str, int]
    grace_s: float
    log: Path

    def probe(self, name: str) -> int | None:
        """The status that the kubelet would get; None while nobody listens."""
        get = self.container[f"{name}Probe"]["httpGet"]
        try:
            return httpx.get(
                f"http://127.0.0.1:{self.ports[get['port']]}{get['path']}", timeout=5
            ).status_code
        except httpx.TransportError:
            return None

    def until_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return self.probe("readiness") == 200

        wait_until(is_ready, f"{self.container['name']} is ready", timeout_s=90)


class LocalCluster:
    def __init__(self, manifests: Manifests, directory: Path) -> None:
        self._manifests = manifests
        self._directory = directory
        self._models = directory / "models"
        self._models.mkdir()
        self._redis_port = free_port()
        self.pods: dict[str, LocalPod] = {}
        self._redis: subprocess.Popen[bytes] | None = None

    def make_model(self) -> None:
        """What the init container does, once for all pods."""
        [container] = self._template("baton-decode")["spec"]["initContainers"]
        subprocess.run(self._command(container), cwd=ROOT, env=_clean({}), check=True, timeout=180)

    def start_redis(self) -> None:
        """With the configuration and the password of the manifests."""
        directory = self._directory / "redis"
        directory.mkdir()
        template = self._template("baton-redis")
        with_local_files(self._manifests, template, {}, directory)
        [config_map] = [v["configMap"]["name"] for v in template["spec"]["volumes"] if "configMap" in v]
        [(file, text)] = self._manifests.named("ConfigMap", config_map)["data"].items()
        assert template["spec"]["containers"][0]["command"] == ["redis-server", f"/etc/redis/{file}"]
        text = text.replace("/run/secrets/baton", str(directory)).replace("bind * -::*", "bind 127.0.0.1")
        path = directory / file
        path.write_text(text.replace("port 6379", f"port {self._redis_port}") + f"\ndir {directory}\n")
        self._redis = subprocess.Popen([str(server_binary()), str(path)], stdout=subprocess.DEVNULL)
        wait_until(self._redis_answers, "Redis asks for a password", timeout_s=10)

    def _redis_answers(self) -> bool:
        client = Redis(port=self._redis_port)
        try:
            client.ping()
        except RedisError as error:
            return isinstance(error, AuthenticationError)
        finally:
            client.close()
        return False

    def start(self, name: str) -> LocalPod:
        template = self._template(name)
        container = template["spec"]["containers"][0]
        role = container["name"].upper()
        directory = self._directory / name
        directory.mkdir()
        environment = container_environment(self._manifests, container, pod=f"{name}-0")
        environment = with_local_files(self._manifests, template, environment, directory)
        url = directory / "redis-url"
        url.write_text(url.read_text().replace("baton-redis:6379", f"127.0.0.1:{self._redis_port}"))
        ports = {port["name"]: free_port() for port in container["ports"]}
        for port, number in ports.items():
            environment["BATON_" + _LOCAL_PORTS[port].format(role=role)] = str(number)
        environment[f"BATON_{role}_HOST"] = "127.0.0.1"
        environment[f"BATON_{role}_MODEL"] = environment[f"BATON_{role}_MODEL"].replace(
            "/models", str(self._models)
        )
        log = directory / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command(container), cwd=ROOT, env=_clean(environment), stdout=output, stderr=output
            )
        grace_s = template["spec"]["terminationGracePeriodSeconds"]
        pod = self.pods[name] = LocalPod(container, process, ports, grace_s, log)
        return pod

    def stop(self) -> None:
        for process in [pod.process for pod in self.pods.values()] + [self._redis]:
            if process is not None:
                process.kill()
                process.wait()

    def _template(self, name: str) -> Object:
        return dict(self._manifests.pods())[name]

    def _command(self, container: Object) -> list[str]:
        program, *arguments = container["command"]
        assert program == "python", shlex.join(container["command"])
        return [sys.executable, *(a.replace("/models", str(self._models)) for a in arguments)]


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    """What images set, and what a test run needs."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("BATON_", "REDIS_URL"))}
    return inherited | dict(environment)


@pytest.fixture(scope="module")
def cluster(rendered: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    cluster = LocalCluster(rendered("cpu-laptop"), tmp_path_factory.mktemp("cluster"))
    try:
        cluster.make_model()
        cluster.start_redis()
        yield cluster
    finally:
        cluster.stop()


def test_a_worker_is_started_alive_and_ready_one_after_the_other(cluster: LocalCluster) -> None:
    for name in ("baton-prefill", "baton-decode"):
        pod = cluster.start(name)
        assert pod.probe("startup") is None  # loading
        pod.until_ready()
        assert (pod.probe("startup"), pod.probe("liveness")) == (200, 200)


def test_the_router_is_ready_when_a_decode_worker_is(cluster: LocalCluster) -> None:
    router = cluster.start("baton-router")
    router.until_ready()
    assert (router.probe("startup"), router.probe("liveness")) == (200, 200)
    url = f"http://127.0.0.1:{router.ports['http']}"
    messages = [{"role": "user", "content": "Say hello. " * 40}]
    body = {"model": "baton", "messages": messages, "max_tokens": 8}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 0
    assert httpx.get(f"{url}/ui/events", timeout=5).status_code == 401
    decode = cluster.pods["baton-decode"].ports["metrics"]
    served = 'baton_decode_requests_total{outcome="finished"} 1.0'
    assert served in httpx.get(f"http://127.0.0.1:{decode}/metrics", timeout=5).text
    page = httpx.get(f"{url}/metrics", timeout=5).text
    ready = [
        line for line in page.splitlines() if line.startswith("baton_router_workers{") and "ready" in line
    ]
    assert [line.split()[-1] for line in ready] == ["1.0", "1.0"]  # prefill, decode
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
        assert f"vllm:{name}{{" in page, name


def test_a_pod_that_is_told_to_end_drains_and_exits_with_0(cluster: LocalCluster) -> None:
    router = cluster.pods["baton-router"]
    url = f"http://127.0.0.1:{router.ports['http']}/v1/completions"
    body = {"model": "baton", "prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True}
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(httpx.post(url, json=body, timeout=100)))
    asking.start()
    page = f"http://127.0.0.1:{router.ports['http']}/metrics"
    wait_until(
        lambda: bool(_ONE_IN_FLIGHT.search(httpx.get(page, timeout=5).text)),
        "the request runs",
        timeout_s=30,
    )
    router.process.send_signal(signal.SIGTERM)
    wait_until(lambda: router.probe("readiness") == 503, "the router leaves its Service", timeout_s=10)
    assert router.probe("liveness") == 200
    assert router.process.wait(router.grace_s) == 0
    asking.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 400
    for name in ("baton-prefill", "baton-decode"):
        pod = cluster.pods[name]
        pod.process.send_signal(signal.SIGTERM)
        assert pod.process.wait(pod.grace_s) == 0, pod.log.read_text()
