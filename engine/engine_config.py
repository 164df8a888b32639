"""What was asked for, and what that comes to with this model on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from engine.checkpoint.dtypes import resolve_dtype
from engine.checkpoint.model_config import ModelConfig
from engine.checkpoint.weights import LoadFormat
from engine.kv_layout import KvLayout
from engine.memory import available_memory_bytes
from engine.mixed_graphs import CHUNK_LADDER
from engine.scheduler import SchedulerConfig

DEFAULT_MAX_RUNNING = {"cpu": 64, "cuda": 256}
# On two slow cores one step of a 135 M model prefills this many tokens in about a second: no decode waits
# longer. On a GPU, where decodes have a mixed_budget, a prompt goes through the layers in few pieces.
DEFAULT_TOKEN_BUDGET = {"cpu": 512, "cuda": 8192}
MAX_SPECULATIVE_TOKENS = 8
MAX_DEFAULT_KV_BYTES = 4 << 30
DEFAULT_DISK_KV_BYTES = 8 << 30
KvCacheDtype = Literal["auto", "fp8"]
DEFAULT_KV_SHARE = {"cpu": 0.25, "cuda": 0.9}  # of the memory that is free once the weights are loaded


class EngineConfigError(ValueError):
    """The configuration cannot work with this model or machine. One line: what was asked, what is
    possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """As requested. None: chosen for the model and the machine."""

    model_dir: Path
    load_format: LoadFormat = "safetensors"
    dtype: str = "auto"  # bfloat16 where the device computes it natively, else float32
    device: str = "cpu"
    block_size: int = 16  # tokens
    kv_cache_bytes: int | None = None
    num_blocks: int | None = None  # wins over kv_cache_bytes
    host_kv_bytes: int = 0  # of host memory for blocks that the device has no room for; 0: none
    disk_kv_dir: Path | None = None  # this engine's alone; None: no blocks on disk
    disk_kv_bytes: int = DEFAULT_DISK_KV_BYTES  # of files there
    max_model_len: int | None = None  # tokens of prompt and output
    token_budget: int | None = None  # tokens of one step
    mixed_budget: int | None = None  # of them for prompts, in a step that also decodes
    max_running: int | None = None  # sequences of one step
    shares_kv_cache: bool = False  # with other processes of this host
    outbox_bytes: int = (
        0  # of host memory through which KV of hand-offs leaves; 0: it leaves the cache itself
    )
    device_share: float = 1.0  # of the time, for steps with prompt tokens; not in a group
    uses_graphs: bool = True  # steps as CUDA graphs, where the model can
    decodes: bool = True  # False: sequences end with their first token, so no graphs of decodes are made
    num_speculative_tokens: int | None = None  # drafted for each sequence in a step; 0: none
    has_fp8_weights: bool = False  # experts and dense layers in block-scaled FP8, their inputs too, on CUDA
    kv_cache_dtype: KvCacheDtype = "auto"  # the model's; fp8: latents of MLA in FP8, on CUDA

    def resolve_dtype(self) -> torch.dtype:
        try:
            return resolve_dtype(self.dtype, self.device)
        except ValueError as error:
            raise EngineConfigError(str(error)) from error

    def resolve_speculation(self, *, has_mtp: bool) -> int:
        """Drafts a step; has_mtp: the checkpoint has a layer that makes them. EngineConfigError when it has
        none and drafts are asked for."""
        asked = self.num_speculative_tokens
        if asked is None:
            return int(has_mtp)
        if not 0 <= asked <= MAX_SPECULATIVE_TOKENS:
            raise EngineConfigError(
                f"num_speculative_tokens must be between 0 and {MAX_SPECULATIVE_TOKENS}, got {asked}"
            )
        if asked and not has_mtp:
            raise EngineConfigError(
                f"num_speculative_tokens is {asked}, and {self.model_dir} has no layer of multi-token "
                "prediction"
            )
        return asked

    def resolve_scheduler(self, num_speculative_tokens: int = 0) -> SchedulerConfig:
        """EngineConfigError for a budget that starves somebody."""
        if self.block_size < 1:
            raise EngineConfigError(f"block_size must be 1 or more, got {self.block_size}")
        kind = torch.device(self.device).type
        is_cuda = kind == "cuda"
        max_running = DEFAULT_MAX_RUNNING.get(kind, 64) if self.max_running is None else self.max_running
        token_budget = self.token_budget
        if token_budget is None:
            most_decodes = max_running * (1 + num_speculative_tokens)
            token_budget = max(DEFAULT_TOKEN_BUDGET.get(kind, 512), most_decodes + self.block_size)
        mixed_budget = self.mixed_budget
        if mixed_budget is None and is_cuda:
            mixed_budget = max(CHUNK_LADDER[-1], self.block_size)
        config = SchedulerConfig(
            token_budget=token_budget,
            max_running=max_running,
            mixed_budget=mixed_budget,
            lookahead_tokens=int(is_cuda and num_speculative_tokens > 0),
            num_speculative_tokens=num_speculative_tokens,
        )
        try:
            config.check(self.block_size)
        except ValueError as error:
            raise EngineConfigError(str(error)) from error
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    num_blocks: int
    max_model_len: int  # tokens; one sequence of that length fits


def resolve_cache_size(
    config: EngineConfig, model: ModelConfig, layout: KvLayout, max_running: int
) -> CacheSize:
    """Call with the weights loaded: what is free then may be shared out. EngineConfigError when a sequence of
    the asked length does not fit; a length that nobody asked for is cut to what fits."""
    longest = _longest(config, model)
    num_blocks = config.num_blocks
    if num_blocks is None:
        num_bytes = config.kv_cache_bytes
        if num_bytes is None:
            num_bytes = _default_kv_bytes(config.device)
            num_bytes = min(num_bytes, max_running * -(-longest // layout.block_size) * layout.block_bytes)
        num_blocks = num_bytes // layout.block_bytes
    if num_blocks < 1:
        raise EngineConfigError(f"no room for a KV cache: one block takes {layout.block_bytes} bytes")
    num_tokens = num_blocks * layout.block_size
    if config.max_model_len is not None and num_tokens < longest:
        raise EngineConfigError(
            f"max_model_len {longest} needs {-(-longest // layout.block_size)} KV blocks "
            f"({longest * layout.block_bytes // layout.block_size / 2**20:.0f} MiB), there are {num_blocks}"
        )
    return CacheSize(num_blocks=num_blocks, max_model_len=min(longest, num_tokens))


def check_weights_fit(weight_bytes: int, device: str) -> None:
    """Before loading: better one line now than the kernel's answer later."""
    available = available_memory_bytes(device)
    if weight_bytes > available:
        raise EngineConfigError(
            f"the weights take {weight_bytes / 2**30:.1f} GiB, {available / 2**30:.1f} GiB of memory are free"
        )


def _longest(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        return model.max_position_embeddings
    if not 2 <= config.max_model_len <= model.max_position_embeddings:
        raise EngineConfigError(
            f"max_model_len must be between 2 and the model's {model.max_position_embeddings}, "
            f"got {config.max_model_len}"
        )
    return config.max_model_len


def _default_kv_bytes(device: str) -> int:
    kind = torch.device(device).type
    share = int(available_memory_bytes(device) * DEFAULT_KV_SHARE.get(kind, 0.5))
    return min(share, MAX_DEFAULT_KV_BYTES) if kind == "cpu" else share
