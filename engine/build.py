"""From a checkpoint directory to an engine."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from hashlib import blake2b

import torch

from engine.attention.mla_kernels import kernels_fit
from engine.checkpoint.fp8 import FP8_GROUP
from engine.checkpoint.hub_tensors import hub_tensors
from engine.checkpoint.model_config import MlaConfig, ModelConfig, load_model_config
from engine.checkpoint.mtp_weights import has_mtp_layer
from engine.checkpoint.weights import model_fingerprint, open_weights
from engine.decode_graphs import GraphLimits
from engine.device_share import DeviceShare
from engine.engine import Engine, EngineLimits
from engine.engine_config import EngineConfig, EngineConfigError, check_weights_fit, resolve_cache_size
from engine.ep.ep_group import EpGroup
from engine.kernels.compile_ahead import compile_ahead
from engine.kernels.mla_fp8_rows import row_bytes
from engine.kernels.support import has_kernels
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.kv_outbox import KvOutbox
from engine.models import CausalLM, build_model
from engine.phase_times import PhaseTimes
from engine.runner import Runner
from engine.sampler import Sampler
from engine.speculation.draft_plan import DraftLimits
from engine.tiers.build import build_lower_tiers
from engine.warm_up import warm_up

Progress = Callable[[int, int], None]

_FP8_TENSOR = re.compile(r"\.(mlp\..*|self_attn\.(q|o|q_a|q_b|kv_a))_proj(_with_mqa)?\.weight$")
_FP8_CAPABILITY = (8, 9)  # of the first devices that multiply FP8


def build_engine(config: EngineConfig, ep: EpGroup | None = None, progress: Progress | None = None) -> Engine:
    """Loads the weights: seconds to minutes. progress(done_bytes, total_bytes).

    Raises CheckpointError for the checkpoint and EngineConfigError for the configuration; both are
    ValueErrors of one line. With a group of more than one rank each loads its share of the experts.
    """
    model_config = load_model_config(config.model_dir)
    has_mtp = has_mtp_layer(config.model_dir, config.load_format, model_config)
    num_speculative_tokens = config.resolve_speculation(has_mtp=has_mtp)
    has_mtp = num_speculative_tokens > 0
    scheduler_config = config.resolve_scheduler(num_speculative_tokens)
    dtype = config.resolve_dtype()
    layout = kv_layout(config, model_config, dtype, has_mtp=has_mtp)
    ep_size = 1 if ep is None else ep.size
    if config.has_fp8_weights:
        _check_fp8_weights(config.device, model_config, ep_size)
    check_weights_fit(_weight_bytes(config, model_config, dtype, ep_size, has_mtp=has_mtp), config.device)
    times = PhaseTimes()
    with times.phase("weights"):
        model = _load_model(config, model_config, dtype, ep, progress, has_mtp=has_mtp)
    with times.phase("KV cache"):
        size = resolve_cache_size(config, model_config, layout, scheduler_config.max_running)
        kv_cache = KvCache(layout, size.num_blocks, device=config.device, is_shared=config.shares_kv_cache)
    limits = EngineLimits(
        max_model_len=size.max_model_len,
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
    )
    sampler = Sampler(model_config.eos_token_ids)
    graph_limits = None
    if config.uses_graphs and ep_size == 1:
        max_decodes = scheduler_config.max_running if config.decodes else 0
        graph_limits = GraphLimits(max_decodes, size.max_model_len)
    draft_limits = None
    if has_mtp:
        draft_limits = DraftLimits(
            num_tokens=num_speculative_tokens,
            max_model_len=size.max_model_len,
            eos_token_ids=model_config.eos_token_ids,
        )
    runner = Runner(
        model,
        kv_cache,
        sampler,
        scheduler_config.token_budget,
        config.device,
        graph_limits=graph_limits,
        draft_limits=draft_limits,
    )
    times.seconds |= runner.start_times.seconds
    if graph_limits is not None and model.uses_kernels:
        steps = partial(warm_up, runner, kv_cache, scheduler_config.token_budget, size.max_model_len)
        _warm_up(steps, model, runner, times)
    with times.phase("host memory"):
        engine = Engine(runner, kv_cache, limits, scheduler_config, ep, build_lower_tiers(config, layout))
        if num_slots := config.outbox_bytes // layout.block_bytes:
            engine.send_through(KvOutbox(kv_cache, num_slots))
    engine.start_times = times
    engine.device_share = DeviceShare(config.device_share)
    return engine


def num_parameters(config: ModelConfig, ep_size: int = 1, *, has_mtp: bool = False) -> int:
    """Held by one rank; routed experts are shared out over the group."""
    routed, others = 0, 0
    for name, shape in hub_tensors(config, has_mtp=has_mtp).items():
        if ".mlp.experts." in name:
            routed += math.prod(shape)
        else:
            others += math.prod(shape)
    return others + -(-routed // ep_size)


def kv_layout(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, *, has_mtp: bool) -> KvLayout:
    """dtype: the model's."""
    token_shape, kv_dtype = model.kv_token_shape, str(dtype).removeprefix("torch.")
    if config.kv_cache_dtype == "fp8":
        mla = _mla_of_fp8_kv(config.device, model)
        token_shape, kv_dtype = (row_bytes(mla.kv_lora_rank, mla.qk_rope_head_dim),), "fp8"
    return KvLayout(
        model_fingerprint=kv_fingerprint(config, dtype, has_mtp=has_mtp),
        num_layers=model.num_layers + has_mtp,
        token_shape=token_shape,
        dtype=kv_dtype,
        block_size=config.block_size,
    )


def kv_fingerprint(config: EngineConfig, dtype: torch.dtype, *, has_mtp: bool = False) -> str:
    """16 hex digits. Workers whose weights or caches differ in their bits do not share KV. Nor do those of
    which only one has the layer of multi-token prediction: its KV is in the blocks."""
    fingerprint = model_fingerprint(config.model_dir, config.load_format, dtype)
    differences = ["FP8 weights"] * config.has_fp8_weights + ["MTP layer"] * has_mtp
    differences += ["FP8 KV"] * (config.kv_cache_dtype == "fp8")
    for difference in differences:
        fingerprint = blake2b(f"{fingerprint}|{difference}".encode(), digest_size=8).hexdigest()
    return fingerprint


def _weight_bytes(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, ep_size: int, *, has_mtp: bool
) -> int:
    num_bytes = num_parameters(model, ep_size, has_mtp=has_mtp) * dtype.itemsize
    if not config.has_fp8_weights:
        return num_bytes
    tensors = hub_tensors(model, has_mtp=has_mtp)
    shapes = [shape for name, shape in tensors.items() if _FP8_TENSOR.search(name)]
    return num_bytes - sum(map(math.prod, shapes)) * (dtype.itemsize - 1)


def _check_fp8_weights(device: str, model: ModelConfig, ep_size: int) -> None:
    if not _has_fp8(device):
        raise EngineConfigError(f"FP8 weights need a CUDA device of capability 8.9 and Triton, not {device}")
    if model.moe is None or ep_size > 1 or model.mlp_bias:
        raise EngineConfigError("FP8 weights need a model whose experts have no bias and are all on one rank")
    sizes = (model.hidden_size, model.moe.moe_intermediate_size)
    if any(size % FP8_GROUP for size in sizes):
        raise EngineConfigError(f"FP8 weights need sizes that {FP8_GROUP} divides, this model has {sizes}")


def _warm_up(steps: Callable[[], None], model: CausalLM, runner: Runner, times: PhaseTimes) -> None:
    if runner.device_steps is not None:  # else the host draws tokens, from logits that nobody would compute
        with times.phase("kernels"), model.one_layer_of_each_kind():
            compile_ahead(steps)
    with times.phase("warm-up"):
        steps()


def _mla_of_fp8_kv(device: str, model: ModelConfig) -> MlaConfig:
    if not _has_fp8(device):
        raise EngineConfigError(f"KV in FP8 needs a CUDA device of capability 8.9 and Triton, not {device}")
    if model.mla is None:
        raise EngineConfigError(f"KV in FP8 needs a model with latent attention, not {model.model_type}")
    if not kernels_fit(model.mla):
        raise EngineConfigError("KV in FP8 needs attention by kernels, whose sizes are powers of two from 16")
    return model.mla


def _has_fp8(device: str) -> bool:
    return has_kernels(device) and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


def _load_model(
    config: EngineConfig,
    model_config: ModelConfig,
    dtype: torch.dtype,
    ep: EpGroup | None,
    progress: Progress | None,
    *,
    has_mtp: bool,
) -> CausalLM:
    dispatcher = None
    if ep is not None and ep.size > 1:
        if model_config.moe is None:
            raise EngineConfigError(
                f"a {model_config.model_type} model without experts cannot be sharded over {ep.size} ranks"
            )
        dispatcher = ep.dispatcher(model_config.moe.num_routed_experts)
    with open_weights(config.model_dir, config.load_format, dtype, model_config, progress) as weights:
        dispatcher_for = None if dispatcher is None else lambda _layer: dispatcher
        return build_model(
            model_config,
            weights,
            dispatcher_for,
            dtype,
            torch.device(config.device),
            has_fp8_weights=config.has_fp8_weights,
            has_mtp=has_mtp,
        )
