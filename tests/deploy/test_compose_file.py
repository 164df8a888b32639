"""compose.yaml and what lies around it, without an engine."""

from __future__ import annotations

import dataclasses
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from decode_svc.settings import DecodeSettings
from prefill_svc.settings import PrefillSettings
from router.settings import RouterSettings
from tests.deploy.compose_project import COMPOSE_FILE, ROOT, compose_command

TEXT = COMPOSE_FILE.read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
DEPLOY = ROOT / "deploy"
SETTINGS = {"ROUTER": RouterSettings, "PREFILL": PrefillSettings, "DECODE": DecodeSettings}


@pytest.mark.parametrize("profile", ["cpu", "gpu", "observability"])
def test_compose_itself_accepts_the_file(profile: str) -> None:
    command = compose_command()
    if command is None:
        pytest.skip("no compose here: make test-containers installs it")
    arguments = ["--file", str(COMPOSE_FILE), "--profile", profile, "config", "--quiet"]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=50)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_without_rights_and_within_limits(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert service["restart"] == ("no" if name == "model" else "unless-stopped")
    assert "container_name" not in service  # --scale could not give a second one its own


def test_what_is_published_is_published_on_loopback_unless_one_says_otherwise() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {
        "router": ["${ROUTER_ADDRESS:-127.0.0.1}:${ROUTER_PORT:-8000}:8000"],
        "grafana": ["127.0.0.1:${GRAFANA_PORT:-3000}:3000"],
    }


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - {"router", "grafana", "otel-collector", "model"}))
def test_workers_and_stores_are_on_the_network_without_a_way_out_only(name: str) -> None:
    assert list(SERVICES[name]["networks"]) == ["inside"]
    assert yaml.safe_load(TEXT)["networks"]["inside"] == {"internal": True}


def test_images_of_others_have_a_version() -> None:
    foreign = {s["image"] for s in SERVICES.values() if not s["image"].startswith("baton-")}
    assert [image for image in foreign if not re.search(r":v?\d+\.\d+", image)] == []


def test_every_setting_that_is_given_exists() -> None:
    later = {"host_kv_bytes", "disk_kv_dir", "disk_kv_bytes"}  # without a value here
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if not variable.startswith("BATON_"):
                continue
            _, role, field = variable.removesuffix("_FILE").split("_", 2)
            known = {f.name for f in dataclasses.fields(SETTINGS[role])}
            assert field.lower() in known or (value is None and field.lower() in later), variable


def test_the_environment_file_has_exactly_the_variables_that_are_used() -> None:
    used = set(re.findall(r"\$\{(\w+)", TEXT)) | {"COMPOSE_PROFILES"}
    environment_file = (DEPLOY / ".env").read_text()
    given = set(re.findall(r"^#?([A-Z][A-Z_]+)=", environment_file, re.MULTILINE))
    given = {name for name in given if not name.startswith("BATON_")}
    assert given == used


def test_secrets_are_made_once_and_changed_by_removing_them(tmp_path: Path) -> None:
    script = shutil.copy(DEPLOY / "new-secrets.sh", tmp_path)

    def make() -> dict[str, str]:
        subprocess.run([script], check=True, stdout=subprocess.PIPE, timeout=20)
        return {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}

    first = make()
    assert set(first) == {entry["file"].rsplit("/")[-1] for entry in yaml.safe_load(TEXT)["secrets"].values()}
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    password = re.fullmatch(r"requirepass (\w{48})\n", first["redis_auth.conf"])
    assert password is not None
    assert first["redis_url"] == f"redis://:{password[1]}@redis:6379/0\n"
    assert make() == first
    (tmp_path / "secrets" / "admin_key").unlink()
    second = make()
    assert {name for name in first if first[name] != second[name]} == {"admin_key"}
