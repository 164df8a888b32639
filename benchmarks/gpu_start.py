"""A start of the engine on a GPU, phase by phase, with DeepSeek-V2-Lite's shape and made-up weights.

    python -m benchmarks.gpu_start [--fp8] [--serial] [--cache DIR]

The compile cache is empty, or DIR as it is. Serial: kernels are compiled where they are first launched, one
after another. Compiled ahead and later: kernels that were not in the cache; those of later were missed by the
rehearsal of the start's steps.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import triton

from benchmarks.gpu_engine import build
from engine.kernels import compile_ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fp8", action="store_true", help="weights in FP8")
    parser.add_argument("--serial", action="store_true")
    parser.add_argument("--cache", type=Path, metavar="DIR")
    args = parser.parse_args()
    began = psutil.Process().create_time()
    phases = {"imports": time.time() - began}
    if args.serial:
        compile_ahead.MAX_THREADS = 1
    ahead: list[str] = []
    later: list[str] = []

    def note(*, src: Any, cache_hit: bool, **_others: Any) -> None:
        if not cache_hit:
            is_main = threading.current_thread() is threading.main_thread()
            (later if is_main else ahead).append(src.name)

    triton.knobs.compilation.listener = note
    with tempfile.TemporaryDirectory() as name:
        triton.knobs.cache.dir = str(args.cache or Path(name) / "cache")
        engine = build(Path(name), is_fp8=args.fp8)
    phases |= engine.start_times.seconds
    for phase, elapsed_s in phases.items():
        print(f"{phase:15} {elapsed_s:6.2f} s")
    print(f"{'all':15} {time.time() - began:6.2f} s")
    print(f"compiled ahead: {len(ahead)}, later: {len(later)} {dict(Counter(later))}")


if __name__ == "__main__":
    main()
