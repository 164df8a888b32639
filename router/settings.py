"""What the router takes from the environment, as BATON_ROUTER_<FIELD>."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from router.output.rules import ReasoningParserName, ToolParserName
from router.policy import PolicyName
from servicekit.logging import LogFormat
from servicekit.settings import load_settings, setting
from servicekit.tls import TlsFiles, check_tls_files

PREFIX = "BATON_ROUTER"


ReasoningField = Literal["both", "reasoning_content", "reasoning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    name: str  # in the API and the registry
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    model: Path = setting(doc="model directory: tokenizer, chat template, config.json")
    served_model_name: str | None = setting(
        None, doc="name in the API and the registry; the directory's name"
    )
    extra_models: str = setting(
        "", doc="more models behind this router: NAME=DIRECTORY, several with commas between them"
    )
    tool_parser: ToolParserName = setting(
        "auto", doc="how models write tool calls: auto (by the chat template), hermes, llama3, deepseek, none"
    )
    reasoning_parser: ReasoningParserName = setting(
        "auto", doc="think: split off <think>; deepseek_r1: answers begin with a thought; none; or auto"
    )
    reasoning_field: ReasoningField = setting(
        "both", doc="field with a chat answer's thoughts: reasoning_content, reasoning, or both"
    )
    rejects_unknown_fields: bool = setting(False, doc="refuse requests with fields that are not known")
    host: str = setting("127.0.0.1", doc="address to listen on")
    port: int = setting(8000, doc="TCP port to listen on; 0: any free one")
    redis_url: str = setting("redis://127.0.0.1:6379", doc="worker registry and block index", secret=True)
    policy: PolicyName = setting("prefix", doc="how workers are chosen: prefix, round_robin or least_loaded")
    policy_temperature_s: float = setting(
        0.0, doc="prefix draws among routes, one so many seconds dearer e times less often; 0: the cheapest"
    )
    local_prefill_max_tokens: int = setting(
        32, doc="uncached tokens that decode prefills itself, at most, with round_robin and least_loaded"
    )
    max_retries: int = setting(3, doc="submissions of one sequence to another worker after a failure")
    request_timeout_s: float = setting(600.0, doc="seconds a request may take in all; 0: no limit")
    worker_timeout_s: float = setting(10.0, doc="seconds a request waits for a decode worker to appear")
    max_body_bytes: int = setting(16 << 20, doc="largest accepted request body")
    max_sequences: int = setting(128, doc="prompts times n of one HTTP request, at most")
    max_prompt_tokens: int | None = setting(None, doc="longest accepted prompt; unset: what the model holds")
    max_concurrent_requests: int = setting(4096, doc="HTTP requests served at once; more are refused")
    max_queue_wait_s: float = setting(
        60.0,
        doc="longest predicted wait of a request, seconds; more is refused (priority behind 0: half, before: "
        "1.5 times); 0: only the deadline counts",
    )
    client_timeout_s: float = setting(
        30.0,
        doc="seconds that a client may take to send its headers, to send its body, or to read what waits",
    )
    require_api_key: bool = setting(False, doc="ask for an API key made by `baton key create`")
    api_key_grace_s: float = setting(600.0, doc="seconds that known API keys go on without Redis")
    cors_origins: str = setting("", doc="web origins that may call, comma-separated, or *; empty: none")
    admin_host: str = setting("127.0.0.1", doc="address of the admin port")
    admin_port: int | None = setting(
        None, doc="/metrics and /ui are served there and only there; unset: on the public port"
    )
    http_tls_cert: Path | None = setting(None, doc="certificate chain for HTTPS, PEM; unset: plain HTTP")
    http_tls_key: Path | None = setting(None, doc="its private key, PEM")
    tls_cert: Path | None = setting(
        None, doc="certificate for mutual TLS with the workers, PEM; unset: plain"
    )
    tls_key: Path | None = setting(None, doc="its private key, PEM")
    tls_ca: Path | None = setting(None, doc="CA of the workers' certificates, PEM")
    drain_grace_s: float = setting(30.0, doc="seconds that open requests get to finish after SIGTERM")
    admin_key: str | None = setting(
        None, doc="what /ui asks for; unset: /ui answers this machine only", secret=True
    )
    otlp_endpoint: str = setting(
        "", doc="traces go there by OTLP over HTTP, like http://collector:4318; empty: no traces"
    )
    log_format: LogFormat = setting("console", doc="console or json")
    log_level: str = setting("INFO", doc="DEBUG, INFO, WARNING or ERROR")

    def __post_init__(self) -> None:
        for name, is_valid, accepted in (
            ("port", 0 <= self.port < 65536, "in [0, 65535]"),
            ("policy_temperature_s", self.policy_temperature_s >= 0, "0 or more"),
            ("local_prefill_max_tokens", self.local_prefill_max_tokens >= 0, "0 or more"),
            ("max_retries", self.max_retries >= 0, "0 or more"),
            ("request_timeout_s", self.request_timeout_s >= 0, "0 or more"),
            ("worker_timeout_s", self.worker_timeout_s >= 0, "0 or more"),
            ("max_body_bytes", self.max_body_bytes > 0, "above 0"),
            ("max_sequences", self.max_sequences > 0, "above 0"),
            ("max_prompt_tokens", self.max_prompt_tokens is None or self.max_prompt_tokens > 0, "above 0"),
            ("max_concurrent_requests", self.max_concurrent_requests > 0, "above 0"),
            ("max_queue_wait_s", self.max_queue_wait_s >= 0, "0 or more"),
            ("client_timeout_s", self.client_timeout_s > 0, "above 0"),
            ("api_key_grace_s", self.api_key_grace_s >= 0, "0 or more"),
            ("admin_port", self.admin_port is None or 0 <= self.admin_port < 65536, "in [0, 65535]"),
            (
                "http_tls_key",
                (self.http_tls_key is None) == (self.http_tls_cert is None),
                "set with http_tls_cert",
            ),
            ("drain_grace_s", self.drain_grace_s >= 0, "0 or more"),
            ("log_level", self.log_level in ("DEBUG", "INFO", "WARNING", "ERROR"), "a logging level"),
        ):
            if not is_valid:
                raise ValueError(f"{name} must be {accepted}, got {getattr(self, name)!r}")
        names = [source.name for source in self.models] if self.extra_models else []
        if len(set(names)) < len(names):
            raise ValueError(f"extra_models names a model twice: {', '.join(names)}")

        check_tls_files(self.tls_files)

    @property
    def tls_files(self) -> TlsFiles:
        return TlsFiles(cert=self.tls_cert, key=self.tls_key, ca=self.tls_ca)

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.resolve().name

    @property
    def models(self) -> list[ModelSource]:
        """All that are served, the first of them by default. ValueError when extra_models cannot be read."""
        extra = [_model_source(entry) for entry in self.extra_models.split(",") if entry.strip()]
        return [ModelSource(name=self.model_name, path=self.model), *extra]

    @property
    def reasoning_fields(self) -> tuple[str, ...]:
        both = ("reasoning_content", "reasoning")
        return both if self.reasoning_field == "both" else (self.reasoning_field,)


def _model_source(entry: str) -> ModelSource:
    name, _, path = (part.strip() for part in entry.partition("="))
    if not name or not path:
        raise ValueError(f"extra_models must be NAME=DIRECTORY, got {entry!r}")
    return ModelSource(name=name, path=Path(path))


def load_router_settings(environment: Mapping[str, str] | None = None) -> RouterSettings:
    return load_settings(RouterSettings, PREFIX, environment)
