"""Keeps the tables of settings and metrics in docs/operations.md equal to the code.

python docs/operations_tables.py            rewrite the tables
python docs/operations_tables.py --check    exit 1 if they differ
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "operations.md"
RULES = ROOT / "deploy" / "prometheus" / "rules"
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(text: str) -> str:
    """The page with every `<!-- table: NAME -->` block filled in anew."""
    tables = build_tables()
    return _BLOCK.sub(lambda match: match[1] + tables[match[2]] + match[3], text)


def build_tables() -> dict[str, str]:
    from decode_svc import settings as decode
    from prefill_svc import settings as prefill
    from router import settings as router
    from worker.settings import WorkerSettings

    shared = {field.name for field in dataclasses.fields(WorkerSettings)}
    return {
        "router-settings": _settings(router.RouterSettings, router.PREFIX, set()),
        "worker-settings": _settings(WorkerSettings, f"{prefill.PREFIX}|{decode.PREFIX}", set()),
        "decode-settings": _settings(decode.DecodeSettings, decode.PREFIX, shared),
        "router-metrics": _metrics(_router_families()),
        "worker-metrics": _metrics(_worker_families()),
        "vllm-metrics": _vllm_names(),
        "alerts": _alerts(),
        "recorded": _recorded(),
    }


def _settings(cls: type, prefix: str, without: set[str]) -> str:
    lines = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        if field.name in without:
            continue
        default = "required" if field.default is dataclasses.MISSING else _shown(field.default)
        names = " ".join(f"`{p}_{field.name.upper()}`" for p in prefix.split("|"))
        lines.append(f"| {names} | {default} | {field.metadata['doc']} |")
    return "\n".join(lines) + "\n"


def _shown(default: Any) -> str:
    if default is None or default == "":
        return "unset"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _router_families() -> Iterable[Any]:
    from prometheus_client import CollectorRegistry

    from kvstore.memory_registry import MemoryRegistry
    from router.fleet import Fleet
    from router.fleet_metrics import FleetMetrics
    from router.metrics import RouterMetrics

    registry = CollectorRegistry()
    RouterMetrics(registry, ["model"])
    FleetMetrics(registry, {"": Fleet(MemoryRegistry())}, lambda: True)
    return registry.collect()


def _worker_families() -> Iterable[Any]:
    from prometheus_client import CollectorRegistry

    from decode_svc.metrics import DecodeMetrics
    from prefill_svc.metrics import PrefillMetrics
    from worker.engine_metrics import EngineMetrics
    from worker.fetch_metrics import FetchMetrics
    from worker.worker_metrics import WorkerMetrics

    registry = CollectorRegistry()
    EngineMetrics(registry, 1)
    WorkerMetrics(registry, lambda: 0, lambda: True)
    PrefillMetrics(registry)
    DecodeMetrics(registry)
    FetchMetrics(registry)
    return registry.collect()


def _vllm_names() -> str:
    from router.vllm_metrics import ROUTER_NAMES
    from worker.vllm_metrics import PREFILL_NAMES, WORKER_NAMES

    columns = [{n.other: n.own for n in names} for names in (ROUTER_NAMES, PREFILL_NAMES, WORKER_NAMES)]
    lines = ["| name | router | prefill worker | decode worker |", "| --- | --- | --- | --- |"]
    for name in sorted(set().union(*columns)):
        own = [f"`{column[name]}`" if name in column else "-" for column in columns]
        lines.append(f"| `{name}` | {' | '.join(own)} |")
    lines.append("| `vllm:cache_config_info` | - | labels block_size, num_gpu_blocks | the same |")
    return "\n".join(lines) + "\n"


def _rules(file: str) -> Iterable[dict[str, Any]]:
    import yaml

    for group in yaml.safe_load((RULES / file).read_text())["groups"]:
        yield from group["rules"]


def _alerts() -> str:
    lines = ["| alert | severity | says | after |", "| --- | --- | --- | --- |"]
    for rule in _rules("alerts.yml"):
        name = f"[`{rule['alert']}`](runbooks.md#{rule['alert'].lower()})"
        summary, severity = rule["annotations"]["summary"], rule["labels"]["severity"]
        lines.append(f"| {name} | {severity} | {summary} | {rule.get('for', 'at once')} |")
    return "\n".join(lines) + "\n"


def _recorded() -> str:
    lines = ["| recorded | from |", "| --- | --- |"]
    for rule in _rules("recording.yml"):
        sources = sorted(set(re.findall(r"\bbaton_\w+", rule["expr"])))
        lines.append(f"| `{rule['record']}` | {', '.join(f'`{source}`' for source in sources)} |")
    return "\n".join(lines) + "\n"


def _metrics(families: Iterable[Any]) -> str:
    lines = ["| metric | type | meaning |", "| --- | --- | --- |"]
    for family in sorted(families, key=lambda f: f.name):
        name = family.name + ("_total" if family.type == "counter" else "")
        lines.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    sys.path.insert(0, str(ROOT))
    current = PAGE.read_text()
    wanted = rendered(current)
    if "--check" in sys.argv:
        if current != wanted:
            sys.stderr.write("docs/operations.md: run python docs/operations_tables.py\n")
        return int(current != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
