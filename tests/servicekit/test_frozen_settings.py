"""Options are scarce: whoever adds one edits this list, and says in the commit what was tried instead."""

from __future__ import annotations

import dataclasses

import pytest

from decode_svc.settings import DecodeSettings
from prefill_svc.settings import PrefillSettings
from router.settings import RouterSettings

WORKER = """
model served_model_name worker_id host advertised_host port metrics_port redis_url load_format dtype device
block_size kv_cache_bytes num_blocks host_kv_bytes disk_kv_dir disk_kv_bytes max_model_len token_budget
mixed_budget max_running max_requests num_threads num_speculative_tokens fp8_weights kv_cache_dtype
device_share outbox_bytes host_id shared_memory device_memory tls_cert tls_key tls_ca drain_s otlp_endpoint
log_format log_level
"""
EXPECTED = {
    PrefillSettings: WORKER,
    DecodeSettings: WORKER + "group_id ep_rank ep_size ep_address",
    RouterSettings: """
model served_model_name host port redis_url policy policy_temperature_s local_prefill_max_tokens
max_retries request_timeout_s worker_timeout_s max_body_bytes max_sequences drain_grace_s admin_key
otlp_endpoint log_format log_level extra_models tool_parser reasoning_parser reasoning_field
rejects_unknown_fields
max_prompt_tokens max_concurrent_requests max_queue_wait_s client_timeout_s require_api_key api_key_grace_s
cors_origins admin_host admin_port http_tls_cert http_tls_key tls_cert tls_key tls_ca
""",
}


@pytest.mark.parametrize("settings_class", EXPECTED, ids=lambda settings_class: settings_class.__name__)
def test_the_settings_of_a_service_are_those_agreed_upon(settings_class: type) -> None:
    names = {field.name for field in dataclasses.fields(settings_class)}
    assert names == set(EXPECTED[settings_class].split())


@pytest.mark.parametrize("settings_class", EXPECTED, ids=lambda settings_class: settings_class.__name__)
def test_every_setting_says_what_it_means(settings_class: type) -> None:
    assert [f.name for f in dataclasses.fields(settings_class) if not f.metadata.get("doc")] == []
