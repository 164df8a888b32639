"""Every kernel of the GPU engine but attention: checked against its reference, then timed against its floor
and against plain torch. One command, on a machine with one CUDA device:

    python -m benchmarks.gpu_kernels [--tune [SECONDS] [--tokens N ...]] [--formats bf16 fp8]
                                     [--only SECTION ...] [--out DIR]

The floor is the larger of the bytes that must move over 3.35 TB/s and of the operations over 790 TFLOP/s
(twice that in FP8). --tune first searches the tiles of the expert products and prints them as Python; then
they are timed beside those of today.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu_checks import run_checks
from benchmarks.gpu_moe import FORMATS, TUNED_TOKENS, MoeBench, compile_all
from benchmarks.gpu_rows import Row, dense_rows, moe_rows, norm_rows, sampling_rows
from engine.kernels.moe_tiles import MoeTiles

SECTIONS = ("norm", "dense", "sampling", "moe")
COLUMNS = ("kernel", "rows", "floor_us", "measured_us", "gap", "torch_us")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tune", type=float, nargs="?", const=240.0, metavar="SECONDS")
    parser.add_argument("--tokens", type=int, nargs="+", default=TUNED_TOKENS, help="sizes to tune for")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=tuple(FORMATS), help="of experts")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--out", type=Path, help="directory for results as JSON")
    args = parser.parse_args()
    formats = [FORMATS[name] for name in args.formats]
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    num_failed = run_checks(args.only)
    tuned: dict[bool, dict[int, MoeTiles]] = {}
    details: list[object] = []
    if args.tune:
        tuned = _tune(formats, tuple(args.tokens), args.tune, details)
    rows: list[Row] = []
    sections = dict(
        zip(SECTIONS, (norm_rows, dense_rows, sampling_rows, lambda: moe_rows(tuned, formats)), strict=True)
    )
    for name in args.only:
        rows += _guarded(name, sections[name])
    print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
    for row in rows:
        print(row.line(), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        document = {"rows": [row.fields() for row in rows], "tuning": details}
        (args.out / "gpu_kernels.json").write_text(json.dumps(document, indent=0, default=repr))
    if num_failed:
        raise SystemExit(f"{num_failed} checks failed")


def _guarded(name: str, section: Callable[[], list[Row]]) -> list[Row]:
    """One kernel that fails does not hide the others."""
    try:
        return section()
    except Exception as error:  # noqa: BLE001
        print(f"{name}: {error!r}"[-600:], flush=True)
        torch.cuda.synchronize()
        return []


def _tune(
    formats: list[bool], tokens: tuple[int, ...], limit_s: float, details: list[object]
) -> dict[bool, dict[int, MoeTiles]]:
    deadline = time.monotonic() + limit_s
    num_compiled, seconds = compile_all(formats, tokens)
    print(f"{num_compiled} kernels compiled in {seconds:.0f} s", flush=True)
    tuned: dict[bool, dict[int, MoeTiles]] = {}
    for i, is_fp8 in enumerate(formats):
        bench = MoeBench(is_fp8)
        # Each format gets its part of the time that is left.
        limit = time.monotonic() + (deadline - time.monotonic()) / (len(formats) - i)
        tuned[is_fp8] = {}
        for num_tokens in tokens:
            try:
                tiles, seconds, results = bench.tune(num_tokens, limit)
            except Exception as error:  # noqa: BLE001
                print(f"tune {num_tokens}: {error!r}"[:300], flush=True)
                continue
            tuned[is_fp8][num_tokens] = tiles
            details.append([is_fp8, num_tokens, [(round(s * 1e6, 1), repr(c)) for s, c in results]])
            print(f"fp8={is_fp8} {num_tokens}: {tiles}  # {seconds * 1e6:.0f} us", flush=True)
        del bench
        torch.cuda.empty_cache()
    return tuned


if __name__ == "__main__":
    main()
