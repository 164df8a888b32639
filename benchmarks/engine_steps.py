"""The engine alone, without services: tokens a second of the prompt phase, and the median decode step.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=20000 \\
        python -m benchmarks.engine_steps CHECKPOINT_DIR

OpenMP reads its variables once, at start: they are given from outside, so that they can be compared.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch

from baton.bench.workload import Workload
from engine.build import build_engine
from engine.engine_config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

OUTPUT_LEN = 64


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_steps", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path, help="made by `baton make-checkpoint DIR --preset small576`")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-len", type=int, default=128)
    args = parser.parse_args()
    config = EngineConfig(model_dir=args.checkpoint, dtype="float32", num_blocks=2600)
    print(f"{torch.get_num_threads()} threads")
    for num_streams in args.streams:
        engine = build_engine(config)  # a new one: no prefix cache from the last point
        workload = Workload(num_requests=num_streams, prompt_len=args.prompt_len, output_len=OUTPUT_LEN)
        sampling = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
        for seq_id, prompt_ids in enumerate(workload.prompts()):
            engine.add(Sequence(seq_id, list(prompt_ids), sampling))
        prompt_s, decode_steps_s = 0.0, []
        while engine.has_work:
            began = time.perf_counter()
            stats = engine.step().stats
            step_s = time.perf_counter() - began
            if stats.num_prefill_tokens:
                prompt_s += step_s
            else:
                decode_steps_s.append(step_s)
        rate = num_streams * args.prompt_len / prompt_s
        print(f"{num_streams} streams: prompt {rate:.0f} tok/s, step {1e3 * median(decode_steps_s):.1f} ms")


if __name__ == "__main__":
    main()
