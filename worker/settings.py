"""Settings that both kinds of worker share, and what the environment must hold before torch is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from servicekit.process_env import ensure_process_env, num_usable_cpus, threads_per_worker
from servicekit.settings import setting
from servicekit.tls import TlsFiles, check_tls_files


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    decodes: ClassVar[bool] = True  # or its sequences end with their first token

    model: Path = setting(doc="directory with config.json, safetensors and the tokenizer")
    served_model_name: str = setting("", doc="name in the API and the registry; empty: the directory's name")
    worker_id: str = setting("", doc="unique among workers; empty: made up at each start")
    host: str = setting("127.0.0.1", doc="address to listen on")
    advertised_host: str = setting(
        "", doc="address for the others; empty: the one to listen on, or for 0.0.0.0 the one that faces Redis"
    )
    port: int = setting(0, doc="gRPC port; 0: any free one")
    metrics_port: int = setting(0, doc="HTTP port of /metrics; 0: any free one")
    redis_url: str = setting("redis://127.0.0.1:6379/0", doc="registry and prefix index", secret=True)
    load_format: Literal["safetensors", "dummy"] = setting("safetensors", doc="dummy: made-up weights")
    dtype: str = setting("auto", doc="auto, float32, bfloat16 or float16")
    device: str = setting("cpu", doc="cpu or cuda")
    fp8_weights: bool = setting(False, doc="experts and dense layers in block-scaled FP8; needs cuda")
    kv_cache_dtype: Literal["auto", "fp8"] = setting(
        "auto", doc="fp8: MLA's KV in FP8, on cuda; auto: as DTYPE"
    )
    block_size: int = setting(16, doc="tokens of one KV block")
    kv_cache_bytes: int | None = setting(None, doc="of KV cache; unset: NUM_BLOCKS or from free memory")
    num_blocks: int | None = setting(None, doc="of KV cache; wins over KV_CACHE_BYTES")
    host_kv_bytes: int = setting(0, doc="host memory for blocks evicted from the device; 0: none")
    disk_kv_dir: Path | None = setting(
        None, doc="directory, this worker's alone, for blocks evicted from there; unset: none"
    )
    disk_kv_bytes: int = setting(8 << 30, doc="of files in DISK_KV_DIR, at most")
    outbox_bytes: int | None = setting(
        None, doc="host memory through which KV leaves a GPU; unset: 2 GiB for prefill workers with one"
    )
    max_model_len: int | None = setting(None, doc="longest sequence, tokens; unset: the model's")
    token_budget: int | None = setting(
        None, doc="most tokens computed in one step; unset: the engine's choice"
    )
    mixed_budget: int | None = setting(
        None, doc="of TOKEN_BUDGET, for prompts in a step that also decodes: fewer make shorter gaps"
    )
    device_share: float = setting(
        1.0, doc="of the time, at most, for steps with prompts, where another worker has the same GPU"
    )
    max_running: int | None = setting(None, doc="most sequences in one step; unset: the engine's choice")
    num_speculative_tokens: int | None = setting(
        None, doc="tokens drafted for each sequence in a step; unset: 1 if the model can, 0: none"
    )
    max_requests: int = setting(1024, doc="requests held, running and waiting; more are refused")
    num_threads: int | None = setting(None, doc="torch threads; unset: half of the usable processors")
    shared_memory: bool = setting(True, doc="hand KV over through shared memory inside one host")
    device_memory: bool = setting(
        True, doc="with SHARED_MEMORY, hand KV over from GPU to GPU where the system lets processes do so"
    )
    host_id: str = setting(
        "", doc="workers with equal ones may open each other's memory; empty: found out from the system"
    )
    tls_cert: Path | None = setting(
        None, doc="certificate for mutual TLS with routers and workers, PEM; unset: plain"
    )
    tls_key: Path | None = setting(None, doc="its private key, PEM")
    tls_ca: Path | None = setting(None, doc="CA of the others' certificates, PEM")
    drain_s: float = setting(30.0, doc="after SIGTERM, seconds for running requests to finish")
    otlp_endpoint: str = setting(
        "", doc="traces go there by OTLP over HTTP, like http://collector:4318; empty: no traces"
    )
    log_format: Literal["console", "json"] = setting("console", doc="console or json")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting(
        "INFO", doc="DEBUG, INFO, WARNING or ERROR"
    )

    def __post_init__(self) -> None:
        for name in ("block_size", "max_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("host_kv_bytes", "disk_kv_bytes", "outbox_bytes"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.num_speculative_tokens is not None and self.num_speculative_tokens < 0:
            raise ValueError(f"num_speculative_tokens must be 0 or more, got {self.num_speculative_tokens}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads must be 1 or more, got {self.num_threads}")
        if not 0 < self.device_share <= 1:
            raise ValueError(f"device_share must be over 0 and at most 1, got {self.device_share}")
        if not self.drain_s >= 0:
            raise ValueError(f"drain_s must be 0 or more, got {self.drain_s}")

        check_tls_files(self.tls_files)

    @property
    def tls_files(self) -> TlsFiles:
        return TlsFiles(cert=self.tls_cert, key=self.tls_key, ca=self.tls_ca)

    @property
    def cpu_share(self) -> float:
        """Of the usable processors, that computing takes; 0: it has a device of its own."""
        if self.device != "cpu":
            return 0.0
        return min(1.0, _num_threads(self) / num_usable_cpus())

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.resolve().name


def ensure_worker_environment(settings: WorkerSettings) -> None:
    """Starts this program again, in place, when the environment lacks what torch reads at import."""
    ensure_process_env(os.environ, _num_threads(settings))


def _num_threads(settings: WorkerSettings) -> int:
    return settings.num_threads or threads_per_worker(2)
