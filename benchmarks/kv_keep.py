"""What it costs to keep blocks below the device: prompt speed and decode steps without, with host memory, and
with a disk.

    python -m benchmarks.kv_keep [--streams 8] [--prompt-len 256] [--repeats 3]

The engine alone, on small576. Every full block is copied while the engine goes on; nothing is read back. Runs
of the three kinds take turns, and the ratio is that of their medians.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from baton.bench.workload import Workload
from benchmarks.cpu_throughput import make_checkpoint
from benchmarks.results_file import write_result
from engine.build import build_engine
from engine.engine_config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

OUTPUT_LEN = 48
COLUMNS = ("kept in", "prompt tok/s", "of none", "decode step ms", "over none", "blocks kept", "blocks lost")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_keep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    samples: dict[str, list[dict[str, float]]] = {"none": [], "host": [], "disk": []}
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Path(name) / "small576"
        make_checkpoint(checkpoint)
        for repeat in range(args.repeats + 1):
            tiers: dict[str, dict[str, Any]] = {
                "none": {},
                "host": {"host_kv_bytes": 1 << 30},
                "disk": {"disk_kv_dir": Path(name) / f"kv-{repeat}"},
            }
            for kind, options in tiers.items():
                found = run(EngineConfig(model_dir=checkpoint, num_blocks=600, **options), args)
                if repeat:  # the first round meets cold buffers
                    samples[kind].append(found)
    medians = {
        kind: {key: median(sample[key] for sample in found) for key in found[0]}
        for kind, found in samples.items()
    }
    none = medians["none"]
    rows = [
        {
            "kept in": kind,
            "prompt tok/s": values["rate"],
            "of none": values["rate"] / none["rate"],
            "decode step ms": values["step_s"] * 1000,
            "over none": values["step_s"] / none["step_s"],
            "blocks kept": int(values["kept"]),
            "blocks lost": int(values["lost"]),
            "samples": samples[kind],
        }
        for kind, values in medians.items()
    ]
    notes = [
        f"small576, {args.streams} streams, prompts of {args.prompt_len}, {OUTPUT_LEN} tokens each, "
        f"medians of {args.repeats}; disk is disk alone, by way of host memory"
    ]
    print(write_result("kv-keep", "Cost of keeping blocks below the device", COLUMNS, rows, notes))


def run(config: EngineConfig, args: argparse.Namespace) -> dict[str, float]:
    engine = build_engine(config)
    workload = Workload(num_requests=args.streams, prompt_len=args.prompt_len, output_len=OUTPUT_LEN)
    sampling = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    for seq_id, prompt_ids in enumerate(workload.prompts()):
        engine.add(Sequence(seq_id, list(prompt_ids), sampling))
    prompt_s, decode_steps_s = 0.0, []
    while engine._seqs:
        began = perf_counter()
        stats = engine.step().stats
        step_s = perf_counter() - began
        if stats.num_prefill_tokens:
            prompt_s += step_s
        else:
            decode_steps_s.append(step_s)
    while not engine._tiers.is_idle:
        engine._tiers.poll()
    last = engine._tiers.stats()[-1:]
    engine.close()
    return {
        "rate": args.streams * args.prompt_len / prompt_s,
        "step_s": median(decode_steps_s),
        "kept": float(sum(tier.num_cached_blocks for tier in last)),
        "lost": float(sum(tier.num_lost_blocks for tier in last)),
    }


if __name__ == "__main__":
    main()
