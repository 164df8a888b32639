"""Which processes serve DeepSeek-V2-Lite's shape from made-up weights, and on which GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_shape import V2_LITE, write_shape
from engine.checkpoint.random_checkpoint import smallest_tokenizer
from engine.checkpoint.tokenizer_files import write_tokenizer

SERVED_NAME = "v2-lite"
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What the processes are told that does not depend on the topology."""

    device: str = "cuda"
    dtype: str = "bfloat16"
    shape: Mapping[str, Any] = field(default_factory=dict)  # what differs from V2-Lite's
    max_model_len: int = 4608
    max_running: int = 256
    token_budget: int = 8192
    mixed_budget: int = 2048
    prefill_max_running: int = 32
    shared_prefill_share: float = 0.4  # of the time
    shared_prefill_budget: int = 1024  # tokens of a step beside a decode worker on the same GPU
    shared_kv_bytes: tuple[int, int] = (4 * _GIB, 6 * _GIB)  # of prefill and decode there
    fp8_weights: bool = False
    kv_cache_dtype: str = "auto"

    @property
    def vocab_size(self) -> int:
        return int(self.shape.get("vocab_size", V2_LITE["vocab_size"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    options: tuple[str, ...]  # of `baton up`
    environment: Mapping[str, str]


# The model of the tests of kernels, wide enough for them; on a CPU a second a hundred tokens.
TINY = Scale(
    device="cpu",
    dtype="float32",
    shape={
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_attention_heads": 4,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "qk_rope_head_dim": 16,
        "vocab_size": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    max_model_len=512,
    max_running=16,
    token_budget=512,
    prefill_max_running=8,
    shared_prefill_budget=128,
    shared_kv_bytes=(8 << 20, 8 << 20),
)
_HANDS_EVERYTHING_OFF = {
    "BATON_ROUTER_POLICY": "round_robin",
    "BATON_ROUTER_LOCAL_PREFILL_MAX_TOKENS": "0",
}
TOPOLOGIES = ("both", "shared", "two", "two-handoff")
# How KV gets from process to process: each is told not to use what is better.
CARRIERS: Mapping[str, Mapping[str, str]] = {
    "ipc": {},
    "pinned": {"BATON_PREFILL_DEVICE_MEMORY": "false", "BATON_DECODE_DEVICE_MEMORY": "false"},
    "grpc": {"BATON_PREFILL_SHARED_MEMORY": "false", "BATON_DECODE_SHARED_MEMORY": "false"},
}


def write_model(directory: Path, scale: Scale) -> Path:
    """Shape and tokenizer. Every id has a text, so that each token is a chunk with something in it."""
    write_shape(directory, **scale.shape)
    spec = smallest_tokenizer(scale.vocab_size, scale.max_model_len)
    spec.tokens.extend(f"t{i}." for i in range(len(spec.tokens), scale.vocab_size))
    write_tokenizer(directory, spec)
    return directory


def topology(
    name: str, model_dir: Path, scale: Scale, policy: str | None = None, carrier: str = "ipc"
) -> Topology:
    """both: one worker that prefills and decodes. shared: a prefill and a decode worker on the first GPU,
    every prompt handed off. two: one worker each on two GPUs, the router decides; two-handoff: every prompt
    is handed off."""
    options = ["--model", str(model_dir), "--served-model-name", SERVED_NAME, "--load-format", "dummy"]
    options += ["--device", scale.device, "--dtype", scale.dtype, "--threads", "2"]
    options += ["--max-model-len", str(scale.max_model_len)]
    environment = {
        "BATON_ROUTER_LOG_LEVEL": "WARNING",
        "BATON_DECODE_MAX_RUNNING": str(scale.max_running),
        "BATON_DECODE_TOKEN_BUDGET": str(scale.token_budget),
        "BATON_DECODE_MIXED_BUDGET": str(scale.mixed_budget),
        "BATON_PREFILL_MAX_RUNNING": str(scale.prefill_max_running),
        "BATON_PREFILL_TOKEN_BUDGET": str(scale.token_budget),
        "BATON_PREFILL_FP8_WEIGHTS": str(scale.fp8_weights),
        "BATON_DECODE_FP8_WEIGHTS": str(scale.fp8_weights),
        "BATON_PREFILL_KV_CACHE_DTYPE": scale.kv_cache_dtype,
        "BATON_DECODE_KV_CACHE_DTYPE": scale.kv_cache_dtype,
        # All are on this machine, whether or not its system tells.
        "BATON_PREFILL_HOST_ID": SERVED_NAME,
        "BATON_DECODE_HOST_ID": SERVED_NAME,
    }
    if name == "both":
        options.append("--aggregated")
    elif name.startswith("shared"):
        environment |= _HANDS_EVERYTHING_OFF | _shares_of_one_gpu(scale)
    elif scale.device != "cpu":
        options += ["--gpus", "0,1"]
        # A sequence that is handed over may have to wait for a step of prompts alone.
        budget = min(scale.token_budget, scale.mixed_budget + scale.max_running)
        environment["BATON_DECODE_TOKEN_BUDGET"] = str(budget)
    if name == "two-handoff":
        environment |= _HANDS_EVERYTHING_OFF
    environment |= CARRIERS[carrier]
    if policy is not None:
        environment["BATON_ROUTER_POLICY"] = policy
    return Topology(options=tuple(options), environment=environment)


def _shares_of_one_gpu(scale: Scale) -> dict[str, str]:
    prefill_bytes, decode_bytes = scale.shared_kv_bytes
    return {
        "BATON_PREFILL_KV_CACHE_BYTES": str(prefill_bytes),
        "BATON_DECODE_KV_CACHE_BYTES": str(decode_bytes),
        "BATON_PREFILL_TOKEN_BUDGET": str(scale.shared_prefill_budget),
        "BATON_PREFILL_DEVICE_SHARE": str(scale.shared_prefill_share),
        "BATON_DECODE_TOKEN_BUDGET": str(max(scale.shared_prefill_budget, scale.max_running + 16)),
    }
