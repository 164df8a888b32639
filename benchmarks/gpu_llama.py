"""Grouped-query attention on a GPU: the library's packed kernels against one sequence at a time.

    python -m benchmarks.gpu_llama

First a small model with made-up weights: at how many places of some prompts the likeliest token in bfloat16
(packed) is that of float32 (plain). Then one layer's attention in LLaMA-3-8B's shape (32 heads, 8 for keys,
128 dims), writing rows not included. A call waits for the device, as the eager steps of this model do.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_timing import eager_time, relative_error
from engine.attention.gqa import GqaAttention
from engine.attention.packed import attend_packed, plan_packed
from engine.attention.plan import plan_attention
from engine.build import build_engine
from engine.checkpoint.random_presets import hub_config
from engine.engine_config import EngineConfig
from engine.forward_batch import ForwardBatch
from engine.layers.linear import Linear
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
CASES = {  # (rows before, new rows) of each sequence
    "decode of 1 x 4096": [(4095, 1)],
    "decode of 32 x 1024": [(1023, 1)] * 32,
    "decode of 32, 64 to 2048": [(64 * (i + 1) - 1, 1) for i in range(32)],
    "8 prompts of 1024": [(0, 1024)] * 8,
    "1 prompt of 4096": [(0, 4096)],
    "1024 tokens behind 4096": [(4096, 1024)],
}


def main() -> None:
    check()
    print("| case | plain ms | packed ms | times | error |\n| --- | --- | --- | --- | --- |", flush=True)
    unused = Linear(torch.zeros(1, 1))
    attention = GqaAttention(unused, unused, HEADS, KV_HEADS, HEAD_DIM)
    for name, lengths in CASES.items():
        batch, num_blocks = make_batch(lengths)
        shape = (num_blocks, BLOCK_SIZE, 2, KV_HEADS, HEAD_DIM)
        cache = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        q = torch.randn(batch.num_tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        q /= HEAD_DIM**0.5
        grouped = q.unflatten(1, (KV_HEADS, -1))
        plain, packed = plan_attention(batch, cache), plan_packed(batch, cache)
        found = attend_packed(q, cache, packed)
        error = relative_error(found, attention.attend(grouped, cache, plain).flatten(1, 2))
        plain_s = eager_time(lambda: attention.attend(grouped, cache, plain))  # noqa: B023
        packed_s = eager_time(lambda: attend_packed(q, cache, packed))  # noqa: B023
        times = f"{1e3 * plain_s:.2f} | {1e3 * packed_s:.2f} | {plain_s / packed_s:.1f}"
        print(f"| {name} | {times} | {error:.4f} |", flush=True)


def make_batch(lengths: list[tuple[int, int]]) -> tuple[ForwardBatch, int]:
    """Decodes first; blocks are scattered."""
    needed = [-(-(before + new) // BLOCK_SIZE) for before, new in lengths]
    blocks = np.random.default_rng(0).permutation(sum(needed)).tolist()
    starts = np.cumsum([0, *needed])
    num_tokens = sum(new for _, new in lengths)
    rows = torch.zeros(num_tokens, dtype=torch.int64, device="cuda")
    batch = ForwardBatch(
        token_ids_T=rows,
        positions_T=rows,
        slot_mapping_T=rows,
        num_decodes=sum(new == 1 for _, new in lengths),
        query_start=np.cumsum([0, *(new for _, new in lengths)]).tolist(),
        context_len=[before + new for before, new in lengths],
        block_tables=[blocks[a:b] for a, b in zip(starts, starts[1:], strict=False)],
        logits_rows_N=rows[:0],
    )
    return batch, sum(needed)


def check() -> None:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 4000, n).tolist() for n in (17, 130, 333, 600, 64, 1)]
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(hub_config("llama", "small576", "bfloat16")))
        places = [likeliest(Path(name), prompts, dtype) for dtype in ("float32", "bfloat16")]
    same = sum(a == b for a, b in zip(*places, strict=True))
    print(
        f"{same} of {len(places[0])} places have the same likeliest token in bfloat16 and float32", flush=True
    )


def likeliest(model_dir: Path, prompts: list[list[int]], dtype: str) -> list[int]:
    """Of every place of every prompt."""
    config = EngineConfig(
        model_dir=model_dir,
        load_format="dummy",
        device="cuda",
        dtype=dtype,
        num_blocks=400,
        max_model_len=1024,
        token_budget=512,
    )
    engine = build_engine(config)
    for seq_id, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, num_prompt_logprobs=1)
        engine.add(Sequence(seq_id, prompt, sampling))
    found: dict[int, list[int]] = {}  # a prompt of one token has no such place
    while engine.has_work:
        for output in engine.step().outputs:
            if output.prompt_logprobs:
                found[output.seq_id] = [place.top_token_ids[0] for place in output.prompt_logprobs]
    return [token_id for seq_id in range(len(prompts)) for token_id in found.get(seq_id, ())]


if __name__ == "__main__":
    main()
