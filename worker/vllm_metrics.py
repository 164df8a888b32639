"""The worker's metrics under vLLM's names too, for dashboards, autoscalers and gateways that know those.

Copied from our own when the page is read, with the label model_name. What a worker does not do it does not
report: a prefill worker has no vllm:generation_tokens.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge

from servicekit.metrics import OtherName, OtherNames

WORKER_NAMES = (
    OtherName("baton_engine_running_sequences", "vllm:num_requests_running", "in the batch"),
    OtherName("baton_engine_waiting_sequences", "vllm:num_requests_waiting", "not scheduled, or preempted"),
    OtherName("baton_engine_kv_usage_ratio", "vllm:kv_cache_usage_perc", "used KV blocks; 1 is full"),
    OtherName("baton_engine_prefix_queried_tokens", "vllm:prefix_cache_queries", "prompt tokens looked up"),
    OtherName("baton_engine_prefix_hit_tokens", "vllm:prefix_cache_hits", "prompt tokens found"),
    OtherName("baton_engine_preemptions", "vllm:num_preemptions", "sequences that lost their blocks"),
    OtherName("baton_engine_spec_drafts", "vllm:spec_decode_num_drafts", "drafts checked, each of 1 or more"),
    OtherName("baton_engine_spec_draft_tokens", "vllm:spec_decode_num_draft_tokens", "tokens in them"),
    OtherName("baton_engine_spec_accepted_tokens", "vllm:spec_decode_num_accepted_tokens", "the right ones"),
    OtherName(
        "baton_engine_spec_accepted_tokens_per_pos",
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "the right ones by place in their draft",
    ),
    OtherName("baton_engine_itl_seconds", "vllm:inter_token_latency_seconds", "step time, for each token"),
    OtherName("baton_engine_itl_seconds", "vllm:time_per_output_token_seconds", "its name in older versions"),
    OtherName("baton_decode_prompt_tokens", "vllm:prompt_tokens", "of requests that ended"),
    OtherName("baton_decode_generated_tokens", "vllm:generation_tokens", "first tokens included"),
    OtherName(
        "baton_decode_finished", "vllm:request_success", "by finished_reason", {"reason": "finished_reason"}
    ),
    OtherName("baton_decode_ttft_seconds", "vllm:time_to_first_token_seconds", "from submission here"),
    OtherName("baton_decode_tpot_seconds", "vllm:request_time_per_output_token_seconds", "mean of a request"),
    OtherName("baton_decode_e2e_seconds", "vllm:e2e_request_latency_seconds", "from submission here"),
    OtherName("baton_decode_queue_seconds", "vllm:request_queue_time_seconds", "waiting for prefill compute"),
    OtherName("baton_decode_prefill_seconds", "vllm:request_prefill_time_seconds", "start to first token"),
    OtherName("baton_decode_decode_seconds", "vllm:request_decode_time_seconds", "first to last token"),
)
# On a prefill worker; the same names of theirs, so never in one process with those above.
PREFILL_NAMES = (
    *(name for name in WORKER_NAMES if name.own.startswith("baton_engine_")),
    OtherName("baton_prefill_prompt_tokens", "vllm:prompt_tokens", "of calls that finished"),
    OtherName("baton_prefill_ttft_seconds", "vllm:time_to_first_token_seconds", "request to first token"),
    OtherName("baton_prefill_queue_seconds", "vllm:request_queue_time_seconds", "request to first step"),
    OtherName("baton_prefill_prefill_seconds", "vllm:request_prefill_time_seconds", "step to first token"),
)


def add_vllm_metrics(
    registry: CollectorRegistry, role: str, model_name: str, block_size: int, num_blocks: int
) -> None:
    names = PREFILL_NAMES if role == "prefill" else WORKER_NAMES
    OtherNames(registry, names, {"model_name": model_name})
    config = {
        "model_name": model_name,
        "block_size": str(block_size),
        "num_gpu_blocks": str(num_blocks),
        "enable_prefix_caching": "True",
    }
    info = Gauge("vllm:cache_config_info", "always 1", list(config), registry=registry)
    info.labels(**config).set(1)
