"""The lock files, the bills of materials and the Dockerfile agree with pyproject.toml. Without a network."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from baton.up.model_store import INSTALL_SMOLLM2
from tests.deploy.compose_project import ROOT


def _load_lock_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy_lock", ROOT / "deploy" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["deploy_lock"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


lock_module = _load_lock_module()
LOCKS = {lock.name: lock for lock in lock_module.locks()}
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_was_resolved_from_what_pyproject_says_now(name: str) -> None:
    first_line = LOCKS[name].path.read_text().splitlines()[0]
    assert LOCKS[name].digest in first_line, "run make lock"


@pytest.mark.parametrize("name", LOCKS)
def test_every_requirement_is_pinned_within_its_range_and_has_hashes(name: str) -> None:
    lock = LOCKS[name]
    text = lock.path.read_text()
    pins = lock_module.pins(text)
    for requirement in map(Requirement, lock.requirements):
        if requirement.name == "torch" and not lock.has_torch:
            continue
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}"
    entries = re.findall(r"^\S+==.*(?:\n    .*)*", text, re.MULTILINE)
    assert len(entries) == len(pins)
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []


def test_the_router_s_lock_file_has_no_torch_and_only_cuda_s_has_nvidia_packages() -> None:
    pins = {name: lock_module.pins(lock.path.read_text()) for name, lock in LOCKS.items()}
    assert "torch" not in pins["router"]
    with_nvidia = [name for name, found in pins.items() if any(p.startswith("nvidia-") for p in found)]
    assert with_nvidia == ["worker-cuda"]


@pytest.mark.parametrize("name", sorted(LOCKS.keys() - {"build"}))
def test_a_bill_of_materials_lists_what_its_lock_file_pins(name: str) -> None:
    lock = LOCKS[name]
    expected = lock_module.pins(lock.path.read_text() + ("" if lock.has_torch else lock_module.TORCH))
    bom: dict[str, Any] = json.loads((ROOT / "deploy" / "sbom" / f"{name}.cdx.json").read_text())
    listed = {canonicalize_name(c["name"]): c["version"] for c in bom["components"]}
    assert listed == expected


def test_torch_and_the_default_model_have_one_version_everywhere() -> None:
    makefile = dict(re.findall(r"^(\w+) \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert makefile["TORCH"] == lock_module.TORCH
    assert makefile["SMOLLM2"] == lock_module.SMOLLM2
    assert INSTALL_SMOLLM2.endswith(f" {lock_module.SMOLLM2}")
    assert f"ARG TORCH={lock_module.TORCH}\n" in DOCKERFILE


def test_the_dockerfile_needs_no_particular_builder_and_installs_nothing_unpinned() -> None:
    assert "# syntax" not in DOCKERFILE
    assert re.findall(r"^(?:RUN --mount|COPY --(?:link|chmod)|ADD |.*<<)", DOCKERFILE, re.MULTILINE) == []
    installs = re.findall(r"install-locked /opt/.*|pip install .*", DOCKERFILE)
    loose = [line for line in installs if "--require-hashes" not in line]
    assert [line.split()[1] for line in loose] == ["/opt/baton", "/opt/torch"]


def test_the_images_hold_every_package_that_is_installed() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [p.rstrip("*") for p in pyproject["tool"]["setuptools"]["packages"]["find"]["include"]]
    copied = re.findall(r"^COPY (\w+) \1$", DOCKERFILE, re.MULTILINE)
    assert sorted(copied) == sorted(packages)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert [package for package in packages if f"!{package}" not in ignored] == []


@pytest.mark.parametrize("target", ["router", "worker-cpu", "model", "worker-cuda"])
def test_every_image_runs_as_a_user_without_rights(target: str) -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    [stage] = [text for text in stages if re.match(rf"\S+ AS {target}\n", text)]
    parent = "worker-cpu" if target == "model" else target
    [user_stage] = [text for text in stages if re.match(rf"\S+ AS {parent}\n", text)]
    assert re.findall(r"^USER (.*)$", user_stage, re.MULTILINE) == ["10001:10001"]
    assert re.search(r"^ENTRYPOINT \[", stage, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK ", stage, re.MULTILINE)
