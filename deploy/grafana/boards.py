"""What the dashboards show."""

from __future__ import annotations

from panels import Board, Kind, Panel, Query, Row

_NS = 'namespace=~"$namespace"'


def _quantiles(title: str, metric: str, unit: str = "s", doc: str = "") -> Panel:
    """p50, p95 and p99 of a histogram."""
    queries = tuple(
        Query(
            f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket{{{_NS}}}[$__rate_interval])))",
            f"p{q * 100:.0f}",
        )
        for q in (0.5, 0.95, 0.99)
    )
    return Panel(title, unit, queries, doc=doc)


def _heat(title: str, metric: str, unit: str = "s") -> Panel:
    expr = f"sum by (le) (increase({metric}_bucket{{{_NS}}}[$__rate_interval]))"
    return Panel(title, unit, (Query(expr, "{{le}}"),), "heatmap")


def _rate(
    title: str, metric: str, by: str, unit: str = "short", kind: Kind = "lines", doc: str = ""
) -> Panel:
    expr = f"sum by ({by}) (rate({metric}{{{_NS}}}[$__rate_interval]))"
    legend = " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(","))
    return Panel(title, unit, (Query(expr, legend),), kind, doc)


def _gauge(
    title: str, metric: str, unit: str = "short", legend: str = "{{role}} {{instance}}", doc: str = ""
) -> Panel:
    return Panel(title, unit, (Query(f"{metric}{{{_NS}}}", legend),), doc=doc)


def _number(title: str, unit: str, expr: str, doc: str = "") -> Panel:
    return Panel(title, unit, (Query(expr),), "number", doc)


def _ready(role: str) -> str:
    return f'max(baton_router_workers{{{_NS},worker_role="{role}",state="ready"}})'


_OVERVIEW = Board(
    "baton-overview",
    "Baton / Overview",
    "Is it up, is it fast, is it full.",
    (
        Row(
            "Now",
            (
                _number("Requests", "reqps", f"sum(baton:requests:rate5m{{{_NS}}})"),
                _number("TTFT p95", "s", f"max(baton:ttft_seconds:p95_5m{{{_NS}}})"),
                _number("TPOT p95", "s", f"max(baton:tpot_seconds:p95_5m{{{_NS}}})"),
                _number("Tokens out", "short", f"sum(baton:generated_tokens:rate5m{{{_NS}}})", "a second"),
                _number("Prefix hits", "percentunit", f"avg(baton:prefix_hit:ratio5m{{{_NS}}})"),
                _number("Failures", "percentunit", f"max(baton:request_failures:ratio5m{{{_NS}}})"),
                _number("Prefill workers", "short", _ready("prefill"), "that take prompts"),
                _number("Decode workers", "short", _ready("decode"), "that take requests"),
                _number("In flight", "short", f"sum(baton_router_requests_in_flight{{{_NS}}})"),
                _number("Waiting", "short", f"max(baton_router_waiting_sequences{{{_NS}}})"),
                _number(
                    "Redis", "short", f"min(baton_router_store_up{{{_NS}}})", "1: every router reaches it"
                ),
                _number(
                    "Alerts", "short", 'count(ALERTS{alertname=~"Baton.*",alertstate="firing"}) or vector(0)'
                ),
            ),
        ),
        Row(
            "Over time",
            (
                Panel(
                    "Requests by outcome",
                    "reqps",
                    (Query(f"sum by (outcome) (baton:requests:rate5m{{{_NS}}})", "{{outcome}}"),),
                    "areas",
                ),
                Panel(
                    "Time to first token",
                    "s",
                    (
                        Query(f"max(baton:ttft_seconds:p50_5m{{{_NS}}})", "p50"),
                        Query(f"max(baton:ttft_seconds:p95_5m{{{_NS}}})", "p95"),
                    ),
                ),
                Panel(
                    "Time per output token",
                    "s",
                    (
                        Query(f"max(baton:tpot_seconds:p50_5m{{{_NS}}})", "p50"),
                        Query(f"max(baton:tpot_seconds:p95_5m{{{_NS}}})", "p95"),
                    ),
                ),
                Panel(
                    "Tokens a second",
                    "short",
                    (
                        Query(f"sum(baton:prompt_tokens:rate5m{{{_NS}}})", "prompt"),
                        Query(f"sum(baton:generated_tokens:rate5m{{{_NS}}})", "generated"),
                    ),
                ),
                Panel(
                    "KV cache in use",
                    "percentunit",
                    (Query(f"max by (role) (baton:kv_usage:ratio{{{_NS}}})", "{{role}}"),),
                ),
                Panel(
                    "Waiting for compute",
                    "short",
                    (Query(f"sum by (role) (baton_engine_waiting_sequences{{{_NS}}})", "{{role}}"),),
                ),
            ),
        ),
    ),
)

_LATENCY = Board(
    "baton-latency",
    "Baton / Request latency",
    "As clients see it, then where the time goes.",
    (
        Row(
            "At the router",
            (
                _heat("Time to first token", "baton_router_ttft_seconds"),
                _quantiles("Time to first token", "baton_router_ttft_seconds"),
                _quantiles("Time per output token", "baton_router_tpot_seconds"),
                _heat("Gaps between tokens", "baton_router_itl_seconds"),
                _quantiles("End to end", "baton_router_e2e_seconds"),
                _quantiles("Prompt length", "baton_router_prompt_length_tokens", "short"),
            ),
        ),
        Row(
            "Phases",
            (
                _quantiles("Queue", "baton_decode_queue_seconds", doc="until the first step of the prompt"),
                _quantiles("Prefill", "baton_decode_prefill_seconds", doc="first step to first token"),
                _quantiles("Hand-off", "baton_handoff_seconds", doc="first token sampled to KV committed"),
                _quantiles("KV transfer", "baton_handoff_transfer_seconds", doc="first chunk to last"),
                _quantiles("Decode", "baton_decode_decode_seconds", doc="first token to last"),
                Panel(
                    "Engine step, p95",
                    "s",
                    (
                        Query(
                            "histogram_quantile(0.95, sum by (role, instance, le) "
                            f"(rate(baton_engine_step_seconds_bucket{{{_NS}}}[$__rate_interval])))",
                            "{{role}} {{instance}}",
                        ),
                    ),
                ),
            ),
        ),
    ),
)

_KV = Board(
    "baton-handoff-kv",
    "Baton / Hand-off and KV",
    "KV on its way from prefill to decode, and in the caches.",
    (
        Row(
            "Hand-offs",
            (
                _rate("Hand-offs by end", "baton_handoffs_total", "state", "ops", "areas"),
                _rate("Fallbacks by reason", "baton_handoff_fallbacks_total", "reason", "ops"),
                _rate("KV moved, by carrier", "baton_handoff_bytes_total", "carrier", "Bps"),
                _quantiles("KV of one hand-off", "baton_handoff_size_bytes", "bytes"),
                _quantiles("Not hidden by compute", "baton_handoff_seconds"),
                _rate("KV sent, by prefill worker", "baton_prefill_sent_bytes_total", "instance", "Bps"),
            ),
        ),
        Row(
            "Blocks",
            (
                *(
                    Panel(
                        f"Blocks of {role} workers",
                        "short",
                        tuple(
                            Query(f'sum(baton_engine_{state}_blocks{{{_NS},role="{role}"}})', state)
                            for state in ("used", "cached", "free")
                        ),
                        "areas",
                    )
                    for role in ("prefill", "decode")
                ),
                _gauge("KV cache in use", "baton_engine_kv_usage_ratio", "percentunit"),
                _rate("Preemptions", "baton_engine_preemptions_total", "role, instance", "ops"),
                Panel(
                    "Owned blocks without a request",
                    "short",
                    (
                        Query(
                            f"baton_engine_used_blocks{{{_NS}}} "
                            f"* (baton_worker_held_requests{{{_NS}}} == bool 0)",
                            "{{role}} {{instance}}",
                        ),
                    ),
                    doc="Should fall to 0 within a second: what stays is leaked.",
                ),
            ),
        ),
        Row(
            "Below the device: host memory and disk",
            (
                Panel(
                    "Blocks kept",
                    "short",
                    (
                        Query(
                            f"sum by (tier, state) (baton_engine_tier_blocks{{{_NS}}})",
                            "{{tier}} {{state}}",
                        ),
                    ),
                    "areas",
                ),
                Panel(
                    "KV kept",
                    "bytes",
                    (Query(f"sum by (tier) (baton_engine_tier_bytes{{{_NS}}})", "{{tier}}"),),
                ),
                _rate("Blocks lost on the way down", "baton_engine_tier_lost_blocks_total", "role", "ops"),
                _rate("Loads by end", "baton_engine_loads_total", "source, outcome", "ops"),
                _rate("Blocks loaded", "baton_engine_loaded_blocks_total", "source", "ops"),
                _quantiles("Time of a load", "baton_engine_load_seconds"),
            ),
        ),
        Row(
            "Prefix cache",
            (
                Panel(
                    "Prompt tokens found in a cache",
                    "percentunit",
                    (
                        Query(f"avg(baton:prefix_hit:ratio5m{{{_NS}}})", "found"),
                        Query(
                            f"sum(rate(baton_router_predicted_hit_tokens_total{{{_NS}}}[$__rate_interval]))"
                            f" / sum(rate(baton_router_prompt_tokens_total{{{_NS}}}[$__rate_interval]))",
                            "expected by the router",
                        ),
                    ),
                ),
                _rate("Fetches from peers, by end", "baton_fetch_calls_total", "outcome", "ops"),
                _rate("Blocks fetched from peers", "baton_fetch_blocks_total", "role, instance", "ops"),
            ),
        ),
    ),
)

_EXPERTS = Board(
    "baton-experts",
    "Baton / Experts",
    "Expert load and the ranks of the groups; each single expert is on the live page of the router.",
    (
        Row(
            "Load of experts",
            (
                _gauge(
                    "Busiest expert / mean, by layer",
                    "baton_engine_expert_skew_ratio",
                    legend="{{instance}} layer {{moe_layer}}",
                ),
                _gauge(
                    "Balancedness",
                    "baton_engine_expert_balancedness",
                    "percentunit",
                    doc="mean / highest load; 1 is even",
                ),
            ),
        ),
        Row(
            "Ranks",
            (
                _rate("Decoded tokens", "baton_engine_decode_tokens_total", "instance", "short"),
                _rate(
                    "Idle steps",
                    "baton_engine_idle_steps_total",
                    "instance",
                    "ops",
                    doc="made only because another rank of the group had work",
                ),
                _gauge("Tokens in the last step", "baton_engine_batch_tokens"),
                _gauge("Sequences running", "baton_engine_running_sequences"),
            ),
        ),
    ),
)

_ROUTING = Board(
    "baton-routing",
    "Baton / Routing",
    "Which workers requests go to, why, and what came of it.",
    (
        Row(
            "Decisions",
            (
                _rate("Decode worker, why", "baton_router_decisions_total", "decode_reason", "ops", "areas"),
                _rate(
                    "Prefill worker, why", "baton_router_decisions_total", "prefill_reason", "ops", "areas"
                ),
                Panel(
                    "Hit tokens",
                    "short",
                    tuple(
                        Query(f"sum(rate(baton_router_{name}_total{{{_NS}}}[$__rate_interval]))", legend)
                        for name, legend in (
                            ("predicted_hit_tokens", "expected"),
                            ("hit_tokens", "found"),
                            ("prompt_tokens", "prompt tokens"),
                        )
                    ),
                ),
                _rate("Migrations", "baton_router_migrations_total", "instance", "ops"),
            ),
        ),
        Row(
            "Fleet",
            (
                Panel(
                    "Workers as the routers see them",
                    "short",
                    (
                        Query(
                            f"max by (worker_role, state) (baton_router_workers{{{_NS}}})",
                            "{{worker_role}} {{state}}",
                        ),
                    ),
                ),
                _gauge("Requests held", "baton_worker_held_requests", doc="even lines: even load"),
                _gauge("Sequences running", "baton_engine_running_sequences"),
                _gauge("Sequences waiting", "baton_engine_waiting_sequences"),
                _rate("Prompt tokens computed", "baton_engine_prefill_tokens_total", "role, instance"),
                _rate("Requests, by end", "baton_decode_requests_total", "outcome", "ops"),
            ),
        ),
    ),
)

_RESOURCES = Board(
    "baton-resources",
    "Baton / Resources",
    "Processes and, with NVIDIA's DCGM exporter, GPUs.",
    (
        Row(
            "Processes",
            (
                _rate("CPU cores", "process_cpu_seconds_total", "role, instance"),
                _gauge("Resident memory", "process_resident_memory_bytes", "bytes"),
                _gauge("Open files", "process_open_fds"),
                _gauge("Reached by Prometheus", "up"),
                _gauge("Redis reached, workers", "baton_worker_store_up"),
                Panel(
                    "Engine busy",
                    "percentunit",
                    (
                        Query(
                            f"rate(baton_engine_step_seconds_sum{{{_NS}}}[$__rate_interval])",
                            "{{role}} {{instance}}",
                        ),
                    ),
                    doc="share of the time that is spent in steps",
                ),
            ),
        ),
        Row(
            "GPUs",
            (
                _gauge("Utilisation", "DCGM_FI_DEV_GPU_UTIL", "percent", "{{Hostname}} {{gpu}}"),
                _gauge("Memory in use", "DCGM_FI_DEV_FB_USED", "decmbytes", "{{Hostname}} {{gpu}}"),
                _gauge("Power", "DCGM_FI_DEV_POWER_USAGE", "watt", "{{Hostname}} {{gpu}}"),
            ),
        ),
    ),
)

BOARDS = (_OVERVIEW, _LATENCY, _KV, _EXPERTS, _ROUTING, _RESOURCES)
