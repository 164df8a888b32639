"""The placement policy on simulated workers: hours of traffic in seconds, the same every time.

    python -m benchmarks.simulated_placement

A worker makes one step after the other; a step of p prompt tokens and d sequences takes what the rates say.
Each keeps the prefixes it used last. A hand-off and a fetch take latency and bytes, a fetch no compute. The
router knows all loads exactly. So this compares policies, and finds what no load test is long enough for; it
predicts no real machine.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from benchmarks.results_file import table
from router.policy import Candidate, Chance, PolicyConfig, PolicyName, choose
from router.route_cost import RouteRequest
from router.worker_rates import KvCost, WorkerRates

RATES = WorkerRates(
    step_s=0.02,
    prefill_token_s=0.0012,
    decode_seq_s=0.002,
    token_bytes=5000.0,
    shared_memory=KvCost(0.003, 1 / 2e9),
    peer=KvCost(0.005, 1 / 500e6),
)
TOKEN_BUDGET = 256
COLUMNS = (
    "load",
    "requests/s",
    "policy",
    "workers",
    "TTFT p50 ms",
    "TTFT p99 ms",
    "TTFT mean ms",
    "TPOT p99 ms",
    "E2E mean ms",
    "prefilled by decode",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    requests_per_s: float
    prompt_len: int
    output_len: int
    prefix_len: int = 0  # shared within a group
    num_groups: int = 1
    num_requests: int = 1500
    seed: int = 1


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    group: int
    arrived_at: float = 0.0
    num_left: int = 0  # prompt tokens
    num_output: int = 0
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    is_local: bool = False
    decode: SimulatedWorker = field(init=False)


@dataclass(slots=True, eq=False)
class SimulatedWorker:
    worker_id: str
    max_prefixes: int
    prompts: list[SimulatedRequest] = field(default_factory=list)
    decoding: list[SimulatedRequest] = field(default_factory=list)
    num_handing_off: int = 0
    is_busy: bool = False
    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def use_prefix(self, group: int) -> None:
        self.prefixes[group] = None
        self.prefixes.move_to_end(group)
        if len(self.prefixes) > self.max_prefixes:
            self.prefixes.popitem(last=False)


class Simulation:
    def __init__(
        self, policy: PolicyName, num_decode: int, num_prefill: int, traffic: Traffic, max_prefixes: int = 13
    ) -> None:
        self._config = PolicyConfig(name=policy)
        self._traffic = traffic
        self._decode = [SimulatedWorker(f"decode-{i}", max_prefixes) for i in range(num_decode)]
        self._prefill = [SimulatedWorker(f"prefill-{i}", max_prefixes) for i in range(num_prefill)]
        self._by_id = {worker.worker_id: worker for worker in [*self._decode, *self._prefill]}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._turns = itertools.count()
        self._now = 0.0
        self.finished: list[SimulatedRequest] = []

    def run(self) -> list[SimulatedRequest]:
        """All requests, finished."""
        random, at = Random(self._traffic.seed), 0.0
        for _ in range(self._traffic.num_requests):
            at += random.expovariate(self._traffic.requests_per_s)
            request = SimulatedRequest(random.randrange(self._traffic.num_groups))
            self._after(at, lambda request=request: self._arrive(request))  # type: ignore[misc]
        while self._events:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
        return self.finished

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._order), happen))

    def _candidate(self, worker: SimulatedWorker, group: int) -> Candidate:
        return Candidate(
            worker_id=worker.worker_id,
            layout_fingerprint="layout",
            host_id="host",
            num_hit_tokens=self._traffic.prefix_len if group in worker.prefixes else 0,
            num_requests=len(worker.decoding) + len(worker.prompts) + worker.num_handing_off,
            num_handing_off=worker.num_handing_off,
            num_waiting_tokens=sum(request.num_left for request in worker.prompts),
            rates=RATES,
        )

    def _arrive(self, request: SimulatedRequest) -> None:
        traffic = self._traffic
        decision = choose(
            self._config,
            RouteRequest(num_prompt_tokens=traffic.prompt_len, max_tokens=traffic.output_len),
            [self._candidate(worker, request.group) for worker in self._decode],
            [self._candidate(worker, request.group) for worker in self._prefill],
            Chance(turn=next(self._turns)),
        )
        request.arrived_at = self._now
        request.decode = self._by_id[decision.decode_id]
        request.is_local = decision.prefill_id is None
        computing = self._by_id[decision.prefill_id or decision.decode_id]
        if computing is not request.decode:
            request.decode.num_handing_off += 1
        num_hit_tokens, fetch_s = 0, 0.0
        if request.group in computing.prefixes:
            num_hit_tokens = traffic.prefix_len
        elif decision.peer_id is not None:
            num_hit_tokens = traffic.prefix_len
            fetch_s = RATES.peer.latency_s + num_hit_tokens * RATES.token_bytes * RATES.peer.byte_s
        request.num_left = traffic.prompt_len - num_hit_tokens
        computing.prompts.append(request)
        self._after(fetch_s, lambda: self._step(computing))

    def _step(self, worker: SimulatedWorker) -> None:
        if worker.is_busy or not (worker.prompts or worker.decoding):
            return
        worker.is_busy = True
        num_free, chunks = TOKEN_BUDGET, []
        for request in worker.prompts:
            num_tokens = min(num_free, request.num_left)
            if num_tokens:
                chunks.append((request, num_tokens))
                num_free -= num_tokens
        num_tokens = TOKEN_BUDGET - num_free
        step_s = RATES.step_s + num_tokens * RATES.prefill_token_s + len(worker.decoding) * RATES.decode_seq_s
        decoding = list(worker.decoding)
        self._after(step_s, lambda: self._end_step(worker, chunks, decoding))

    def _end_step(
        self,
        worker: SimulatedWorker,
        chunks: list[tuple[SimulatedRequest, int]],
        decoding: list[SimulatedRequest],
    ) -> None:
        worker.is_busy = False
        for request in decoding:
            self._emit(worker, request)
        for request, num_tokens in chunks:
            request.num_left -= num_tokens
            if not request.num_left:
                worker.prompts.remove(request)
                worker.use_prefix(request.group)
                self._end_prompt(worker, request)
        self._step(worker)

    def _end_prompt(self, worker: SimulatedWorker, request: SimulatedRequest) -> None:
        def begin() -> None:
            if worker is not request.decode:
                request.decode.num_handing_off -= 1
                request.decode.use_prefix(request.group)
            request.ttft_s = self._now - request.arrived_at
            request.decode.decoding.append(request)
            self._emit(request.decode, request)
            self._step(request.decode)

        if worker is request.decode:
            begin()
        else:
            num_bytes = self._traffic.prompt_len * RATES.token_bytes
            self._after(RATES.shared_memory.latency_s + num_bytes * RATES.shared_memory.byte_s, begin)

    def _emit(self, worker: SimulatedWorker, request: SimulatedRequest) -> None:
        request.num_output += 1
        if request.num_output == self._traffic.output_len:
            worker.decoding.remove(request)
            request.e2e_s = self._now - request.arrived_at
            self.finished.append(request)


def summarize(finished: list[SimulatedRequest]) -> dict[str, float]:
    """In milliseconds."""
    ttft = [request.ttft_s * 1000 for request in finished]
    tpot = [(r.e2e_s - r.ttft_s) * 1000 / max(1, r.num_output - 1) for r in finished]
    return {
        "TTFT p50 ms": statistics.median(ttft),
        "TTFT p99 ms": statistics.quantiles(ttft, n=100)[98],
        "TTFT mean ms": statistics.mean(ttft),
        "TPOT p99 ms": statistics.quantiles(tpot, n=100)[98],
        "E2E mean ms": statistics.mean(request.e2e_s * 1000 for request in finished),
        "prefilled by decode": statistics.mean(request.is_local for request in finished),
    }


LOADS = {
    "shared prefix": {"prompt_len": 640, "output_len": 16, "prefix_len": 512, "num_groups": 24},
    "no sharing": {"prompt_len": 640, "output_len": 16},
    "long answers": {"prompt_len": 300, "output_len": 128},
}


def main() -> None:
    rows = []
    for load, fields in LOADS.items():
        for requests_per_s in (1.0, 2.0, 4.0) if load != "long answers" else (1.0, 2.0):
            traffic = Traffic(requests_per_s=requests_per_s, **fields)
            runs: list[tuple[PolicyName, int, int]] = [
                ("prefix", 2, 2),
                ("round_robin", 2, 2),
                ("least_loaded", 2, 2),
                ("prefix", 4, 0),
            ]
            for policy, num_decode, num_prefill in runs:
                row = {"load": load, "requests/s": requests_per_s, "policy": policy}
                row["workers"] = f"{num_prefill} prefill + {num_decode} decode"
                finished = Simulation(policy, num_decode, num_prefill, traffic).run()
                rows.append(row | summarize(finished))
    print("\n".join(table(COLUMNS, rows)))


if __name__ == "__main__":
    main()
