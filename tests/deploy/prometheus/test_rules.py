"""Every alert, firing and quiet, evaluated by promtool over made-up series; and the recorded numbers."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.tools import DEPLOY, ROOT, program

RULES = DEPLOY / "prometheus" / "rules"


def _alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


@dataclass(frozen=True)
class Case:
    """Series in promtool's notation; a sample a minute. `minutes`: when it is looked at."""

    firing: dict[str, str]
    quiet: dict[str, str]
    minutes: int = 30


def _histogram(name: str, labels: str, slow_bound: str) -> dict[str, str]:
    """60 observations a minute between the bound before `slow_bound` and it."""
    bounds = ["0.01", "0.1", "1.0", "2.5", "5.0", "10.0", "+Inf"]
    low = bounds[: bounds.index(slow_bound)]
    return {
        f'{name}_bucket{{{labels},le="{bound}"}}': "0x40" if bound in low else "0+60x40" for bound in bounds
    }


def _workers(role: str, values: str) -> dict[str, str]:
    return {f'baton_router_workers{{instance="r",worker_role="{role}",state="ready"}}': values}


def _blocks(used: int, total: int = 100) -> dict[str, str]:
    labels = 'instance="d",role="decode"'
    return {
        f"baton_engine_used_blocks{{{labels}}}": f"{used}x40",
        f"baton_engine_total_blocks{{{labels}}}": f"{total}x40",
    }


def _held(used: str, held: str) -> dict[str, str]:
    return {
        'baton_engine_used_blocks{instance="d"}': used,
        'baton_worker_held_requests{instance="d"}': held,
    }


def _stuck(steps: str) -> dict[str, str]:
    return {
        'baton_engine_running_sequences{instance="d"}': "3x40",
        'baton_engine_step_seconds_count{instance="d"}': steps,
    }


def _requests(outcome: str, rate: int) -> dict[str, str]:
    return {
        'baton_router_requests_total{instance="r",outcome="ok"}': "0+100x40",
        f'baton_router_requests_total{{instance="r",outcome="{outcome}"}}': f"0+{rate}x40",
    }


def _fallbacks(rate: int) -> dict[str, str]:
    return {
        'baton_handoffs_total{instance="d",state="COMMITTED"}': "0+100x40",
        'baton_handoff_fallbacks_total{instance="d",reason="WorkerLost"}': f"0+{rate}x40",
    }


_UP = 'up{instance="p",role="prefill"}'
_ROUTER_UP = 'up{instance="r",role="router"}'
_STORE_UP = 'baton_worker_store_up{instance="p"}'
_ROUTER_STORE_UP = 'baton_router_store_up{instance="r"}'
_SKEW = 'baton_engine_expert_skew_ratio{instance="d",moe_layer="3"}'

CASES = {
    "BatonNoRouter": Case({_ROUTER_UP: "0x40"}, {_ROUTER_UP: "1x40"}),
    "BatonNoDecodeWorker": Case(
        _workers("decode", "0x40") | _workers("prefill", "1x40"),
        _workers("decode", "1x40") | _workers("prefill", "0x40"),
    ),
    # A deployment that never had a prefill worker is not one that lost it.
    "BatonNoPrefillWorker": Case(_workers("prefill", "1x10 0x30"), _workers("prefill", "0x40")),
    "BatonWorkerNotScraped": Case({_UP: "0x40"}, {_UP: "1x40"}),
    "BatonWorkerStuck": Case(_stuck("500x40"), _stuck("0+500x40")),
    "BatonStoreAway": Case(
        {_STORE_UP: "1x10 0x30", _ROUTER_STORE_UP: "1x40"}, {_STORE_UP: "1x40", _ROUTER_STORE_UP: "1x40"}
    ),
    "BatonTtftHigh": Case(
        _histogram("baton_router_ttft_seconds", 'instance="r"', "10.0"),
        _histogram("baton_router_ttft_seconds", 'instance="r"', "1.0"),
    ),
    "BatonTpotHigh": Case(
        _histogram("baton_router_tpot_seconds", 'instance="r"', "1.0"),
        _histogram("baton_router_tpot_seconds", 'instance="r"', "0.1"),
    ),
    "BatonQueueLong": Case(
        _histogram("baton_decode_queue_seconds", 'instance="d"', "5.0"),
        _histogram("baton_decode_queue_seconds", 'instance="d"', "1.0"),
    ),
    "BatonRequestsRefused": Case(_requests("429", 20), _requests("429", 2)),
    "BatonRequestsFailing": Case(_requests("500", 5), _requests("400", 50)),
    "BatonKvCacheFull": Case(_blocks(98), _blocks(60)),
    "BatonPreemptionsFrequent": Case(
        {'baton_engine_preemptions_total{instance="d"}': "0+30x40"},
        {'baton_engine_preemptions_total{instance="d"}': "0+1x40"},
    ),
    # One idle minute between requests is not enough, and an empty worker leaks nothing.
    "BatonBlocksLeaked": Case(_held("7x40", "0x40"), _held("7x40", "0 0 0 0 1 0 0 0 0 1 0 0 0 0 1x25")),
    "BatonHandoffsFailing": Case(_fallbacks(20), _fallbacks(1)),
    "BatonMigrationsFrequent": Case(
        {'baton_router_migrations_total{instance="r"}': "0+3x40"},
        {'baton_router_migrations_total{instance="r"}': "0x20 1x20"},
    ),
    "BatonExpertsUnbalanced": Case({_SKEW: "12x80"}, {_SKEW: "2x80"}, minutes=70),
}


def _promtool(tmp_path: Path, tests: list[dict[str, Any]]) -> None:
    document = {
        "rule_files": [str(path) for path in sorted(RULES.glob("*.yml"))],
        "evaluation_interval": "1m",
        "tests": tests,
    }
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump(document))
    command = [program("promtool", "prometheus"), "test", "rules", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def _series(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"series": name, "values": value} for name, value in values.items()]


def _query(expr: str, minutes: int, value: float) -> dict[str, Any]:
    return {"expr": expr, "eval_time": f"{minutes}m", "exp_samples": [{"labels": "{}", "value": value}]}


def test_promtool_accepts_configuration_and_rules() -> None:
    command = [
        program("promtool", "prometheus"),
        "check",
        "config",
        str(DEPLOY / "prometheus/prometheus.yml"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout


def test_every_alert_has_its_cases() -> None:
    assert sorted(CASES) == sorted(_alerts())


@pytest.mark.parametrize("alert", CASES)
def test_the_alert_fires_when_it_should_and_only_then(alert: str, tmp_path: Path) -> None:
    case = CASES[alert]
    firing = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)'
    _promtool(
        tmp_path,
        [
            {
                "interval": "1m",
                "input_series": _series(series),
                "promql_expr_test": [_query(firing, case.minutes, float(fires))],
            }
            for series, fires in ((case.firing, True), (case.quiet, False))
        ],
    )


def test_recorded_numbers_are_right(tmp_path: Path) -> None:
    series = (
        _histogram("baton_router_ttft_seconds", 'instance="r"', "1.0")
        | _requests("429", 25)
        | _blocks(30)
        | {
            'baton_router_prompt_tokens_total{instance="r"}': "0+600x40",
            'baton_router_hit_tokens_total{instance="r"}': "0+150x40",
            'baton_router_generated_tokens_total{instance="r"}': "0+120x40",
            'baton_handoffs_total{instance="d",state="COMMITTED"}': "0+30x40",
            'baton_handoff_fallbacks_total{instance="d",reason="WorkerLost"}': "0+3x40",
        }
    )
    queries = {
        # All between 0.1 and 1 s: the middle of the bucket, by interpolation.
        "sum(baton:ttft_seconds:p50_5m)": 0.55,
        "sum(baton:request_refusals:ratio5m)": 0.2,
        "sum(baton:request_failures:ratio5m)": 0.0,
        "sum(baton:generated_tokens:rate5m)": 2.0,
        "sum(baton:prefix_hit:ratio5m)": 0.25,
        "sum(baton:kv_usage:ratio)": 0.3,
        "sum(baton:handoff_fallbacks:ratio5m)": 0.1,
    }
    tests = [_query(f"round({expr}, 0.0001)", 20, value) for expr, value in queries.items()]
    _promtool(tmp_path, [{"interval": "1m", "input_series": _series(series), "promql_expr_test": tests}])


@pytest.mark.parametrize("alert", sorted(_alerts()))
def test_the_alert_says_how_bad_what_and_what_to_do(alert: str) -> None:
    rule = _alerts()[alert]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"]["summary"] and rule["annotations"]["description"]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]


def test_the_runbooks_know_no_alert_that_does_not_exist() -> None:
    headings = re.findall(r"^## (Baton\w+)$", (ROOT / "docs/runbooks.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(_alerts())
