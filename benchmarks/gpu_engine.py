"""The engine on one GPU, in process, with DeepSeek-V2-Lite's shape and made-up weights.

    python -m benchmarks.gpu_engine table   [--rows 0 4 7] [--json FILE]   the table of rates
                                            [--weights uniform] [--fp8]    engine/checkpoint/dummy_weights.py
    python -m benchmarks.gpu_engine profile [--streams 1 32 256] [as above] what a step's time goes to
    python -m benchmarks.gpu_engine check                                  same tokens as the plain CPU form
    python -m benchmarks.gpu_engine publish FILE                           a page of benchmarks/results/

The load is a closed loop: as many requests at a time as the concurrency says, each with its own random
prompt, greedy, to its full length. Times are wall-clock from Engine.add() to the step that gave the token.

What a decode step reads depends on the weights, so two rows compare only where they touch as many experts:
after the timed part of a row the same load is decoded for some steps more, and counted are the experts that
tokens were sent to (mean over layers and steps) and the tokens of a step that differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_shape import write_shape
from benchmarks.gpu_table import COLUMNS as ROW_COLUMNS
from benchmarks.gpu_table import ROWS
from engine.build import build_engine
from engine.checkpoint.model_config import DUMMY_SPREADS
from engine.engine import Engine
from engine.engine_config import EngineConfig, KvCacheDtype
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

COLUMNS = ("weights", *ROW_COLUMNS, "experts", "different tokens")
COUNTED_STEPS = 16
SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "moe_intermediate_size": 256,
    "n_routed_experts": 16,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass
class Answer:
    added: float
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0


@dataclass
class Row:
    concurrency: int
    prompt: int
    output: int
    requests: int
    seconds: float
    answers: list[Answer] = field(repr=False)

    def columns(self) -> dict[str, float | int | None]:
        gaps = [(a.last - a.first) / (a.num_tokens - 1) for a in self.answers if a.num_tokens > 1]
        return {
            "concurrency": self.concurrency,
            "prompt": self.prompt,
            "output": self.output,
            "output tok/s": round(sum(a.num_tokens for a in self.answers) / self.seconds, 1),
            "prompt tok/s": round(self.requests * self.prompt / self.seconds),
            "TTFT p50 ms": round(1e3 * median(a.first - a.added for a in self.answers), 1),
            "TPOT p50 ms": round(1e3 * median(gaps), 2) if gaps else None,
        }


@dataclass(frozen=True, slots=True)
class Touched:
    """By a decode step, on average."""

    experts: float | None  # of a layer; None: the model has none
    tokens: float  # that differ

    def columns(self) -> dict[str, float | None]:
        experts = None if self.experts is None else round(self.experts, 1)
        return {"experts": experts, "different tokens": round(self.tokens, 1)}


class ClosedLoop:
    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self._engine = engine
        self._rng = np.random.default_rng(seed)
        self._next_id = 0

    def add(self, prompt_len: int, output_len: int) -> int:
        seq_id = self._next_id
        self._next_id += 1
        prompt = self._rng.integers(0, self._engine.vocab_size, prompt_len).tolist()
        sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        self._engine.add(Sequence(seq_id, prompt, sampling))
        return seq_id

    def run(self, concurrency: int, prompt_len: int, output_len: int, num_requests: int) -> Row:
        answers: dict[int, Answer] = {}

        def start() -> None:
            seq_id = self.add(prompt_len, output_len)
            answers[seq_id] = Answer(time.perf_counter())

        began = time.perf_counter()
        for _ in range(min(concurrency, num_requests)):
            start()
        while self._engine.has_work:
            outputs = self._engine.step().outputs
            now = time.perf_counter()
            for output in outputs:
                answer = answers[output.seq_id]
                answer.first = answer.first or now
                answer.last = now
                answer.num_tokens += len(output.token_ids)
                if output.finish_reason is not None and len(answers) < num_requests:
                    start()
        seconds = time.perf_counter() - began
        return Row(concurrency, prompt_len, output_len, num_requests, seconds, list(answers.values()))

    def decode(self, concurrency: int, prompt_len: int, output_len: int) -> None:
        """Until that many sequences are past their prompts."""
        for _ in range(concurrency):
            self.add(prompt_len, output_len)
        while self._engine.load().num_waiting_tokens:
            self._engine.step()

    def count(self, concurrency: int, prompt_len: int, output_len: int) -> Touched:
        """Leaves nothing running. output_len: far more than COUNTED_STEPS."""
        self.decode(concurrency, prompt_len, output_len)
        experts, tokens = [], []
        _take_expert_load(self._engine)
        for _ in range(COUNTED_STEPS):
            step = self._engine.step()
            # The runner may have read and reset the counts in this very step.
            for layer in step.stats.expert_load or _take_expert_load(self._engine):
                experts.append(sum(num_tokens > 0 for num_tokens in layer))
            tokens.append(len({token_id for output in step.outputs for token_id in output.token_ids}))
        self._engine.abort_all()
        return Touched(fmean(experts) if experts else None, fmean(tokens))


def _take_expert_load(engine: Engine) -> list[list[int]]:
    """[layer][expert] tokens since the last call. Waits for the device."""
    load_LE = engine._runner._model.take_expert_load()
    return [] if load_LE is None else load_LE.tolist()


def build(
    directory: Path,
    weights: str = "variance",
    *,
    is_fp8: bool = False,
    token_budget: int = 8192,
    kv_cache_dtype: KvCacheDtype = "auto",
) -> Engine:
    config = EngineConfig(
        model_dir=write_shape(directory, baton_dummy_spread=weights),
        load_format="dummy",
        dtype="bfloat16",
        device="cuda",
        max_model_len=4608,
        max_running=256,
        token_budget=token_budget,
        has_fp8_weights=is_fp8,
        kv_cache_dtype=kv_cache_dtype,
    )
    began = time.perf_counter()
    engine = build_engine(config)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    print(
        f"built in {time.perf_counter() - began:.1f} s; {engine.num_blocks} KV blocks; "
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB left",
        flush=True,
    )
    return engine


def table(engine: Engine, weights: str, rows: list[int], path: Path | None) -> None:
    """`weights`: what the rows say of them."""
    loop = ClosedLoop(engine)
    loop.run(8, 1024, 8, 16)  # kernels of chunks are compiled
    loop.run(2, 4096, 4, 4)
    found: list[dict[str, Any]] = []
    print("| " + " | ".join(COLUMNS) + " |", flush=True)
    for i in rows:
        columns = {"weights": weights, **loop.run(*ROWS[i]).columns()}
        if columns["output"] > COUNTED_STEPS:
            columns |= loop.count(*ROWS[i][:3]).columns()
        found.append(columns)
        print("| " + " | ".join(str(columns.get(name, "")) for name in COLUMNS) + " |", flush=True)
        if path is not None:
            facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
            path.write_text(json.dumps({**facts, "rows": found}, indent=1))


def profile(engine: Engine, streams: list[int], num_kernels: int) -> None:
    loop = ClosedLoop(engine, seed=1)
    loop.run(8, 1024, 4, 8)
    loop.run(1, 4096, 1, 1)
    for num_streams in streams:
        loop.decode(num_streams, 1024, 64)
        for _ in range(3):
            engine.step()
        _profile_steps(engine, f"decode of {num_streams}", 10, num_kernels)
        engine.abort_all()
    loop.add(4096, 1)
    _profile_steps(engine, "prompt of 4096", 1, num_kernels)
    for _ in range(8):
        loop.add(1024, 1)
    _profile_steps(engine, "8 prompts of 1024", 1, num_kernels)


def _profile_steps(engine: Engine, title: str, num_steps: int, num_kernels: int) -> None:
    torch.cuda.synchronize()
    began = time.perf_counter()
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    walls = []
    with torch.profiler.profile(activities=kinds) as trace:
        for _ in range(num_steps):
            began = time.perf_counter()
            engine.step()
            walls.append(time.perf_counter() - began)
    events = [e for e in trace.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / num_steps
    print(f"{title}: wall {1e3 * median(walls):.2f} ms a step, device {total / 1e3:.2f} ms")
    for event in events[:num_kernels]:
        time_us = event.self_device_time_total / num_steps
        share = f"{100 * time_us / total:5.1f} % x{event.count / num_steps:<6.1f}"
        print(f"  {time_us:9.1f} us {share} {event.key[:80]}")
    sys.stdout.flush()


def check(directory: Path) -> None:
    """A small model with the attention of the large one: float32 must agree, bfloat16 is reported."""
    write_shape(directory, **SMALL)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 32000, n).tolist() for n in (17, 130, 333, 600, 64, 1)]
    likeliest = _likeliest(directory, prompts, "cpu", "float32")
    for dtype in ("float32", "bfloat16"):
        found = _likeliest(directory, prompts, "cuda", dtype)
        same = sum(a == b for a, b in zip(likeliest, found, strict=True))
        print(
            f"check {dtype}, given the prompts: {same} of {len(found)} places have the same likeliest token"
        )
    expected = _answers(directory, prompts, "cpu", "float32", uses_graphs=False)
    for dtype in ("float32", "bfloat16"):
        for uses_graphs in (False, True):
            found = _answers(directory, prompts, "cuda", dtype, uses_graphs=uses_graphs)
            pairs = [(e, f) for i in expected for e, f in zip(expected[i], found[i], strict=True)]
            same = sum(e == f for e, f in pairs)
            whole = sum(expected[i] == found[i] for i in expected)
            print(
                f"check {dtype}, {'graphs' if uses_graphs else 'eager'}: {same} of {len(pairs)} tokens, "
                f"{whole} of {len(prompts)} answers the same as on the CPU",
                flush=True,
            )


def _likeliest(directory: Path, prompts: list[list[int]], device: str, dtype: str) -> list[int]:
    """Of every place of every prompt."""
    engine = _small_engine(directory, device, dtype, uses_graphs=False)
    for seq_id, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=1, num_prompt_logprobs=1)
        engine.add(Sequence(seq_id, prompt, sampling))
    found: dict[int, list[int]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            found[output.seq_id] = [place.top_token_ids[0] for place in output.prompt_logprobs or ()]
    return [token_id for seq_id in range(len(prompts)) for token_id in found[seq_id]]


def _small_engine(directory: Path, device: str, dtype: str, *, uses_graphs: bool) -> Engine:
    return build_engine(
        EngineConfig(
            model_dir=directory,
            load_format="dummy",
            device=device,
            dtype=dtype,
            num_blocks=400,
            max_model_len=1024,
            max_running=8,
            token_budget=256,
            uses_graphs=uses_graphs,
        )
    )


def _answers(
    directory: Path, prompts: list[list[int]], device: str, dtype: str, *, uses_graphs: bool
) -> dict[int, list[int]]:
    engine = _small_engine(directory, device, dtype, uses_graphs=uses_graphs)
    for seq_id, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
        engine.add(Sequence(seq_id, prompt, sampling))
    found: dict[int, list[int]] = {seq_id: [] for seq_id in range(len(prompts))}
    while engine.has_work:
        for output in engine.step().outputs:
            found[output.seq_id] += output.token_ids
    return found


def publish(path: Path) -> None:
    from benchmarks.results_file import write_result

    document = json.loads(path.read_text())
    name = document["device"].lower().replace(" ", "-")
    notes = [f"device: {document['device']}, torch {document['torch']}", *document.get("notes", [])]
    notes.append("the processor named above wrote this file; the rates are the device's")
    title = f"Engine in process on one {document['device']}, DeepSeek-V2-Lite's shape"
    print(write_result(f"gpu-engine-{name}", title, COLUMNS, document["rows"], notes))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_engine", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    modes = parser.add_subparsers(dest="mode", required=True)
    tables = modes.add_parser("table")
    tables.add_argument("--rows", type=int, nargs="+", default=list(range(len(ROWS))))
    tables.add_argument("--token-budget", type=int, default=8192)
    tables.add_argument("--json", type=Path)
    profiles = modes.add_parser("profile")
    profiles.add_argument("--streams", type=int, nargs="+", default=[1, 32, 256])
    profiles.add_argument("--kernels", type=int, default=16)
    for mode in (tables, profiles):
        mode.add_argument("--weights", choices=DUMMY_SPREADS, default="variance")
        mode.add_argument("--fp8", action="store_true", help="weights in FP8")
        mode.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    modes.add_parser("check")
    modes.add_parser("publish").add_argument("file", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "model"
        if args.mode == "table":
            name = f"{args.weights}, FP8" if args.fp8 else args.weights
            name += ", FP8 KV" * (args.kv_cache_dtype == "fp8")
            engine = build(
                directory,
                args.weights,
                is_fp8=args.fp8,
                token_budget=args.token_budget,
                kv_cache_dtype=args.kv_cache_dtype,
            )
            table(engine, name, args.rows, args.json)
        elif args.mode == "profile":
            engine = build(directory, args.weights, is_fp8=args.fp8, kv_cache_dtype=args.kv_cache_dtype)
            profile(engine, args.streams, args.kernels)
        elif args.mode == "check":
            check(directory)
        else:
            publish(args.file)


if __name__ == "__main__":
    main()
