"""A container of the manifests as a process here: its command with its environment."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from tests.deploy.kubernetes.rendering import Manifests, Object

_REFERENCE = re.compile(r"\$\((\w+)\)")


def container_environment(
    manifests: Manifests, container: Object, *, pod: str = "pod-0", rank: int = 0, group_size: int = 1
) -> dict[str, str]:
    """As the kubelet makes it. `rank`, `group_size`: what the LeaderWorkerSet controller adds, in front."""
    environment = {
        "LWS_LEADER_ADDRESS": "baton-decode-0.baton-decode.baton",
        "LWS_GROUP_SIZE": str(group_size),
        "LWS_WORKER_INDEX": str(rank),
    }
    for source in container.get("envFrom", ()):
        environment |= manifests.named("ConfigMap", source["configMapRef"]["name"])["data"]
    fields = {"metadata.name": pod, "status.podIP": "127.0.0.1"}
    for variable in container.get("env", ()):
        environment[variable["name"]] = _value(variable, environment, fields)
    return environment


def with_local_files(
    manifests: Manifests, template: Object, environment: dict[str, str], directory: Path
) -> dict[str, str]:
    """The same, with the files of the pod's Secrets under `directory` and variables that name them there."""
    mounts = {
        mount["name"]: mount["mountPath"] for mount in template["spec"]["containers"][0]["volumeMounts"]
    }
    moved: dict[str, str] = {}
    for volume in template["spec"]["volumes"]:
        if "secret" not in volume:
            continue
        for file, content in manifests.named("Secret", volume["secret"]["secretName"])["data"].items():
            path = directory / file
            path.write_bytes(base64.b64decode(content))
            moved[f"{mounts[volume['name']]}/{file}"] = str(path)
    return {name: moved.get(value, value) for name, value in environment.items()}


def _value(variable: dict[str, Any], earlier: dict[str, str], fields: dict[str, str]) -> str:
    if "valueFrom" in variable:
        return fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
    # A reference to what is not set earlier stays as it is, as in Kubernetes.
    return _REFERENCE.sub(lambda match: earlier.get(match[1], match[0]), str(variable["value"]))
