"""The router's metrics under vLLM's names too: latencies as clients see them.

Workers have these names as well: add up those of one kind of service only.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from servicekit.metrics import OtherName, OtherNames

ROUTER_NAMES = (
    OtherName("baton_router_requests_in_flight", "vllm:num_requests_running", "sequences being served"),
    OtherName("baton_router_waiting_sequences", "vllm:num_requests_waiting", "at the decode workers"),
    OtherName("baton_router_kv_usage_ratio", "vllm:kv_cache_usage_perc", "of the decode workers; 1 is full"),
    OtherName("baton_router_prompt_tokens", "vllm:prompt_tokens", "of served sequences"),
    OtherName("baton_router_generated_tokens", "vllm:generation_tokens", "sent to clients"),
    OtherName("baton_router_hit_tokens", "vllm:prompt_tokens_cached", "prompt tokens found in a cache"),
    OtherName(
        "baton_router_finished", "vllm:request_success", "by finished_reason", {"reason": "finished_reason"}
    ),
    OtherName("baton_router_ttft_seconds", "vllm:time_to_first_token_seconds", "accepted to first token"),
    OtherName("baton_router_itl_seconds", "vllm:inter_token_latency_seconds", "gaps between tokens"),
    OtherName("baton_router_itl_seconds", "vllm:time_per_output_token_seconds", "its name in older versions"),
    OtherName("baton_router_tpot_seconds", "vllm:request_time_per_output_token_seconds", "mean of each one"),
    OtherName("baton_router_e2e_seconds", "vllm:e2e_request_latency_seconds", "accepted to last token"),
    OtherName("baton_router_prompt_length_tokens", "vllm:request_prompt_tokens", "prompt length"),
)


def add_vllm_metrics(registry: CollectorRegistry) -> None:
    """All of these have vLLM's label model_name by themselves."""
    OtherNames(registry, ROUTER_NAMES, {})
