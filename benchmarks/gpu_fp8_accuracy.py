"""What FP8 weights change: DeepSeek-V2-Lite's shape with made-up weights, against bf16 on one GPU.

    python -m benchmarks.gpu_fp8_accuracy

Random weights make nearly flat distributions, where the likeliest token turns on little: a lower bound of the
agreement that a trained model has.
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_shape import write_shape
from engine.build import build_engine
from engine.engine_config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

NUM_PROMPTS, PROMPT_LEN, VOCAB_SIZE = 8, 256, 102_400


def main() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB_SIZE, PROMPT_LEN).tolist() for _ in range(NUM_PROMPTS)]
    with tempfile.TemporaryDirectory() as directory:
        path = write_shape(Path(directory))
        bf16_ids, bf16_logprobs = _prompt_logprobs(path, prompts, has_fp8_weights=False)
        fp8_ids, fp8_logprobs = _prompt_logprobs(path, prompts, has_fp8_weights=True)
    difference = np.abs(bf16_logprobs - fp8_logprobs)
    print(f"{len(bf16_ids)} places, {np.mean(bf16_ids == fp8_ids):.3f} of them with the same likeliest token")
    print(
        f"logprob of the prompt's token: difference {difference.mean():.4f}, at most {difference.max():.4f}"
    )
    print(f"mean logprob: bf16 {bf16_logprobs.mean():.4f}, FP8 {fp8_logprobs.mean():.4f}")
    print(f"spread of the bf16 logprobs: {bf16_logprobs.std():.4f}")


def _prompt_logprobs(
    path: Path, prompts: list[list[int]], *, has_fp8_weights: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest token of every place, and the logprob of the token that stands there."""
    began = time.perf_counter()
    engine = build_engine(
        EngineConfig(
            model_dir=path,
            load_format="dummy",
            dtype="bfloat16",
            device="cuda",
            num_blocks=1000,
            max_model_len=1024,
            token_budget=2048,
            uses_graphs=False,
            has_fp8_weights=has_fp8_weights,
        )
    )
    print(
        f"FP8 weights {has_fp8_weights}: built in {time.perf_counter() - began:.1f} s, "
        f"{torch.cuda.memory_allocated() / 2**30:.1f} GiB",
        flush=True,
    )
    for seq_id, prompt in enumerate(prompts):
        engine.add(
            Sequence(seq_id, prompt, SamplingParams(temperature=0, max_tokens=1, num_prompt_logprobs=1))
        )
    places: dict[int, list[tuple[int, float]]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            entries = output.prompt_logprobs or ()
            places[output.seq_id] = [(entry.top_token_ids[0], entry.logprob) for entry in entries]
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    flat = [place for seq_id in range(len(prompts)) for place in places[seq_id]]
    return np.array([place[0] for place in flat]), np.array([place[1] for place in flat])


if __name__ == "__main__":
    main()
