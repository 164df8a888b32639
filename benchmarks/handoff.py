"""What the hand-off of the KV cache costs: MB/s and its share of TTFT, shared memory against gRPC bytes.

    python -m benchmarks.handoff [--prompt-lens 512 4096] [--repeats 5]

One request at a time, random prompts on small576, one prefill and two decode workers used in turn. Each
prompt is sent twice. The first time the prefill worker computes it and the transfer hides behind the
compute; the second time the prefill worker has all but the prompt's end cached and the other decode
worker nothing, so that little but the transfer is left. A transfer lasts from the first chunk to the last
one written; what of the prompt is still computed falls into it, so MB/s is a lower bound. Hand-off
time is first token sampled -> committed, the part that nothing hides; TTFT is the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from baton.bench.load import Target, measure, served_model
from baton.bench.workload import Workload
from baton.http_client import HttpClient
from benchmarks.cpu_throughput import make_checkpoint
from benchmarks.equivalence import worker_counters
from benchmarks.results_file import table, write_result
from benchmarks.serving import Server, baton_up

COLUMNS = (
    "carrier",
    "prompt",
    "prefill",
    "TTFT ms",
    "hand-off ms",
    "share of TTFT",
    "MB",
    "transfer ms",
    "MB/s",
)
CARRIERS = {
    "shared memory": {},
    "gRPC": {"BATON_PREFILL_SHARED_MEMORY": "false", "BATON_DECODE_SHARED_MEMORY": "false"},
}


@dataclass(frozen=True)
class Sample:
    """One request."""

    ttft_s: float
    handoff_s: float
    transfer_s: float
    num_bytes: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.handoff", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", type=Path, help="default: small576, made for this run")
    parser.add_argument("--prompt-lens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = args.checkpoint or Path(directory) / "small576"
        if not checkpoint.exists():
            make_checkpoint(checkpoint)
            lengthen_context(checkpoint)
        options = (
            "--model",
            str(checkpoint),
            "--dtype",
            args.dtype,
            "--decode",
            "2",
            "--policy",
            "round_robin",
        )
        for carrier, environment in CARRIERS.items():
            environment = {**environment, "BATON_ROUTER_LOCAL_PREFILL_MAX_TOKENS": "0"}
            with baton_up(*options, environment=environment) as server:
                rows += asyncio.run(measure_carrier(carrier, server, args))
    notes = [f"small576 (4 layers, latent of 576), one request at a time, medians of {args.repeats}"]
    print(write_result("handoff", "Cost of the hand-off", COLUMNS, rows, notes))


def lengthen_context(checkpoint: Path) -> None:
    """The weights are random: any position will do."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 8192}))


async def measure_carrier(carrier: str, server: Server, args: argparse.Namespace) -> list[dict[str, Any]]:
    target = Target(url=server.url, model=await served_model(server.url), output_len=2)
    rows = []
    async with HttpClient(server.url) as client:
        for prompt_len in args.prompt_lens:
            # One more than measured: the first prompt of a length meets cold buffers.
            workload = Workload(
                num_requests=args.repeats + 1, prompt_len=prompt_len, output_len=2, seed=prompt_len
            )
            pairs = []
            for prompt_ids in workload.prompts():
                first = await sample(client, target, server, prompt_ids)
                pairs.append((first, await sample(client, target, server, prompt_ids)))
            computed, cached = zip(*pairs[1:], strict=True)
            rows.append(row(carrier, prompt_len, "computes", computed))
            rows.append(row(carrier, prompt_len, "has it cached", cached))
            print("\n".join(table(COLUMNS, rows)[-2:]), flush=True)
    return rows


async def sample(
    client: HttpClient,
    target: Target,
    server: Server,
    prompt_ids: list[int],
    output_len: int | None = None,
) -> Sample:
    before = worker_counters(server)
    measured = await measure(client, target, prompt_ids, output_len)
    if measured.error:
        raise RuntimeError(measured.error)
    after = worker_counters(server)
    # A counter with labels is absent until its first use.
    used = {name: value - before.get(name, 0.0) for name, value in after.items()}
    if used["baton_handoff_size_bytes_count"] != 1:
        raise RuntimeError(f"a prompt of {len(prompt_ids)} tokens was not handed off")
    return Sample(
        ttft_s=measured.ttft_s,
        handoff_s=used["baton_handoff_seconds_sum"],
        transfer_s=used["baton_handoff_transfer_seconds_sum"],
        num_bytes=used["baton_handoff_size_bytes_sum"],
    )


def row(carrier: str, prompt_len: int, prefill: str, samples: Sequence[Sample]) -> dict[str, Any]:
    ttft_ms = median(s.ttft_s for s in samples) * 1000
    handoff_ms = median(s.handoff_s for s in samples) * 1000
    return {
        "carrier": carrier,
        "prompt": prompt_len,
        "prefill": prefill,
        "TTFT ms": ttft_ms,
        "hand-off ms": handoff_ms,
        "share of TTFT": f"{median(s.handoff_s / s.ttft_s for s in samples):.1%}",
        "MB": median(s.num_bytes for s in samples) / 1e6,
        "transfer ms": median(s.transfer_s for s in samples) * 1000,
        "MB/s": None if prefill == "computes" else median(s.num_bytes / s.transfer_s for s in samples) / 1e6,
    }


if __name__ == "__main__":
    main()
