"""The shipped images and compose file on a real engine, with real faults. One stack, in the order of the file."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.deploy.compose_project import ROOT, ComposeProject, docker

pytestmark = [pytest.mark.containers, pytest.mark.timeout(900)]

SPEAKS = "SmolLM2-135M-Instruct"
HAS_EXPERTS = "tiny-experts"
# Nothing in a stack that has just been disturbed and mended brings these back.
_MAY_BE_EMPTY = re.compile(r"namespace=|kube_|container_|node_")

CALL_OUT = """
import socket
try:
    socket.create_connection(("192.0.2.1", 443), timeout=2)
except OSError as error:
    print(error)
"""


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.5)  # containers change what is waited for: there is no event to wait on


def prompt(seed: int, num_tokens: int) -> list[int]:
    return [3 + (seed * 7919 + i * i * 31) % 4000 for i in range(num_tokens)]


def num_restarts(project: ComposeProject, service: str) -> int:
    return sum(container["RestartCount"] for container in project.containers(service))


def is_healthy(project: ComposeProject, service: str) -> bool:
    containers = project.containers(service)
    return all(c["State"].get("Health", {}).get("Status") == "healthy" for c in containers)


def test_the_stack_comes_up_as_shipped_and_its_default_model_answers(project: ComposeProject) -> None:
    project.up(SPEAKS)
    answer = project.chat("What is the capital of France?", temperature=0, max_tokens=40)
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_every_container_runs_without_rights(project: ComposeProject) -> None:
    for container in project.containers():
        host = container["HostConfig"]
        name = container["Name"]
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert host["Memory"] > 0, name
        assert container["Config"]["User"] not in ("", "root", "0", "0:0"), name
    assert project.execute("router", "import os; print(os.getuid())").strip() == "10001"


def test_only_the_router_is_published_and_workers_have_no_way_out(project: ComposeProject) -> None:
    published = {
        container["Config"]["Labels"]["com.docker.compose.service"]
        for container in project.containers()
        if any(container["NetworkSettings"]["Ports"].values())
    }
    assert published == {"router"}
    assert "unreachable" in project.execute("prefill", CALL_OUT)


def test_redis_wants_its_password(project: ComposeProject) -> None:
    program = "import redis; redis.Redis('redis').ping()"
    with pytest.raises(AssertionError, match="Authentication required"):
        project.execute("router", program)


def test_secrets_are_in_no_environment_and_no_log(project: ComposeProject) -> None:
    secrets = [path.read_text().split()[-1] for path in (ROOT / "deploy" / "secrets").iterdir()]
    shown = json.dumps(project.containers()) + project.logs()
    assert [secret for secret in secrets if secret in shown] == []


def test_another_model_is_one_variable_and_its_experts_are_shared_out_over_the_decode_containers(
    project: ComposeProject,
) -> None:
    project.up(HAS_EXPERTS)
    tokens = list(project.stream(prompt(1, 100), 32))
    assert len(tokens) == 32
    # A rank steps without tokens of its own only for the experts that it holds for the others.
    wait_until(
        lambda: (project.value("sum(baton_engine_idle_steps_total) > 0") or 0) > 0,
        "ranks work for each other",
    )


def test_prefill_scales_to_three(project: ComposeProject) -> None:
    project.up(HAS_EXPERTS, "--scale", "prefill=3", "--no-recreate")
    wait_until(
        lambda: project.value('sum(baton_router_workers{role="prefill"})') == 3, "three are registered"
    )
    for seed in range(2, 11):
        assert len(list(project.stream(prompt(seed, 300), 4))) == 4
    did_prefill = 'count(baton_prefill_prompt_tokens_total{role="prefill"} > 0)'
    wait_until(lambda: project.value(did_prefill) == 3, "each of them computed prompts")


def test_a_crashed_decode_rank_restarts_its_group_and_the_stream_goes_on(project: ComposeProject) -> None:
    undisturbed = list(project.stream(prompt(20, 200), 600))
    restarts_before = {service: num_restarts(project, service) for service in ("decode-0", "decode-1")}
    received = []
    with ThreadPoolExecutor(1) as pool:
        crash = None
        for token in project.stream(prompt(20, 200), 600):
            received.append(token)
            if len(received) == 20:
                crash = pool.submit(project.kill_process, "decode-1")
        assert crash is not None
    assert received == undisturbed
    assert num_restarts(project, "decode-1") > restarts_before["decode-1"]
    for service in ("decode-0", "decode-1"):
        wait_until(lambda s=service: is_healthy(project, s), f"{service} is healthy again", timeout_s=120)


def test_a_decode_container_that_is_removed_is_replaced_by_up(project: ComposeProject) -> None:
    project.compose("rm", "--stop", "--force", "decode-0")
    project.up(HAS_EXPERTS, "--scale", "prefill=3", "--no-recreate")
    assert len(list(project.stream(prompt(21, 200), 16))) == 16


def test_redis_cut_off_the_network_interrupts_nobody_and_is_found_again(project: ComposeProject) -> None:
    [redis] = project.containers("redis")
    [network] = redis["NetworkSettings"]["Networks"]
    undisturbed = list(project.stream(prompt(30, 100), 32))
    docker("network", "disconnect", network, redis["Id"])
    try:
        wait_until(lambda: project.value("min(baton_router_store_up)") == 0, "the router notices")
        time.sleep(8)  # longer than the lease of a worker
        assert list(project.stream(prompt(30, 100), 32)) == undisturbed
    finally:
        docker("network", "connect", "--alias", "redis", network, redis["Id"])
    wait_until(lambda: project.value("min(baton_router_store_up)") == 1, "the router is back at Redis")
    wait_until(lambda: project.value("min(baton_worker_store_up)") == 1, "the workers are back at Redis")
    assert list(project.stream(prompt(30, 100), 32)) == undisturbed


def dashboard_queries() -> dict[str, list[str]]:
    """PromQL of each dashboard's panels, as Grafana would send it."""
    queries: dict[str, list[str]] = {}
    for path in sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json")):
        text = path.read_text().replace("$__rate_interval", "1m").replace("$namespace", ".*")
        queries[path.stem] = list(_expressions(json.loads(text)))
    return queries


def _expressions(node: Any) -> Any:
    if isinstance(node, dict):
        if isinstance(node.get("expr"), str):
            yield node["expr"]
        for value in node.values():
            yield from _expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from _expressions(value)


@pytest.mark.parametrize("dashboard", list(dashboard_queries()))
def test_prometheus_has_data_for_every_query_of_a_dashboard(project: ComposeProject, dashboard: str) -> None:
    queries = dashboard_queries()[dashboard]
    assert queries
    series = project.query(*queries)
    assert [query for query, found in zip(queries, series, strict=True) if not found] == []


def test_rules_are_loaded_and_every_service_is_scraped(project: ComposeProject) -> None:
    wait_until(lambda: project.value("count(up == 1)") == 1 + 3 + 2, "router, 3 prefill, 2 decode are up")
    [series] = project.query("baton:requests:rate5m")
    assert series


def test_the_live_page_asks_for_the_admin_key(project: ComposeProject) -> None:
    key = (ROOT / "deploy" / "secrets" / "admin_key").read_text()
    assert project.client.get("/ui/events").status_code == 401
    with project.client.stream("GET", "/ui/events", headers={"Authorization": f"Bearer {key}"}) as response:
        assert response.status_code == 200
        assert "opening" in next(response.iter_lines())


def test_stopping_drains_within_the_grace_period(project: ComposeProject) -> None:
    stream = project.stream(prompt(40, 100), 200)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(project.compose, "stop", "router")
        assert len(list(stream)) >= 199
        stopping.result()
    [router] = project.containers("router")
    assert router["State"]["ExitCode"] == 0
    with pytest.raises(httpx.HTTPError):
        project.client.get("/health")
