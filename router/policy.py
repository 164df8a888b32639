"""Which workers serve a sequence: a pure function of what is known about them.

The decode worker comes first, then whether a prefill worker is worth the hand-off, then which one. Costs are
in tokens to compute, so that work, queue and load add up; a lower cost is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PolicyName = Literal["prefix", "round_robin", "least_loaded"]
PrefillReason = Literal["remote", "short_suffix", "no_prefill_worker"]

# What one more running sequence costs the others, in prefill tokens: a slower step for each of their tokens.
REQUEST_COST_TOKENS = 64
# A hit must not pile all work on one worker: beyond both limits the least loaded one is taken.
MAX_REQUEST_SPREAD = 16
MAX_REQUEST_RATIO = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    worker_id: str
    layout_fingerprint: str  # hand-off needs equal ones
    num_hit_tokens: int = 0  # leading prompt tokens in its cache
    num_requests: int = 0  # running and waiting, those routed since it last told included
    num_waiting_tokens: int = 0  # prompt tokens still to compute, those routed since included
    prefill_tokens_per_s: float = 0.0  # 0: unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    decode_id: str
    prefill_id: str | None  # None: the decode worker prefills
    decode_reason: str  # "least_cost", "imbalance", "round_robin" or "least_loaded"
    prefill_reason: PrefillReason
    num_hit_tokens: int  # expected where the prompt is computed
    decode_cost: float
    prefill_cost: float  # of the worker that prefills


def choose(
    policy: PolicyName,
    num_prompt_tokens: int,
    decode: Sequence[Candidate],
    prefill: Sequence[Candidate],
    *,
    local_prefill_max_tokens: int,
    turn: int,
) -> Decision:
    """`decode` is not empty. `turn` counts decisions: it breaks ties and drives round robin."""
    chosen, decode_reason = _choose_decode(policy, num_prompt_tokens, decode, turn)
    able = [worker for worker in prefill if worker.layout_fingerprint == chosen.layout_fingerprint]
    num_uncached = num_prompt_tokens - chosen.num_hit_tokens
    helper: Candidate | None = None
    reason: PrefillReason
    if not able:
        reason = "no_prefill_worker"
    elif num_uncached <= local_prefill_max_tokens:
        reason = "short_suffix"
    else:
        reason = "remote"
        helper = _choose_prefill(policy, num_prompt_tokens, able, turn)
    return Decision(
        decode_id=chosen.worker_id,
        prefill_id=helper.worker_id if helper else None,
        decode_reason=decode_reason,
        prefill_reason=reason,
        num_hit_tokens=(helper or chosen).num_hit_tokens,
        decode_cost=_decode_cost(num_prompt_tokens, chosen),
        prefill_cost=_prefill_cost(num_prompt_tokens, helper or chosen, 0.0),
    )


def _choose_decode(
    policy: PolicyName, num_prompt_tokens: int, workers: Sequence[Candidate], turn: int
) -> tuple[Candidate, str]:
    if policy == "round_robin":
        return workers[turn % len(workers)], "round_robin"
    least_loaded = _least(workers, [worker.num_requests for worker in workers], turn)
    if policy == "least_loaded":
        return least_loaded, "least_loaded"
    if _is_imbalanced([worker.num_requests for worker in workers]):
        return least_loaded, "imbalance"
    costs = [_decode_cost(num_prompt_tokens, worker) for worker in workers]
    return _least(workers, costs, turn), "least_cost"


def _choose_prefill(
    policy: PolicyName, num_prompt_tokens: int, workers: Sequence[Candidate], turn: int
) -> Candidate:
    if policy == "round_robin":
        return workers[turn % len(workers)]
    if policy == "least_loaded":
        return _least(workers, [worker.num_waiting_tokens for worker in workers], turn)
    known = [worker.prefill_tokens_per_s for worker in workers if worker.prefill_tokens_per_s > 0]
    mean_rate = sum(known) / len(known) if known else 0.0
    costs = [_prefill_cost(num_prompt_tokens, worker, mean_rate) for worker in workers]
    return _least(workers, costs, turn)


def _decode_cost(num_prompt_tokens: int, worker: Candidate) -> float:
    """Tokens whose KV must come from somewhere, those queued before them, and the batch it joins."""
    num_uncached = num_prompt_tokens - worker.num_hit_tokens
    return num_uncached + worker.num_waiting_tokens + REQUEST_COST_TOKENS * worker.num_requests


def _prefill_cost(num_prompt_tokens: int, worker: Candidate, mean_rate: float) -> float:
    """Tokens to compute before the first one is out, in tokens of a worker of mean speed.

    What only the decode worker holds does not help: the prefill worker computes from its own cache.
    """
    num_tokens = num_prompt_tokens - worker.num_hit_tokens + worker.num_waiting_tokens
    is_known = worker.prefill_tokens_per_s > 0 and mean_rate > 0
    return num_tokens * (mean_rate / worker.prefill_tokens_per_s) if is_known else float(num_tokens)


def _is_imbalanced(num_requests: Sequence[int]) -> bool:
    most, fewest = max(num_requests), min(num_requests)
    return most - fewest > MAX_REQUEST_SPREAD and most > MAX_REQUEST_RATIO * fewest


def _least(workers: Sequence[Candidate], costs: Sequence[float], turn: int) -> Candidate:
    """The cheapest; equal ones take turns."""
    least = min(costs)
    equal = [worker for worker, cost in zip(workers, costs, strict=True) if cost == least]
    return equal[turn % len(equal)]
