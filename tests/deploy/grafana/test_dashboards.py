"""The committed dashboards: made from the code, whole, and every query answered by a running Baton."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.live_prometheus import LivePrometheus, running_prometheus
from tests.deploy.tools import DEPLOY, ROOT
from tests.e2e.conftest import SMALL, random_prompt
from tests.e2e.stack import Stack, running_stack

GRAFANA = DEPLOY / "grafana"
BOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
ALERTS = DEPLOY / "prometheus" / "rules" / "alerts.yml"

# Queries without an answer here, by what they ask for.
WITHOUT_ANSWER = {
    r"DCGM_FI_\w+": "NVIDIA's DCGM exporter: only on machines with a GPU",
    r"baton_engine_load(s|ed|_seconds)": "loads from host memory: this load fits into the device's cache",
}
# A tier below the device, and a policy that hands prompts over although the decode workers are idle.
OPTIONS = ("--host-kv-bytes", str(16 << 20), "--policy", "least_loaded")


def _panels(path: Path) -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = json.loads(path.read_text())["panels"]
    return [panel for panel in panels if panel["type"] != "row"]


def _queries() -> list[tuple[str, str]]:
    """(where, PromQL) of all panels, with Grafana's variables filled in."""
    return [
        (
            f"{path.stem} / {panel['title']}",
            target["expr"].replace("$namespace", ".*").replace("$__rate_interval", "1m"),
        )
        for path in BOARDS
        for panel in _panels(path)
        for target in panel["targets"]
    ]


def test_the_dashboards_are_what_the_code_makes() -> None:
    command = [sys.executable, str(GRAFANA / "dashboards.py"), "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert result.returncode == 0, result.stderr


def test_there_is_a_dashboard_for_each_subject() -> None:
    subjects = ["experts", "handoff-kv", "latency", "overview", "resources", "routing"]
    assert [path.stem for path in BOARDS] == [f"baton-{subject}" for subject in subjects]


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap_and_use_the_chosen_data_source(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    board = json.loads(path.read_text())
    assert board["uid"] == path.stem
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert all(0 <= x < 24 for x, _ in cells)
        taken |= cells
    for panel in _panels(path):
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


def test_provisioning_names_the_folder_and_the_data_source() -> None:
    sources = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())
    assert [source["type"] for source in sources["datasources"]] == ["prometheus"]
    providers = yaml.safe_load((GRAFANA / "provisioning/dashboards/baton.yaml").read_text())
    assert providers["providers"][0]["options"]["path"] == "/var/lib/grafana/dashboards"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    command = [sys.executable, "-m", "baton", "make-checkpoint", str(directory), "--arch", "deepseek_v3"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    return directory


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePrometheus]:
    """Baton with a prefill worker and a decode group of two ranks, under load, and its Prometheus."""
    work_dir = tmp_path_factory.mktemp("live")
    with (
        running_stack(tiny_model, work_dir / "baton", "--ep-size", "2", *OPTIONS, *SMALL) as stack,
        running_prometheus(stack, work_dir / "prometheus") as prometheus,
        _Load(stack),
    ):
        yield prometheus


class _Load:
    """Three clients, each with prompts long enough to be handed off, until the end of the block."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._stop = threading.Event()
        self._clients = [threading.Thread(target=self._ask, args=(number,)) for number in range(3)]

    def __enter__(self) -> None:
        for client in self._clients:
            client.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.join()

    def _ask(self, client: int) -> None:
        shared = random_prompt(client, 64)
        number = 0
        while not self._stop.wait(0.2):  # others need the processor too
            number += 1
            self._stack.output_ids(shared + random_prompt(1000 * client + number, 64), 48)


def _until_answered(
    prometheus: LivePrometheus, queries: list[tuple[str, str]], timeout_s: float
) -> list[str]:
    """The queries that still have no series, or only NaN, after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    open_queries = list(queries)
    while open_queries and time.monotonic() < deadline:
        time.sleep(1.0)  # a scrape is the event, and Prometheus tells nobody of it
        open_queries = [(where, expr) for where, expr in open_queries if not _has_numbers(prometheus, expr)]
    return [f"{where}: {expr}" for where, expr in open_queries]


def _has_numbers(prometheus: LivePrometheus, expr: str) -> bool:
    return any(series["value"][1] != "NaN" for series in prometheus.query(expr))


@pytest.mark.e2e
@pytest.mark.slow
def test_every_query_of_every_dashboard_is_answered(live: LivePrometheus) -> None:
    expected = [
        (where, expr)
        for where, expr in _queries()
        if not any(re.search(pattern, expr) for pattern in WITHOUT_ANSWER)
    ]
    for _, expr in _queries():
        live.query(expr)  # accepted, also where nothing answers
    assert _until_answered(live, expected, timeout_s=100) == []


@pytest.mark.e2e
@pytest.mark.slow
def test_every_alert_is_accepted_and_what_it_looks_at_is_there(live: LivePrometheus) -> None:
    rules = [r for group in yaml.safe_load(ALERTS.read_text())["groups"] for r in group["rules"]]
    looked_at = []
    for rule in rules:
        live.query(rule["expr"])
        selectors = re.findall(
            r"(?:baton_\w+|baton:[\w:]+|\bup)(?:\{[^}]*\})?|\{__name__[^}]*\}", rule["expr"]
        )
        assert selectors, rule["alert"]
        looked_at += [(rule["alert"], selector) for selector in selectors]
    assert _until_answered(live, looked_at, timeout_s=100) == []
    assert live.rule_errors() == []
