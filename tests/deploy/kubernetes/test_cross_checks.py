"""What no schema knows: that the parts fit each other and the programs they start."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from decode_svc.settings import DecodeSettings
from prefill_svc.settings import PrefillSettings
from router.settings import RouterSettings
from servicekit.settings import load_settings
from tests.deploy.kubernetes.rendering import VARIANTS, Manifests, Object
from tests.deploy.kubernetes.start import container_environment, with_local_files
from tests.deploy.tools import DEPLOY

SERVICES = {
    "router": ("BATON_ROUTER", RouterSettings),
    "prefill": ("BATON_PREFILL", PrefillSettings),
    "decode": ("BATON_DECODE", DecodeSettings),
}
# Made by others: the endpoint picker of the gateway.
FOREIGN = {("Service", "baton-epp"), ("Gateway", "inference")}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")


def _walk(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _walk(value, (*path, str(key)))


def _component(template: Object) -> str:
    return str(template["metadata"]["labels"]["app.kubernetes.io/component"])


def _main(template: Object) -> Object:
    return template["spec"]["containers"][0]


def _matches(selector: Object, labels: Object) -> bool:
    wanted = selector.get("matchLabels", {})
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    return all(
        labels.get(e["key"]) in e["values"]
        for e in selector.get("matchExpressions", ())
        if e["operator"] == "In"
    )


def _baton_pods(manifests: Manifests) -> list[tuple[str, Object]]:
    return [(name, pod) for name, pod in manifests.pods() if _component(pod) in SERVICES]


def test_every_role_is_there(manifests: Manifests) -> None:
    roles = {_component(template) for _, template in manifests.pods()}
    redis = set() if manifests.variant == "gpu-single-node+all" else {"redis"}
    assert roles == {"router", "prefill", "decode"} | redis


def test_numbers_of_pods_are_the_autoscaler_s_where_there_is_one(manifests: Manifests) -> None:
    scaled = {
        (o["spec"]["scaleTargetRef"]["kind"], o["spec"]["scaleTargetRef"]["name"])
        for o in manifests.of_kind("HorizontalPodAutoscaler", "ScaledObject")
    }
    assert len(scaled) in (0, 3)
    for o in manifests.of_kind("Deployment", "StatefulSet", "LeaderWorkerSet"):
        is_scaled = (o["kind"], o["metadata"]["name"]) in scaled
        assert ("replicas" in o["spec"]) is not is_scaled, o["metadata"]["name"]
    if not scaled:
        assert manifests.named("Deployment", "baton-router")["spec"]["replicas"] == 2


def test_owners_select_the_pods_that_they_make(manifests: Manifests) -> None:
    for owner in manifests.of_kind("Deployment", "StatefulSet"):
        assert _matches(owner["spec"]["selector"], owner["spec"]["template"]["metadata"]["labels"])


def test_selectors_of_everything_else_find_pods(manifests: Manifests) -> None:
    labels = [template["metadata"]["labels"] for _, template in manifests.pods()]
    selectors = [(o, {"matchLabels": o["spec"]["selector"]}) for o in manifests.of_kind("Service")]
    kinds = ("PodDisruptionBudget", "PodMonitor", "InferencePool")
    selectors += [(o, o["spec"]["selector"]) for o in manifests.of_kind(*kinds)]
    for policy in manifests.of_kind("NetworkPolicy"):
        spec = policy["spec"]
        selectors.append((policy, spec["podSelector"]))
        for rule in [*spec.get("ingress", ()), *spec.get("egress", ())]:
            peers = [*rule.get("from", ()), *rule.get("to", ())]
            selectors += [(policy, peer["podSelector"]) for peer in peers if "podSelector" in peer]
    for o, selector in selectors:
        assert any(_matches(selector, pod) for pod in labels), (o["metadata"]["name"], selector)


def _ports(template: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in _main(template).get("ports", ())}


def _find(manifests: Manifests, selector: Object) -> list[Object]:
    return [t for _, t in manifests.pods() if _matches(selector, t["metadata"]["labels"])]


def test_ports_that_are_named_exist_where_they_are_looked_for(manifests: Manifests) -> None:
    for service in manifests.of_kind("Service"):
        for template in _find(manifests, {"matchLabels": service["spec"]["selector"]}):
            for port in service["spec"]["ports"]:
                assert port["targetPort"] in _ports(template), service["metadata"]["name"]
    for monitor in manifests.of_kind("PodMonitor"):
        for template in _find(manifests, monitor["spec"]["selector"]):
            assert {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]} <= set(_ports(template))
    for policy in manifests.of_kind("NetworkPolicy"):
        for template in _find(manifests, policy["spec"]["podSelector"]):
            named = [p["port"] for rule in policy["spec"].get("ingress", ()) for p in rule.get("ports", ())]
            assert all(port in _ports(template) for port in named), policy["metadata"]["name"]
    for pool in manifests.of_kind("InferencePool"):
        for template in _find(manifests, pool["spec"]["selector"]):
            assert [p["number"] for p in pool["spec"]["targetPorts"]] == [_ports(template)["http"]]


def test_egress_goes_to_ports_that_exist(manifests: Manifests) -> None:
    for policy in manifests.of_kind("NetworkPolicy"):
        for rule in policy["spec"].get("egress", ()):
            for peer in rule.get("to", ()):
                for template in _find(manifests, peer["podSelector"]):
                    numbers = {p["port"] for p in rule.get("ports", ())}
                    assert numbers <= set(_ports(template).values()), policy["metadata"]["name"]


def test_only_the_router_lets_anybody_in(manifests: Manifests) -> None:
    open_to_all = [
        policy["metadata"]["name"]
        for policy in manifests.of_kind("NetworkPolicy")
        if any("from" not in rule for rule in policy["spec"].get("ingress", ()))
    ]
    assert open_to_all == ["baton-router"]
    deny = manifests.named("NetworkPolicy", "baton-default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_the_ports_of_the_settings_are_the_ports_of_the_container(manifests: Manifests) -> None:
    for name, template in _baton_pods(manifests):
        role = _component(template)
        prefix = SERVICES[role][0]
        environment = container_environment(manifests, _main(template))
        ports = _ports(template)
        assert environment[f"{prefix}_HOST"] == "0.0.0.0", name
        if role == "router":
            assert int(environment["BATON_ROUTER_PORT"]) == ports["http"]
        else:
            assert int(environment[f"{prefix}_PORT"]) == ports["grpc"]
            assert int(environment[f"{prefix}_METRICS_PORT"]) == ports["metrics"]
        if "BATON_DECODE_EP_ADDRESS" in environment:
            assert environment["BATON_DECODE_EP_ADDRESS"].endswith(f":{ports['group']}")


def test_variables_are_settings_that_the_service_has(manifests: Manifests, tmp_path: Path) -> None:
    for name, template in _baton_pods(manifests):
        prefix, settings = SERVICES[_component(template)]
        environment = container_environment(manifests, _main(template))
        foreign = [v for v in environment if v.startswith("BATON_") and not v.startswith(prefix)]
        assert foreign == [], name
        load_settings(settings, prefix, with_local_files(manifests, template, environment, tmp_path))


def _there(manifests: Manifests) -> set[tuple[str, str]]:
    return {(o["kind"], o["metadata"]["name"]) for o in manifests.objects} | FOREIGN


def _named(spec: Object) -> Iterator[tuple[str, str]]:
    """(kind, name) of what a pod cannot start without."""
    yield "ServiceAccount", spec["serviceAccountName"]
    for path, value in _walk(spec):
        match path[-2:]:
            case (_, "secretName") | ("secretRef" | "secretKeyRef", "name"):
                yield "Secret", value
            case ("configMapRef" | "configMapKeyRef" | "configMap", "name"):
                yield "ConfigMap", value
            case ("persistentVolumeClaim", "claimName"):
                yield "PersistentVolumeClaim", value


def test_what_pods_name_is_there(manifests: Manifests) -> None:
    there = _there(manifests)
    for name, template in manifests.pods():
        assert set(_named(template["spec"])) <= there, name


def test_what_other_objects_name_is_there(manifests: Manifests) -> None:
    there = _there(manifests)
    for owner in manifests.of_kind("StatefulSet"):
        assert ("Service", owner["spec"]["serviceName"]) in there
    for o in manifests.of_kind("HorizontalPodAutoscaler", "ScaledObject"):
        target = o["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in there, o["metadata"]["name"]
    for pool in manifests.of_kind("InferencePool"):
        assert ("Service", pool["spec"]["endpointPickerRef"]["name"]) in there
    for route in manifests.of_kind("HTTPRoute"):
        for rule in route["spec"]["rules"]:
            assert all((ref["kind"], ref["name"]) in there for ref in rule["backendRefs"])


def test_files_that_settings_name_are_in_the_mounted_secrets(manifests: Manifests) -> None:
    for name, template in _baton_pods(manifests):
        environment = container_environment(manifests, _main(template))
        mounts = {m["mountPath"]: m["name"] for m in _main(template)["volumeMounts"]}
        volumes = {v["name"]: v for v in template["spec"]["volumes"]}
        secret = manifests.named("Secret", volumes[mounts["/run/secrets/baton"]]["secret"]["secretName"])
        named = {path.rpartition("/") for key, path in environment.items() if key.endswith("_FILE")}
        assert named, name
        assert {directory for directory, _, _ in named} == {"/run/secrets/baton"}
        assert {file for _, _, file in named} == set(secret["data"]), name


def test_the_disk_tier_fits_into_its_volume(manifests: Manifests) -> None:
    for name, template in _baton_pods(manifests):
        prefix = SERVICES[_component(template)][0]
        environment = container_environment(manifests, _main(template))
        directory = environment.get(f"{prefix}_DISK_KV_DIR")
        if directory is None:
            continue
        [volume] = [m["name"] for m in _main(template)["volumeMounts"] if m["mountPath"] == directory]
        [size] = [v["emptyDir"]["sizeLimit"] for v in template["spec"]["volumes"] if v["name"] == volume]
        assert int(environment[f"{prefix}_DISK_KV_BYTES"]) < _amount(size), name
        memory = _amount(_main(template)["resources"]["limits"]["memory"])
        assert int(environment[f"{prefix}_HOST_KV_BYTES"]) < memory / 2, name


def test_volumes_are_mounted_and_mounts_have_volumes(manifests: Manifests) -> None:
    for name, template in manifests.pods():
        containers = [*template["spec"]["containers"], *template["spec"].get("initContainers", ())]
        mounted = {mount["name"] for c in containers for mount in c["volumeMounts"]}
        assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}, name


def test_quantities_can_be_read_and_requests_stay_within_limits(manifests: Manifests) -> None:
    for name, template in manifests.pods():
        for container in [*template["spec"]["containers"], *template["spec"].get("initContainers", ())]:
            resources = container["resources"]
            for quantity in [*resources["requests"].values(), *resources["limits"].values()]:
                assert _QUANTITY.fullmatch(str(quantity)), (name, quantity)
            for resource, limit in resources["limits"].items():
                assert _amount(resources["requests"][resource]) <= _amount(limit), (name, resource)
    for claim in manifests.of_kind("PersistentVolumeClaim"):
        assert _QUANTITY.fullmatch(claim["spec"]["resources"]["requests"]["storage"])
    for path, value in ((p, v) for o in manifests.objects for p, v in _walk(o) if p[-1:] == ("sizeLimit",)):
        assert _QUANTITY.fullmatch(value), path


def _amount(quantity: Any) -> Decimal:
    match = _QUANTITY.fullmatch(str(quantity))
    assert match is not None
    powers = {None: Decimal(1), "m": Decimal("0.001")}
    powers |= {unit: Decimal(1000) ** n for n, unit in enumerate(("k", "M", "G", "T", "P", "E"), 1)}
    powers |= {unit: Decimal(1024) ** n for n, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)}
    return Decimal(match[1]) * powers[match[2]]


def test_the_grace_period_is_longer_than_the_drain(manifests: Manifests) -> None:
    for name, template in _baton_pods(manifests):
        role = _component(template)
        environment = container_environment(manifests, _main(template))
        pre_stop = _main(template).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if role == "router":
            needed = pre_stop + float(environment["BATON_ROUTER_DRAIN_GRACE_S"]) + 2
        else:
            drain_s = float(environment[f"{SERVICES[role][0]}_DRAIN_S"])
            others_s = drain_s if role == "decode" else 0  # worker_process: the other ranks of its group
            needed = pre_stop + drain_s + others_s + 10
        grace = template["spec"]["terminationGracePeriodSeconds"]
        assert needed + 5 <= grace, (name, needed, grace)


def test_routers_leave_the_endpoints_before_they_refuse(manifests: Manifests) -> None:
    router = _main(manifests.named("Deployment", "baton-router")["spec"]["template"])
    assert router["lifecycle"]["preStop"]["sleep"]["seconds"] >= 5


def test_probes_tell_start_ready_and_alive_apart(manifests: Manifests) -> None:
    for name, template in _baton_pods(manifests):
        is_router = _component(template) == "router"
        container = _main(template)
        paths = {
            probe: container[f"{probe}Probe"]["httpGet"]["path"]
            for probe in ("startup", "readiness", "liveness")
        }
        alive, ready = ("/health", "/ready") if is_router else ("/healthz", "/readyz")
        assert paths == {"startup": alive, "readiness": ready, "liveness": alive}, name
        port = "http" if is_router else "metrics"
        assert all(container[f"{probe}Probe"]["httpGet"]["port"] == port for probe in paths)
        # The check of the event loop takes up to 2 s before it says no.
        assert container["livenessProbe"]["timeoutSeconds"] > 2


def test_pods_have_no_rights(manifests: Manifests) -> None:
    has_rdma = manifests.variant == "gpu-multi-node+all"
    assert manifests.of_kind("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding") == []
    assert not manifests.named("ServiceAccount", "baton")["automountServiceAccountToken"]
    for name, template in manifests.pods():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        if _component(template) in SERVICES:
            assert spec["securityContext"]["runAsUser"] == 10001
        for container in [*spec["containers"], *spec.get("initContainers", ())]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            is_pinning = has_rdma and _component(template) in ("prefill", "decode")
            added = {"add": ["IPC_LOCK"]} if is_pinning else {}
            assert context["capabilities"] == {"drop": ["ALL"], **added}, name


def test_secrets_are_nowhere_but_in_secrets(manifests: Manifests) -> None:
    assert {s["metadata"]["name"].rsplit("-", 1)[0] for s in manifests.of_kind("Secret")} == {
        "baton-router",
        "baton-worker",
        "baton-redis",
    }
    for o in manifests.objects:
        if o["kind"] != "Secret":
            assert not re.search(r"redis[s]?://[^/]*@", str(o)), o["metadata"]["name"]


def test_images_are_named_with_a_version(manifests: Manifests) -> None:
    device = "cpu" if manifests.variant.startswith("cpu") else "cuda"
    images = {
        c["image"]
        for _, template in manifests.pods()
        for c in [*template["spec"]["containers"], *template["spec"].get("initContainers", ())]
    }
    wanted = {"baton-router:0.1.0", f"baton-worker-{device}:0.1.0"}
    wanted |= {"baton-model:0.1.0"} if device == "cpu" else set()
    wanted |= set() if manifests.variant == "gpu-single-node+all" else {_compose_image("redis")}
    assert images == wanted


def _compose_image(service: str) -> str:
    return str(yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][service]["image"])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith("gpu-multi")])
def test_a_decode_group_is_one_expert_parallel_group(rendered, variant: str, tmp_path: Path) -> None:
    manifests = rendered(variant)
    assert [o["metadata"]["name"] for o in manifests.of_kind("StatefulSet")] == ["baton-redis"]
    [group] = manifests.of_kind("LeaderWorkerSet")
    assert group["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
    template = group["spec"]["leaderWorkerTemplate"]["workerTemplate"]
    environment = container_environment(manifests, _main(template), rank=3, group_size=8)
    environment = with_local_files(manifests, template, environment, tmp_path)
    settings = load_settings(DecodeSettings, "BATON_DECODE", environment)
    assert (settings.ep_rank, settings.ep_size) == (3, 8)
    assert settings.ep_address == f"{settings.group_id}:7001"


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "+" in v])
def test_autoscalers_and_gateways_ask_for_metrics_that_exist(rendered, variant: str) -> None:
    from docs.operations_tables import build_tables

    tables = build_tables()
    known = set(re.findall(r"`((?:baton_|vllm:)\w+)`", "".join(tables.values())))
    manifests = rendered(variant)
    asked = [
        metric["pods"]["metric"]["name"]
        for o in manifests.of_kind("HorizontalPodAutoscaler")
        for metric in o["spec"]["metrics"]
        if metric["type"] == "Pods"
    ]
    for o in manifests.of_kind("ScaledObject"):
        for trigger in o["spec"]["triggers"]:
            asked += re.findall(r"baton_\w+", trigger["metadata"].get("query", ""))
    assert asked
    assert set(asked) <= known


def test_a_pool_of_routers_has_the_numbers_that_endpoint_pickers_read() -> None:
    from router.vllm_metrics import ROUTER_NAMES

    names = {name.other for name in ROUTER_NAMES}
    assert {"vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"} <= names
