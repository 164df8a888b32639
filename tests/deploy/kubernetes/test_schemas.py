"""Every object against its real schema; one that has none is a failure."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest

from tests.deploy.kubernetes.rendering import Manifests, Object

# The oldest release that has everything we use without a feature gate, and the newest that is known.
RELEASES = ("1.34", "1.37")


def _schema(directory: Path, api_version: str, kind: str) -> Object | None:
    path = directory / f"{kind.lower()}-{api_version.replace('/', '-')}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _check(o: Object, release: str, directory: Path) -> None:
    """Raises kubernetes_validate.SchemaNotFoundError when there is no schema at all."""
    schema = _schema(directory, o["apiVersion"], o["kind"])
    if schema is None:
        kubernetes_validate.validate(o, release, strict=True)
    else:
        jsonschema.Draft202012Validator(schema).validate(o)


@pytest.mark.parametrize("release", RELEASES)
def test_every_object_is_what_its_schema_says(manifests: Manifests, release: str, schemas: Path) -> None:
    for o in manifests.objects:
        _check(o, release, schemas)


@pytest.mark.parametrize("release", RELEASES)
def test_every_pod_template_is_what_its_schema_says(manifests: Manifests, release: str) -> None:
    for name, template in manifests.pods():
        o = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
        kubernetes_validate.validate(o, release, strict=True)


def test_an_unknown_field_is_refused(rendered, schemas: Path) -> None:
    router = copy.deepcopy(rendered("cpu-laptop").named("Deployment", "baton-router"))
    router["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        _check(router, RELEASES[-1], schemas)


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("LeaderWorkerSet", "gpu-multi-node"),
        ("ScaledObject", "gpu-multi-node+all"),
        ("PodMonitor", "gpu-multi-node+all"),
        ("PrometheusRule", "gpu-multi-node+all"),
        ("InferencePool", "gpu-multi-node+all"),
        ("HTTPRoute", "gpu-multi-node+all"),
    ],
)
def test_an_unknown_field_of_a_custom_resource_is_refused(
    rendered, schemas: Path, kind: str, variant: str
) -> None:
    o = copy.deepcopy(rendered(variant).of_kind(kind)[0])
    _check(o, RELEASES[-1], schemas)
    o["spec"]["replica"] = 3
    with pytest.raises(jsonschema.ValidationError):
        _check(o, RELEASES[-1], schemas)


def test_a_kind_without_a_schema_is_a_failure(schemas: Path) -> None:
    o = {"apiVersion": "example.com/v1", "kind": "Nothing", "metadata": {"name": "x"}, "spec": {}}
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        _check(o, RELEASES[-1], schemas)
