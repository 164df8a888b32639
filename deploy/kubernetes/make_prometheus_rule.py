"""Makes components/monitoring/prometheus-rule.yaml from deploy/prometheus/rules.

--check: exit 1 if it is not up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
TARGET = HERE / "components" / "monitoring" / "prometheus-rule.yaml"
RULES = HERE.parent / "prometheus" / "rules"


def rendered() -> str:
    groups: list[Any] = []
    for path in sorted(RULES.glob("*.yml")):
        groups += yaml.safe_load(path.read_text())["groups"]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "baton"},
        "spec": {"groups": groups},
    }
    return "# Made by make_prometheus_rule.py\n" + yaml.safe_dump(rule, sort_keys=False, width=100)


def main() -> int:
    wanted = rendered()
    if "--check" in sys.argv:
        return int(TARGET.read_text() != wanted)
    TARGET.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
