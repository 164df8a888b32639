# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
"""What a start compiles, as on a Hopper GPU but without one: nothing that is compiled here can run.

    python -m tests.engine.kernels.compile_ahead_program kernels        compiles some
    python -m tests.engine.kernels.compile_ahead_program steps CONFIG   rehearses a model's steps

Prints JSON. A process of its own: the others of these tests have Triton's interpreter.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.compiler
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from engine.checkpoint.model_config import load_model_config
from engine.checkpoint.mtp_weights import has_mtp_layer
from engine.checkpoint.weights import open_weights
from engine.decode_graphs import GraphLimits
from engine.kernels import compile_ahead as compile_ahead_module
from engine.kernels import moe_specialised
from engine.kernels.compile_ahead import compile_ahead
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.models import build_model
from engine.moe import specialised
from engine.runner import Runner
from engine.sampler import Sampler
from engine.speculation.draft_plan import DraftLimits
from engine.warm_up import warm_up

TOKEN_BUDGET, MAX_MODEL_LEN = 160, 256
DTYPE = torch.bfloat16  # has kernels of its own for each size of a step


class HopperDriver:
    def __init__(self) -> None:
        self.launchers: list[tuple[str, bool]] = []  # made for a kernel, by the main thread

    def launcher_cls(self, src: ASTSource, metadata: object) -> None:
        self.launchers.append((src.name, is_main_thread()))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@triton.jit
def _double_kernel(x_ptr, BLOCK: tl.constexpr):
    places = x_ptr + tl.arange(0, BLOCK)
    tl.store(places, 2 * tl.load(places))


@triton.jit
def _broken_kernel(x_ptr):
    tl.store(x_ptr, tl.no_such_function(x_ptr))


def is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def kernels() -> dict[str, Any]:
    x = torch.zeros(64)
    compiled: list[tuple[str, bool, bool]] = []

    def note(*, src, cache_hit, **_others) -> None:
        compiled.append((src.name, cache_hit, is_main_thread()))

    def rehearse() -> None:
        for block in (16, 32, 64, 64):
            _double_kernel[(1,)](x, BLOCK=block)
        _broken_kernel[(1,)](x)

    triton.knobs.compilation.listener = note
    compile_ahead(rehearse)
    ahead = list(compiled)
    _double_kernel.warmup(x, BLOCK=32, grid=(1,))
    error = None
    try:
        _broken_kernel.warmup(x, grid=(1,))
    except triton.CompilationError as failure:
        error = type(failure).__name__
    return {"ahead": ahead, "later": compiled[len(ahead) :], "error": error}


def steps(config_dir: Path) -> dict[str, Any]:
    compiled: list[str] = []

    def compile_nothing(src, *_args, **_options) -> object:
        compiled.append(src.name)
        return SimpleNamespace(src=src, metadata=None)

    triton.compiler.compile = compile_nothing
    vars(moe_specialised)["_num_multiprocessors"] = lambda _device: 132
    # What kernels would have written holds the worst indices that there are.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1, dtype=torch.int64).item() == 2**63 - 1

    config = load_model_config(config_dir)
    has_mtp = has_mtp_layer(config_dir, "dummy", config)
    with open_weights(config_dir, "dummy", DTYPE, config) as weights:
        model = build_model(config, weights, None, DTYPE, "cpu", uses_kernels=True, has_mtp=has_mtp)
    layout = KvLayout(
        model_fingerprint="test",
        num_layers=config.num_layers + has_mtp,
        token_shape=config.kv_token_shape,
        dtype="bfloat16",
        block_size=4,
    )
    kv_cache = KvCache(layout, 256, device="cpu")
    drafts = DraftLimits(num_tokens=2, max_model_len=MAX_MODEL_LEN, eos_token_ids=frozenset())
    build_runner = partial(
        Runner,
        model,
        kv_cache,
        Sampler(frozenset()),
        TOKEN_BUDGET,
        "cpu",
        graph_limits=GraphLimits(24, MAX_MODEL_LEN),
        draft_limits=drafts if has_mtp else None,
    )
    runner = build_runner()
    steps = partial(warm_up, runner, kv_cache, TOKEN_BUDGET, MAX_MODEL_LEN)
    if not has_mtp:
        with model.one_layer_of_each_kind():
            compile_ahead(steps)
    num_compiled = len(compiled)
    model.one_layer_of_each_kind = nullcontext  # from here on all layers
    build_runner()
    if not has_mtp:
        compile_ahead(steps)
    missed = compiled[num_compiled:]
    compile_ahead(lambda: specialised._trial_error(torch.device("cpu")))
    phases = list(runner.start_times.seconds)
    return {"compiled": sorted(set(compiled)), "missed": missed, "phases": phases}


def main(mode: str, *args: str) -> None:
    failures: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: failures.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(compile_ahead_module.__name__).addHandler(handler)
    hopper = HopperDriver()
    driver.set_active(hopper)
    found = kernels() if mode == "kernels" else steps(Path(args[0]))
    print(json.dumps(found | {"launchers": hopper.launchers, "failures": failures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
