from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from decode_svc.metrics import DecodeMetrics
from engine.outputs import SpeculationStats, StepOutput, StepStats
from prefill_svc.metrics import PrefillMetrics
from proto.link_pb2 import RequestTimings
from worker.engine_metrics import EngineMetrics
from worker.state_page import StatePage
from worker.vllm_metrics import PREFILL_NAMES, WORKER_NAMES, add_vllm_metrics

STATS = StepStats(
    num_prefill_tokens=0,
    num_decode_tokens=3,
    num_running=3,
    num_waiting=2,
    num_waiting_tokens=40,
    num_free_blocks=50,
    num_cached_blocks=30,
    num_used_blocks=20,
    num_preemptions=1,
    num_hit_tokens=16,
    num_queried_tokens=64,
    step_s=0.02,
    speculation=SpeculationStats(num_drafts=3, num_draft_tokens=6, num_accepted_at=(2, 1)),
)
MODEL = {"model_name": "tiny"}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_a_decode_worker_has_vllm_s_names_for_its_numbers(registry: CollectorRegistry) -> None:
    engine, decode = EngineMetrics(registry, 100), DecodeMetrics(registry)
    add_vllm_metrics(registry, "decode", "tiny", 16, 100)
    engine.observe(StepOutput([], STATS))
    decode.observe_first_token(RequestTimings(queue_s=0.5, prefill_s=1.5), ttft_s=2.0)
    decode.count_tokens(11)
    decode.count_request("finished", 64)
    decode.observe_finished(e2e_s=4.0, decode_s=2.0, num_tokens=11, reason="length")

    def sample(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"vllm:{name}", MODEL | labels)

    assert sample("num_requests_running") == 3
    assert sample("num_requests_waiting") == 2
    assert sample("kv_cache_usage_perc") == pytest.approx(0.2)
    assert sample("prefix_cache_queries_total") == 64
    assert sample("prefix_cache_hits_total") == 16
    assert sample("num_preemptions_total") == 1
    assert sample("prompt_tokens_total") == 64
    assert sample("generation_tokens_total") == 11
    assert sample("request_success_total", finished_reason="length") == 1
    assert sample("spec_decode_num_drafts_total") == 3
    assert sample("spec_decode_num_draft_tokens_total") == 6
    assert sample("spec_decode_num_accepted_tokens_total") == 3
    assert sample("spec_decode_num_accepted_tokens_per_pos_total", position="0") == 2
    assert sample("spec_decode_num_accepted_tokens_per_pos_total", position="1") == 1
    assert sample("request_success_total", finished_reason="stop") == 0
    assert sample("time_to_first_token_seconds_sum") == 2.0
    assert sample("inter_token_latency_seconds_count") == 6  # three of them came with another token
    assert sample("inter_token_latency_seconds_sum") == pytest.approx(0.06)
    assert sample("time_per_output_token_seconds_count") == 6
    assert sample("request_time_per_output_token_seconds_sum") == pytest.approx(0.2)
    assert sample("e2e_request_latency_seconds_sum") == 4.0
    assert sample("request_queue_time_seconds_sum") == 0.5
    assert sample("request_prefill_time_seconds_sum") == 1.5
    assert sample("request_decode_time_seconds_sum") == 2.0
    config = {"block_size": "16", "num_gpu_blocks": "100", "enable_prefix_caching": "True"}
    assert sample("cache_config_info", **config) == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_every_name_has_its_own_number_behind_it(registry: CollectorRegistry, role: str) -> None:
    EngineMetrics(registry, 100)
    DecodeMetrics(registry) if role == "decode" else PrefillMetrics(registry)
    add_vllm_metrics(registry, role, "tiny", 16, 100)
    page = generate_latest(registry).decode()
    for name in PREFILL_NAMES if role == "prefill" else WORKER_NAMES:
        assert f"# HELP {name.other}" in page, name
        assert f"\n{name.other}" in page, name


def test_the_state_page_has_blocks_by_tier_and_the_load_of_each_expert(registry: CollectorRegistry) -> None:
    metrics = EngineMetrics(registry, 100)
    page = StatePage(metrics)
    assert page() == {"tiers": {"device": {"total": 100, "used": 0, "cached": 0}}, "experts": []}
    loads = ((3, 1), (0, 4))
    metrics.observe(StepOutput([], replace(STATS, expert_load=loads)))
    metrics.observe(StepOutput([], replace(STATS, expert_load=loads, step_s=3.0)))  # ends the window
    metrics.observe(StepOutput([], replace(STATS, expert_load=loads)))
    assert page() == {
        "tiers": {"device": {"total": 100, "used": 20, "cached": 30}},
        "experts": [[9, 3], [0, 12]],
    }


def test_more_experts_than_a_page_holds_are_left_out(registry: CollectorRegistry) -> None:
    metrics = EngineMetrics(registry, 100)
    metrics.observe(StepOutput([], replace(STATS, expert_load=tuple((1,) * 1024 for _ in range(65)))))
    assert StatePage(metrics)()["experts"] == []
