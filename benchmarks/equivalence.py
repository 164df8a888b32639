"""Disaggregated = aggregated = transformers: the same greedy tokens, with all mixed in that could break it.

    python -m benchmarks.equivalence [--arch deepseek_v3] [--num-prompts 100]

Random prompts of 1 to 1,500 tokens on a random float32 checkpoint; every third prompt starts like an
earlier one (prefix hits), many run at once in few blocks (preemption, waiting), the token budget is
small (chunking). Deployments: one worker; prefill and decode; the same with the experts over two
processes. The counters of the workers say whether each of these things happened.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from baton.bench.load import served_model
from baton.http_client import HttpClient
from benchmarks.results_file import write_result
from benchmarks.serving import ROOT, Server, baton_up

COLUMNS = ("deployment", "prompts", "identical", "prompt tokens", "hit tokens", "preemptions", "hand-offs")
MAX_PROMPT_LEN = 1500
WORKER_OPTIONS = (
    *("--dtype", "float32", "--num-blocks", "320", "--max-model-len", "2048"),
    *("--token-budget", "256", "--max-running", "16"),
)
DEPLOYMENTS = {
    "aggregated": ("--aggregated",),
    "disaggregated": (),
    "disaggregated, EP 2": ("--ep-size", "2"),
}
# Every prompt is handed off, the shortest ones too.
ENVIRONMENT = {"BATON_ROUTER_LOCAL_PREFILL_MAX_TOKENS": "0"}
POLICY = ("--policy", "round_robin")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.equivalence", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", default="deepseek_v3", choices=("deepseek_v3", "deepseek_v2", "llama"))
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / args.arch
        module = "engine.checkpoint.random_checkpoint"
        command = [sys.executable, "-m", module, str(checkpoint), "--arch", args.arch]
        subprocess.run(command, cwd=ROOT, check=True)
        vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
        prompts = random_prompts(args.num_prompts, vocab_size, args.seed)
        expected = reference_tokens(checkpoint, prompts, args.output_len)
        rows = []
        for name, options in DEPLOYMENTS.items():
            if "EP" in name and args.arch == "llama":
                continue
            with baton_up(
                "--model", str(checkpoint), *WORKER_OPTIONS, *POLICY, *options, environment=ENVIRONMENT
            ) as server:
                found = asyncio.run(served_tokens(server, prompts, args))
                rows.append(compare(name, server, prompts, expected, found))
            print(rows[-1], flush=True)
    notes = [f"{args.arch}, tiny random checkpoint, float32, {args.output_len} greedy tokens a prompt"]
    print(write_result(f"equivalence-{args.arch}", "Same greedy tokens everywhere", COLUMNS, rows, notes))
    sys.exit(0 if all(row["identical"] == row["prompts"] for row in rows) else 1)


def random_prompts(count: int, vocab_size: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    prompts: list[list[int]] = []
    for index in range(count):
        length = draw.randint(1, MAX_PROMPT_LEN)
        start = list(draw.choice(prompts)[: length // 2]) if prompts and index % 3 == 0 else []
        prompts.append(start + [draw.randrange(3, vocab_size) for _ in range(length - len(start))])
    return prompts


def reference_tokens(checkpoint: Path, prompts: Sequence[Sequence[int]], output_len: int) -> list[list[int]]:
    """One prompt at a time, float32, no padding."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    expected = []
    with torch.inference_mode():
        for prompt_ids in prompts:
            ids = torch.tensor([list(prompt_ids)])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=output_len,
                max_new_tokens=output_len,
                pad_token_id=0,
            )
            expected.append(out[0, len(prompt_ids) :].tolist())
    return expected


async def served_tokens(
    server: Server, prompts: Sequence[Sequence[int]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Token ids and usage of each prompt, many at once, in the order of `prompts`."""
    model = await served_model(server.url)
    found: list[dict[str, Any]] = [{} for _ in prompts]
    waiting = iter(enumerate(prompts))

    async def stream() -> None:
        async with HttpClient(server.url) as client:
            for index, prompt_ids in waiting:
                found[index] = await complete(client, model, prompt_ids, args.output_len)

    async with asyncio.TaskGroup() as streams:
        for _ in range(args.concurrency):
            streams.create_task(stream())
    return found


async def complete(
    client: HttpClient, model: str, prompt_ids: Sequence[int], output_len: int
) -> dict[str, Any]:
    payload = {
        "model": model,
        "prompt": list(prompt_ids),
        "max_tokens": output_len,
        "temperature": 0,
        "min_tokens": output_len,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    token_ids: list[int] = []
    usage: dict[str, Any] = {}

    def on_event(data: bytes, _: float) -> None:
        event = orjson.loads(data)
        for choice in event.get("choices", []):
            token_ids.extend(choice.get("token_ids") or [])
        usage.update(event.get("usage") or {})

    await client.post_stream("/v1/completions", orjson.dumps(payload), on_event, timeout_s=600)
    return {"token_ids": token_ids, "usage": usage}


def compare(
    name: str,
    server: Server,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    found: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    identical = [list(e) == f["token_ids"] for e, f in zip(expected, found, strict=True)]
    counters = worker_counters(server)
    hits = [(f["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for f in found]
    return {
        "deployment": name,
        "prompts": len(prompts),
        "identical": sum(identical),
        "prompt tokens": sum(map(len, prompts)),
        "hit tokens": sum(hits),
        "preemptions": int(counters["baton_engine_preemptions_total"]),
        "hand-offs": int(counters["baton_handoff_size_bytes_count"]),
        "different": [index for index, is_same in enumerate(identical) if not is_same],
    }


def worker_counters(server: Server) -> dict[str, float]:
    """Sums over the workers, by the name of the metric without labels."""
    sums: dict[str, float] = {}
    for process in server.state()["processes"]:
        if process["role"] == "router":
            continue
        with urllib.request.urlopen(f"http://{process['metrics_address']}/metrics", timeout=5) as response:
            for line in response.read().decode().splitlines():
                if line and not line.startswith("#"):
                    name, _, value = line.rpartition(" ")
                    name = name.partition("{")[0]
                    sums[name] = sums.get(name, 0.0) + float(value)
    return sums


if __name__ == "__main__":
    main()
