"""What a routing decision costs in the router: choose() alone, by size of the fleet.

    python -m benchmarks.route_choice [--quick]

Made-up workers of two speeds, a third of them with part of the prompt cached, half of them with a queue.
Times are of the thread's own processor time, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from random import Random
from typing import Any

from benchmarks.results_file import table, write_result
from router.policy import Chance, PolicyConfig, choose
from router.route_cost import Candidate, RouteRequest
from router.worker_rates import WorkerRates

COLUMNS = ("decode workers", "prefill workers", "ways considered", "min ms", "p50 ms", "p99 ms")
SIZES = ((1, 0), (2, 2), (16, 16), (64, 64), (200, 200), (400, 0))
RATES = [WorkerRates(prefill_token_s=token_s, token_bytes=70_000.0) for token_s in (1e-4, 2e-4)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.route_choice", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="few decisions, no result file")
    is_quick = parser.parse_args().quick
    rows = [measure(*size, num_decisions=50 if is_quick else 1000) for size in SIZES]
    print("\n".join(table(COLUMNS, rows)))
    if not is_quick:
        notes = ["a prompt of 8,000 tokens, an answer of 200", "times: processor time of the thread"]
        print(write_result("route-choice", "Cost of a routing decision", COLUMNS, rows, notes))


def measure(num_decode: int, num_prefill: int, *, num_decisions: int) -> dict[str, Any]:
    random = Random(1)
    decode = [make_worker(f"decode-{index:03}", random) for index in range(num_decode)]
    prefill = [make_worker(f"prefill-{index:03}", random) for index in range(num_prefill)]
    request = RouteRequest(num_prompt_tokens=8000, max_tokens=200)
    times_ms = []
    for turn in range(num_decisions):
        began = time.thread_time()
        decision = choose(PolicyConfig(name="prefix"), request, decode, prefill, Chance(turn=turn))
        times_ms.append((time.thread_time() - began) * 1000)
    return {
        "decode workers": num_decode,
        "prefill workers": num_prefill,
        "ways considered": len(decision.options),
        "min ms": min(times_ms),
        "p50 ms": statistics.median(times_ms),
        "p99 ms": statistics.quantiles(times_ms, n=100)[98],
    }


def make_worker(worker_id: str, random: Random) -> Candidate:
    return Candidate(
        worker_id=worker_id,
        layout_fingerprint="layout",
        host_id=f"host-{random.randrange(50)}",
        num_hit_tokens=random.choice([0, 0, 0, 0, 512, 3000]),
        num_requests=random.randrange(12),
        num_waiting_tokens=random.choice([0, random.randrange(5000)]),
        num_free_tokens=50_000,
        num_total_tokens=100_000,
        rates=random.choice(RATES),
    )


if __name__ == "__main__":
    main()
