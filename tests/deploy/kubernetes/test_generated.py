"""What is made from something else is up to date, and secrets are made safely."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import yaml

from tests.deploy.kubernetes.rendering import KUBERNETES
from tests.deploy.tools import DEPLOY, ROOT

_SECRETS = [sys.executable, str(KUBERNETES / "new_secrets.py")]


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )


def _overlay(directory: Path) -> Path:
    (directory / "kustomization.yaml").write_text("resources: []\n")
    return directory


def test_the_prometheus_rule_is_made_of_the_rule_files() -> None:
    result = _run(sys.executable, KUBERNETES / "make_prometheus_rule.py", "--check")
    assert result.returncode == 0, "run make dashboards"


def test_every_dashboard_is_a_config_map_that_grafana_finds(rendered) -> None:
    maps = [
        o
        for o in rendered("gpu-multi-node+all").of_kind("ConfigMap")
        if o["metadata"].get("labels", {}).get("grafana_dashboard") == "1"
    ]
    shipped = {p.name: json.loads(p.read_text()) for p in (DEPLOY / "grafana/dashboards").glob("*.json")}
    assert {name: json.loads(text) for o in maps for name, text in o["data"].items()} == shipped


def test_every_scraped_pod_gets_the_label_that_rules_ask_for(rendered) -> None:
    for monitor in rendered("gpu-multi-node+all").of_kind("PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            [relabeling] = endpoint["relabelings"]
            assert relabeling["targetLabel"] == "role"
            assert relabeling["sourceLabels"] == ["__meta_kubernetes_pod_label_app_kubernetes_io_component"]
    jobs = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    roles = [job["relabel_configs"][0]["replacement"] for job in jobs]
    assert roles == ["router", "prefill", "decode"]


def test_secrets_are_random_private_and_not_overwritten(tmp_path: Path) -> None:
    overlay = _overlay(tmp_path)
    assert _run(*_SECRETS, overlay).returncode == 0
    files = {path.name: path.read_text() for path in (overlay / "secrets").iterdir()}
    assert set(files) == {"redis-url", "redis-auth.conf", "admin-key"}
    for path in [overlay / "secrets", *(overlay / "secrets").iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    password = files["redis-auth.conf"].split()[1]
    assert len(password) >= 32
    assert files["redis-url"] == f"redis://:{password}@baton-redis:6379/0"
    again = _run(*_SECRETS, overlay)
    assert again.returncode == 1
    assert "--replace" in again.stderr
    assert (overlay / "secrets" / "admin-key").read_text() == files["admin-key"]
    assert _run(*_SECRETS, overlay, "--replace").returncode == 0
    assert (overlay / "secrets" / "admin-key").read_text() != files["admin-key"]


def test_a_url_of_your_own_redis_is_taken_over(tmp_path: Path) -> None:
    url = tmp_path / "url"
    url.write_text("rediss://user:word@redis.example.com:6380/0\n")
    assert _run(*_SECRETS, _overlay(tmp_path), "--redis-url-file", url).returncode == 0
    assert (tmp_path / "secrets" / "redis-url").read_text() == url.read_text().strip()


def test_a_directory_that_is_no_overlay_is_refused(tmp_path: Path) -> None:
    result = _run(*_SECRETS, tmp_path)
    assert (result.returncode, "kustomization.yaml" in result.stderr) == (2, True)


def test_git_ignores_the_secrets_of_every_overlay() -> None:
    for overlay in (KUBERNETES / "overlays").iterdir():
        assert _run("git", "check-ignore", "-q", overlay / "secrets" / "redis-url").returncode == 0, overlay
