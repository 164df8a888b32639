"""The shipped images and compose file on a real engine, with real faults: one stack, in the file's order."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.deploy.compose_project import ROOT, ComposeProject, docker
from tests.deploy.grafana.test_dashboards import WITHOUT_ANSWER

pytestmark = [pytest.mark.containers, pytest.mark.timeout(900)]

DEFAULT = "baton-demo"
SPEAKS = "SmolLM2-135M-Instruct"
HAS_EXPERTS = "tiny-experts"


def wait_until(condition: Callable[[], bool], what: str | Callable[[], str], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        shown = what if isinstance(what, str) else what()
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {shown}"
        time.sleep(0.5)  # containers change what is waited for: there is no event to wait on


def prompt(seed: int, num_tokens: int) -> list[int]:
    return [3 + (seed * 7919 + i * i * 31) % 4000 for i in range(num_tokens)]


def num_restarts(project: ComposeProject, service: str) -> int:
    return sum(container["RestartCount"] for container in project.containers(service))


def num_migrations(project: ComposeProject) -> float:
    page = project.client.get("/metrics").text
    return sum(map(float, re.findall(r"^baton_router_migrations_total(?:{.*})? (\S+)$", page, re.MULTILINE)))


def is_healthy(project: ComposeProject, service: str) -> bool:
    containers = project.containers(service)
    return all(c["State"].get("Health", {}).get("Status") == "healthy" for c in containers)


def test_the_stack_comes_up_as_shipped_and_its_default_model_answers(project: ComposeProject) -> None:
    project.up(DEFAULT)
    answer = project.chat("What is the capital of France?", temperature=0, max_tokens=40)
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_a_model_without_experts_is_one_variable_and_answers_too(project: ComposeProject) -> None:
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


def test_only_the_router_is_published_and_the_others_are_on_networks_without_a_way_out(
    project: ComposeProject,
) -> None:
    published = {
        container["Config"]["Labels"]["com.docker.compose.service"]
        for container in project.containers()
        if any(container["NetworkSettings"]["Ports"].values())
    }
    assert published == {"router"}
    for container in project.containers():
        if container["Config"]["Labels"]["com.docker.compose.service"] not in ("router", "model"):
            networks = list(container["NetworkSettings"]["Networks"])
            inspected = json.loads(docker("network", "inspect", *networks))
            assert [network["Internal"] for network in inspected] == [True], container["Name"]


def test_redis_wants_its_password(project: ComposeProject) -> None:
    program = "import redis; redis.Redis('redis').ping()"
    with pytest.raises(AssertionError, match="AuthenticationError"):
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
        lambda: project.value('sum(baton_router_workers{worker_role="prefill"})') == 3, "three are registered"
    )
    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda seed: list(project.stream(prompt(seed, 600), 4)), range(2, 11)))
    assert [len(answer) for answer in answers] == [4] * 9
    did_prefill = 'count(baton_prefill_prompt_tokens_total{role="prefill"} > 0)'
    wait_until(lambda: project.value(did_prefill) == 3, "each of them computed prompts")


def test_a_crashed_decode_rank_restarts_its_group_and_the_stream_goes_on(project: ComposeProject) -> None:
    ranks = ("decode-0", "decode-1")
    undisturbed = list(project.stream(prompt(20, 200), 600))
    assert len(undisturbed) == 600
    restarts_before = [num_restarts(project, rank) for rank in ranks]
    migrations_before = num_migrations(project)
    received = []
    with ThreadPoolExecutor(1) as pool:
        for token in project.stream(prompt(20, 200), 600):
            received.append(token)
            if len(received) == 20:
                crash = pool.submit(project.kill_process, "decode-1")
        crash.result()
    assert received == undisturbed
    assert num_migrations(project) > migrations_before
    restarts = [num_restarts(project, rank) for rank in ranks]
    assert all(now > before for now, before in zip(restarts, restarts_before, strict=True))
    for rank in ranks:
        wait_until(lambda rank=rank: is_healthy(project, rank), f"{rank} is healthy again", timeout_s=120)


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


def dashboard_queries() -> list[str]:
    """PromQL of all panels as Grafana would send it, without what no Baton answers."""
    queries = []
    for path in sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            queries += [target["expr"] for target in panel.get("targets", ())]
    queries = [q.replace("$__rate_interval", "1m").replace("$namespace", ".*") for q in queries]
    return [q for q in queries if not any(re.search(pattern, q) for pattern in WITHOUT_ANSWER)]


def test_prometheus_answers_every_query_of_every_dashboard(project: ComposeProject) -> None:
    stop = threading.Event()

    def ask(client: int) -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            list(project.stream(prompt(1000 * client + number, 128), 48))

    open_queries = dashboard_queries()
    assert len(open_queries) > 50

    def all_answered() -> bool:
        answers = project.query(*open_queries)
        open_queries[:] = [
            query
            for query, series in zip(open_queries, answers, strict=True)
            if all(one["value"][1] == "NaN" for one in series)
        ]
        return not open_queries

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(ask, client) for client in range(3)]
        try:
            wait_until(all_answered, lambda: f"answers to {open_queries}", timeout_s=100)
        finally:
            stop.set()
        for client in clients:
            client.result()


def test_rules_are_loaded_and_every_service_is_scraped(project: ComposeProject) -> None:
    wait_until(lambda: project.value("count(up == 1)") == 1 + 3 + 2, "router, 3 prefill, 2 decode are up")
    [series] = project.query("baton:requests:rate5m")
    assert series


def test_the_live_page_asks_for_the_admin_key(project: ComposeProject) -> None:
    key = (ROOT / "deploy" / "secrets" / "admin_key").read_text()
    assert project.client.get("/ui/events").status_code == 401
    with project.client.stream("GET", "/ui/events", headers={"Authorization": f"Bearer {key}"}) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert "opening" in next(line for line in lines if line.startswith("event:"))


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
