from __future__ import annotations

import json
from pathlib import Path

import pytest

from router.app import build
from router.model_dir import ModelDirError, load_model_dir
from router.settings import RouterSettings, load_router_settings
from router.tokenizer import Tokenizer
from servicekit.settings import SettingsError
from tests.fakes.tiny_tokenizer import CHAT_TEMPLATE, write_model_dir


def test_it_reads_template_special_tokens_and_sampling_defaults(tmp_path: Path) -> None:
    directory = write_model_dir(tmp_path / "m")
    generation = {"temperature": 0.6, "top_p": 0.95, "do_sample": True, "top_k": None}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    model_dir = load_model_dir(directory)
    assert model_dir.chat_template == CHAT_TEMPLATE
    assert model_dir.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert model_dir.sampling_defaults == {"temperature": 0.6, "top_p": 0.95}
    assert model_dir.max_position_embeddings == 512


@pytest.mark.parametrize(
    "template", ["T", [{"name": "rag", "template": "R"}, {"name": "default", "template": "T"}]]
)
def test_the_template_may_be_in_the_tokenizer_s_config(tmp_path: Path, template: object) -> None:
    directory = write_model_dir(tmp_path / "m")
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert load_model_dir(directory).chat_template == "T"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", None),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", None),
        ("chat_template.jinja", "{% if %}"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, name: str, content: str | None) -> None:
    directory = write_model_dir(tmp_path / "m")
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_text(content)
    with pytest.raises(ModelDirError) as caught:
        build(RouterSettings(model=directory))
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelDirError, match="does not exist"):
        load_model_dir(tmp_path / "nothing")


def test_the_lower_bound_of_a_text_s_tokens_is_one(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(model_dir / "tokenizer.json")
    for text in ("hello world", "r\u00e9sum\u00e9 of \u4e2d\u6587" * 50, "<think>" * 20, " " * 999):
        assert tokenizer.min_tokens(text) <= len(tokenizer._encode(text, False))


@pytest.mark.parametrize("num_repeats", [1, 2000])
async def test_short_and_long_texts_are_encoded_alike(model_dir: Path, num_repeats: int) -> None:
    tokenizer = Tokenizer.from_file(model_dir / "tokenizer.json")
    token_ids = await tokenizer.encode("hello world " * num_repeats, adds_special_tokens=False)
    assert tokenizer.decode(token_ids) == "hello world " * num_repeats


def test_settings_are_frozen_as_a_list() -> None:
    """Options are scarce: a new one means changing this test, and saying what was tried instead."""
    assert list(RouterSettings.__dataclass_fields__) == [
        "model",
        "served_model_name",
        "extra_models",
        "tool_parser",
        "reasoning_parser",
        "reasoning_field",
        "rejects_unknown_fields",
        "host",
        "port",
        "redis_url",
        "policy",
        "policy_temperature_s",
        "local_prefill_max_tokens",
        "max_retries",
        "request_timeout_s",
        "worker_timeout_s",
        "max_body_bytes",
        "max_sequences",
        "max_prompt_tokens",
        "max_concurrent_requests",
        "max_queue_wait_s",
        "client_timeout_s",
        "require_api_key",
        "api_key_grace_s",
        "cors_origins",
        "admin_host",
        "admin_port",
        "http_tls_cert",
        "http_tls_key",
        "tls_cert",
        "tls_key",
        "tls_ca",
        "drain_grace_s",
        "admin_key",
        "otlp_endpoint",
        "log_format",
        "log_level",
    ]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BATON_ROUTER_PORT", "70000"),
        ("BATON_ROUTER_PORT", "http"),
        ("BATON_ROUTER_POLICY", "random"),
        ("BATON_ROUTER_POLICY_TEMPERATURE_S", "-0.1"),
        ("BATON_ROUTER_POLICY_TEMPERATURE_S", "nan"),
        ("BATON_ROUTER_MAX_RETRIES", "-1"),
        ("BATON_ROUTER_DRAIN_GRACE_S", "nan"),
        ("BATON_ROUTER_COLOUR", "red"),
    ],
)
def test_a_bad_setting_is_named(variable: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_router_settings({"BATON_ROUTER_MODEL": "/m", variable: value})
    assert variable.removeprefix("BATON_ROUTER_").lower() in str(caught.value).lower()


def test_the_model_is_named_after_its_directory_unless_told() -> None:
    assert load_router_settings({"BATON_ROUTER_MODEL": "/models/tiny"}).model_name == "tiny"
    settings = load_router_settings({"BATON_ROUTER_MODEL": "/m", "BATON_ROUTER_SERVED_MODEL_NAME": "a/b"})
    assert settings.model_name == "a/b"
