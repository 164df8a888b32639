"""Attention kernels of the GPU path, timed over their tilings, beside what the chip could do.

    python -m benchmarks.gpu_attention [ceilings decode prefill rows context]

DeepSeek-V2-Lite's shape in bfloat16; decodes, rows and contexts with a cache in FP8 too. A decode is timed
over several caches in turn, so that none is in L2.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial

import torch
import triton

from benchmarks.gpu_context import time_contexts
from benchmarks.gpu_timing import relative_error
from engine.kernels.attention_decode import DEFAULT_TUNING, DecodeTuning, mla_decode, num_shares
from engine.kernels.attention_prefill import PrefillTuning, Segments, mla_prefill
from engine.kernels.mla_fp8_rows import dequantise_mla_rows, quantise_mla_rows, row_bytes
from engine.kernels.mla_rows import prepare_mla_rows
from engine.kernels.row_task import RowTask

HEADS, RANK, ROPE, NOPE, VALUE, BLOCK_SIZE, LAYERS = 16, 512, 64, 128, 128, 16, 27


def milliseconds(call: Callable[[], object]) -> float:
    """Median, of launches replayed from a graph."""
    call()
    found: float = triton.testing.do_bench_cudagraph(call, rep=20, return_mode="median")
    return found


def ceilings() -> None:
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    copy = milliseconds(lambda: b.copy_(a))
    print(f"copy {2 * a.numel() / copy / 1e9:.2f} TB/s")
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = milliseconds(lambda: x @ x)
    print(f"matrix product {2 * 8192**3 / product / 1e9:.0f} TFLOP/s", flush=True)


def _time_all(calls: dict[str, Callable[[], object]]) -> list[tuple[float, str]]:
    """Fastest first. A tiling that does not fit the chip is no result."""
    found = []
    for name, call in calls.items():
        try:
            found.append((milliseconds(call), name))
        except Exception as error:  # noqa: BLE001 - Triton's own, of the compiler or of the driver
            print(f"  {name} {type(error).__name__}: {str(error)[:80]}")
    return sorted(found)


def decode() -> None:
    tilings = [
        DecodeTuning(rows, warps, stages)
        for rows, warps, stages in itertools.product((16, 32, 64), (4, 8), (1, 2, 3))
        if rows * stages <= 128
    ]
    _check_fp8()
    shapes = ((1, 1150), (8, 1150), (32, 1150), (128, 1150), (256, 1150), (256, 400), (64, 4200))
    for (num_seqs, context), is_fp8 in itertools.product(shapes, (False, True)):
        call = _decode_call(num_seqs, context, is_fp8)
        default = num_shares(num_seqs, HEADS)
        calls = {
            _name(tiling, shares): partial(call, tiling, shares)
            for tiling in tilings
            for shares in sorted({default, max(1, default // 2), min(64, default * 2)})
        }
        found = _time_all(calls)
        kind, num_bytes = ("fp8", row_bytes(RANK, ROPE)) if is_fp8 else ("bf16", (RANK + ROPE) * 2)
        floor_us = num_seqs * context * num_bytes / 3.0e6
        print(f"decode {kind} {num_seqs} x {context}: floor {floor_us:.1f} us at 3 TB/s")
        own = _name(DEFAULT_TUNING, default)
        for time_ms, name in found[:4] + [entry for entry in found[4:] if entry[1] == own]:
            print(f"  {1e3 * time_ms / LAYERS:8.1f} us {name}", flush=True)


def _name(t: DecodeTuning, shares: int) -> str:
    return f"shares {shares} rows {t.num_rows} warps {t.num_warps} stages {t.num_stages}"


def _check_fp8() -> None:
    """Against the kernel for bfloat16, over what the cache in FP8 holds."""
    cache = _fp8_rows(200)
    held = dequantise_mla_rows(cache, RANK).bfloat16()
    tables = torch.randperm(200, device="cuda", dtype=torch.int32).view(4, 50)
    lengths = torch.tensor([1, 799, 0, 333], dtype=torch.int32, device="cuda")
    q = torch.randn(4, HEADS, RANK + ROPE, dtype=torch.bfloat16, device="cuda") / 8
    for shares in (1, 5):
        found, expected = (mla_decode(q, c, tables, lengths, RANK, shares=shares) for c in (cache, held))
        error = relative_error(found, expected)
        assert error < 0.01, f"decode in FP8, {shares} shares: error {error:.4f}"
    print("check of decodes in FP8: within 0.01", flush=True)


def _fp8_rows(num_blocks: int) -> torch.Tensor:
    rows = torch.randn(num_blocks * BLOCK_SIZE, RANK + ROPE, device="cuda")
    return quantise_mla_rows(rows, RANK).view(num_blocks, BLOCK_SIZE, -1)


def _decode_call(num_seqs: int, context: int, is_fp8: bool) -> Callable[[DecodeTuning, int], None]:
    width = -(-context // BLOCK_SIZE)
    num_blocks = num_seqs * width
    layer_bytes = num_blocks * BLOCK_SIZE * (row_bytes(RANK, ROPE) if is_fp8 else (RANK + ROPE) * 2)
    num_layers = max(2, min(LAYERS, 2**30 // layer_bytes))  # what L2 cannot hold
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    cache = [
        _fp8_rows(num_blocks) if is_fp8 else torch.randn(num_blocks, BLOCK_SIZE, RANK + ROPE, **options)
        for _ in range(num_layers)
    ]
    tables = torch.randperm(num_blocks, device="cuda", dtype=torch.int32).view(num_seqs, width)
    lengths = torch.full((num_seqs,), context, dtype=torch.int32, device="cuda")
    q = torch.randn(num_seqs, HEADS, RANK + ROPE, dtype=torch.bfloat16, device="cuda") / 8

    def call(tuning: DecodeTuning, shares: int) -> None:
        for i in range(LAYERS):
            mla_decode(q, cache[i % num_layers], tables, lengths, RANK, shares=shares, tuning=tuning)

    return call


def prefill() -> None:
    tilings = [
        PrefillTuning(queries, keys, warps, stages)
        for queries, keys, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3))
        if not (queries == 128 and warps == 4)
    ]
    for num_seqs, length in ((1, 4096), (8, 1024)):
        inputs = _prefill_inputs(num_seqs, length)
        flops = num_seqs * HEADS * length**2 * (NOPE + ROPE + VALUE)
        print(f"prefill {num_seqs} x {length}: floor {flops / 790e6:.0f} us at 790 TFLOP/s")
        for time_ms, name in _time_all({str(t): partial(mla_prefill, *inputs, t) for t in tilings})[:5]:
            print(f"  {1e3 * time_ms:8.0f} us {flops / time_ms / 1e9:4.0f} TFLOP/s {name}", flush=True)


def _prefill_inputs(num_seqs: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Segments]:
    total = num_seqs * length
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.randn(total, HEADS, NOPE + ROPE, **options) / 14
    key_value = torch.randn(total, HEADS, NOPE + VALUE, **options)
    rope = torch.randn(total, RANK + ROPE, **options)[:, RANK:]
    starts = torch.arange(0, total + 1, length, dtype=torch.int32, device="cuda")
    return q, key_value, rope, Segments(starts, starts)


def rows() -> None:
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    task = RowTask(torch.ones(RANK, **options), 1e-6, torch.rand(ROPE // 2, device="cuda"), 1.0)
    for num_tokens, is_fp8 in itertools.product((1, 256, 8192), (False, True)):
        down = torch.randn(num_tokens, RANK + ROPE + HEADS * (NOPE + ROPE), **options)
        cache = _fp8_rows(1024) if is_fp8 else torch.zeros(1024, BLOCK_SIZE, RANK + ROPE, **options)
        places = torch.arange(num_tokens, device="cuda")
        q = down[:, RANK + ROPE :].unflatten(-1, (HEADS, -1))
        time_ms = milliseconds(
            lambda d=down, c=cache, p=places, q=q: prepare_mla_rows(
                task, d[:, : RANK + ROPE], q, q[..., NOPE:], p, p, c
            )
        )
        stored = cache.shape[-1] * cache.element_size()
        moved = num_tokens * (stored + 2 * (2 * (RANK + ROPE) + 2 * HEADS * ROPE))
        print(
            f"rows {num_tokens} {cache.dtype}: {1e3 * time_ms:.1f} us, floor {moved / 3e6:.1f} us", flush=True
        )


SECTIONS = {
    "ceilings": ceilings,
    "decode": decode,
    "prefill": prefill,
    "rows": rows,
    "context": time_contexts,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_attention", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), choices=[*SECTIONS, []])
    for section in parser.parse_args().sections:
        SECTIONS[section]()


if __name__ == "__main__":
    main()
