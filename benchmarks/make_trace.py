"""Makes a trace in Mooncake's JSON-lines format: conversations with shared system prompts.

    python -m benchmarks.make_trace trace.jsonl --num-requests 1000 --rate 2

`baton bench --trace trace.jsonl` replays it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from baton.bench.trace import TraceShape, make_trace, write_trace

DEFAULTS = TraceShape(num_requests=1000, requests_per_s=2.0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_trace", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", type=Path)
    parser.add_argument("--num-requests", type=int, default=DEFAULTS.num_requests)
    parser.add_argument("--rate", type=float, default=DEFAULTS.requests_per_s, help="requests a second")
    parser.add_argument("--num-groups", type=int, default=DEFAULTS.num_groups, help="system prompts")
    parser.add_argument("--system-blocks", type=int, default=DEFAULTS.system_blocks, help="of 512 tokens")
    parser.add_argument("--mean-turns", type=float, default=DEFAULTS.mean_turns)
    parser.add_argument("--max-input-length", type=int, default=DEFAULTS.max_input_length, help="tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = TraceShape(
        num_requests=args.num_requests,
        requests_per_s=args.rate,
        num_groups=args.num_groups,
        system_blocks=args.system_blocks,
        mean_turns=args.mean_turns,
        max_input_length=args.max_input_length,
        seed=args.seed,
    )
    requests = make_trace(shape)
    write_trace(args.path, requests)
    num_blocks = sum(len(r.hash_ids) for r in requests)
    num_distinct = len({hash_id for r in requests for hash_id in r.hash_ids})
    print(
        f"{args.path}: {len(requests)} requests in {requests[-1].timestamp_ms / 1000:.0f} s, "
        f"{1 - num_distinct / num_blocks:.0%} of the blocks seen before"
    )


if __name__ == "__main__":
    main()
