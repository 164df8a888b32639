"""`transformers` generate on batches of random prompts; started by cpu_throughput with one JSON argument."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from baton.bench.workload import Workload


def main() -> None:
    request = json.loads(sys.argv[1])
    dtype = resolve(request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype=dtype).eval()
    generate(model, prompts(2, 128, 0), 4)
    rows = [measure(model, dtype, prompt_len, streams, request) for prompt_len, streams in request["points"]]
    print(json.dumps(rows))


def resolve(name: str) -> torch.dtype:
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def measure(
    model: Any, dtype: torch.dtype, prompt_len: int, num_streams: int, request: dict[str, Any]
) -> dict[str, Any]:
    output_len = request["output_len"]
    times = []
    for seed in range(request["repeats"]):
        batch = prompts(num_streams, prompt_len, seed + 1)
        ttft_s = generate(model, batch, 1)
        times.append((generate(model, batch, output_len), ttft_s))
    total_s, ttft_s = sorted(times)[len(times) // 2]
    num_output = num_streams * output_len
    return {
        "server": "transformers",
        "dtype": str(dtype).removeprefix("torch."),
        "prompt": prompt_len,
        "streams": num_streams,
        "output tok/s": num_output / total_s,
        "all tok/s": (num_output + num_streams * prompt_len) / total_s,
        "TTFT ms": ttft_s * 1000,
        "TPOT ms": (total_s - ttft_s) / (output_len - 1) * 1000,
        "failed": 0,
        "repeats": [num_output / seconds for seconds, _ in times],
    }


def prompts(num_streams: int, prompt_len: int, seed: int) -> torch.Tensor:
    workload = Workload(num_requests=num_streams, prompt_len=prompt_len, output_len=1, seed=seed)
    return torch.tensor(workload.prompts())


def generate(model: Any, batch: torch.Tensor, num_tokens: int) -> float:
    """Seconds."""
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        )
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
