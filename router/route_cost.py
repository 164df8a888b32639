"""What serving one prompt at one place costs, in seconds. Pure arithmetic; policy.py chooses.

wait     prompt tokens queued where this one is computed, and KV room where it is decoded
load     cached blocks from a slower place, shared out with compute until both meet (engine/kv_load.py)
compute  the rest of the prompt
handoff  what of the transfer the compute does not hide
decode   the first tokens after that, in the batch they join; a horizon, so that long answers do not outweigh
disturb  what others lose: slower steps for the horizon, a step with prompt tokens for each that decodes, and
         processors for the workers of the same host (host_load.py)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.worker_rates import ASSUMED, WorkerRates

HORIZON_TOKENS = 64
# Sequences that a local prompt holds up although they are not there yet. So a long prompt leaves an idle
# decode worker free for those that come while it is computed, as long as the hand-off costs less than that.
EXPECTED_SEQUENCES = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    worker_id: str
    layout_fingerprint: str  # KV moves between equal ones only
    host_id: str = ""
    num_hit_tokens: int = 0  # leading prompt tokens in its cache, in any tier
    num_host_tokens: int = 0  # of them in host memory
    num_disk_tokens: int = 0  # of them on disk
    num_requests: int = 0  # running and waiting, those routed since it last told included
    num_handing_off: int = 0  # of them: their prompts are still computed elsewhere
    num_waiting_tokens: int = 0  # prompt tokens still to compute, those routed since included
    num_free_tokens: int = 0  # room for KV
    num_total_tokens: int = 0  # 0: not told
    cpu_share: float = 0.0  # of its host's processors that its computing takes; 0: it has a device
    # What host_load.py adds:
    slowdown: float = 1.0  # of a prompt computed here, by others that compute on the host
    num_slowed: float = 0.0  # requests there that such a prompt holds up, as if for all of its time
    rates: WorkerRates = ASSUMED

    @property
    def is_computing(self) -> bool:
        return self.num_waiting_tokens > 0 or self.num_requests > self.num_handing_off


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    num_prompt_tokens: int
    max_tokens: int

    @property
    def horizon_tokens(self) -> int:
        """To decode after the first one."""
        return min(self.max_tokens - 1, HORIZON_TOKENS)


class Terms(NamedTuple):
    wait_s: float
    load_s: float
    compute_s: float
    handoff_s: float
    decode_s: float
    disturb_s: float

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.load_s + self.compute_s + self.handoff_s

    @property
    def total_s(self) -> float:
        return sum(self)


class Prompt(NamedTuple):
    """The prompt, computed on one worker."""

    worker: Candidate
    peer_id: str | None  # to fetch from
    wait_s: float
    load_s: float
    compute_s: float
    num_computed_tokens: int
    disturb_s: float  # what others on the host lose

    @property
    def total_s(self) -> float:
        return self.wait_s + self.load_s + self.compute_s + self.disturb_s


class Seat(NamedTuple):
    """A place in the batch of a decode worker."""

    worker: Candidate
    num_missing_tokens: int  # of KV, to come or to be computed
    room_s: float
    decode_s: float
    disturb_s: float

    @property
    def total_s(self) -> float:
        return self.room_s + self.decode_s + self.disturb_s


def prompt_on(request: RouteRequest, worker: Candidate, holders: list[Candidate]) -> Prompt:
    """`holders`: workers with the longest prefixes, longest first."""
    rates = worker.rates
    token_s = rates.prefill_token_s * worker.slowdown
    wait_s = rates.step_s + worker.num_waiting_tokens * token_s if worker.num_waiting_tokens else 0.0
    num_computed: float = request.num_prompt_tokens - worker.num_hit_tokens
    compute_s = rates.step_s + num_computed * token_s
    load_s = 0.0
    if worker.num_host_tokens or worker.num_disk_tokens:
        load_s, num_computed_meanwhile = _load_own(worker)
        num_computed += num_computed_meanwhile
    peer_id = None
    holder = _better_holder(worker, holders)
    if holder is not None:
        num_tokens = holder.num_hit_tokens - worker.num_hit_tokens
        byte_s = rates.peer.byte_s * rates.token_bytes
        fetch_s, num_computed_meanwhile = _bring(num_tokens, token_s, rates.peer.latency_s, byte_s)
        if num_computed_meanwhile < num_tokens:
            peer_id = holder.worker_id
            load_s += fetch_s
            num_computed -= num_tokens - num_computed_meanwhile
            compute_s -= num_tokens * token_s
    disturb_s = compute_s * worker.num_slowed
    return Prompt(worker, peer_id, wait_s, load_s, compute_s, round(num_computed), disturb_s)


def seat_at(request: RouteRequest, worker: Candidate) -> Seat:
    rates = worker.rates
    horizon = request.horizon_tokens
    num_missing = request.num_prompt_tokens - worker.num_hit_tokens
    others_s = worker.num_requests * rates.decode_seq_s
    room_s = 0.0
    if worker.num_total_tokens:
        num_short = num_missing + horizon - worker.num_free_tokens
        if num_short > 0:
            # Those that run there give all they have back in about one horizon.
            num_used = max(1, worker.num_total_tokens - worker.num_free_tokens)
            room_s = HORIZON_TOKENS * (rates.step_s + others_s) * min(1.0, num_short / num_used)
    decode_s = horizon * (rates.step_s + rates.decode_seq_s + others_s)
    return Seat(worker, num_missing, room_s, decode_s, horizon * others_s)


def terms_local(prompt: Prompt, seat: Seat) -> Terms:
    """The decode worker prefills by itself: its steps do both."""
    rates = seat.worker.rates
    num_others = seat.worker.num_requests - seat.worker.num_handing_off
    num_held_up = max(num_others, EXPECTED_SEQUENCES)
    held_up_s = prompt.num_computed_tokens * rates.prefill_token_s * num_held_up
    return Terms(
        prompt.wait_s + seat.room_s,
        prompt.load_s,
        prompt.compute_s + num_others * rates.decode_seq_s,
        0.0,
        seat.decode_s,
        seat.disturb_s + held_up_s + prompt.disturb_s,
    )


def terms_remote(request: RouteRequest, prompt: Prompt, seat: Seat) -> Terms:
    decode = seat.worker
    hidden_s = prompt.load_s + prompt.compute_s
    handoff_s = handoff_cost_s(request, prompt, seat, hidden_s)
    # Prompts that are still queued at the decode worker then share its steps.
    arrives_s = prompt.wait_s + hidden_s + handoff_s
    queued_s = max(0.0, decode.num_waiting_tokens * decode.rates.prefill_token_s - arrives_s)
    return Terms(
        prompt.wait_s + seat.room_s,
        prompt.load_s,
        prompt.compute_s,
        handoff_s,
        seat.decode_s + queued_s,
        seat.disturb_s + prompt.disturb_s,
    )


def handoff_cost_s(request: RouteRequest, prompt: Prompt, seat: Seat, hidden_s: float) -> float:
    decode, prefill = seat.worker, prompt.worker
    is_same_host = decode.host_id == prefill.host_id != ""
    path = decode.rates.shared_memory if is_same_host else decode.rates.stream
    if request.max_tokens == 1:
        return path.latency_s  # no KV moves
    num_bytes = seat.num_missing_tokens * decode.rates.token_bytes
    return path.latency_s + max(0.0, num_bytes * path.byte_s - hidden_s)


def _better_holder(worker: Candidate, holders: list[Candidate]) -> Candidate | None:
    for holder in holders:
        if holder.num_hit_tokens <= worker.num_hit_tokens:
            return None
        if holder.layout_fingerprint == worker.layout_fingerprint:
            return holder
    return None


def _load_own(worker: Candidate) -> tuple[float, float]:
    rates = worker.rates
    num_tokens = worker.num_host_tokens + worker.num_disk_tokens
    latency_s = all_s = 0.0
    for num_there, path in ((worker.num_host_tokens, rates.host), (worker.num_disk_tokens, rates.disk)):
        if num_there:
            latency_s += path.latency_s
            all_s += num_there * rates.token_bytes * path.byte_s
    return _bring(num_tokens, rates.prefill_token_s, latency_s, all_s / num_tokens)


def _bring(num_tokens: int, token_s: float, latency_s: float, load_token_s: float) -> tuple[float, float]:
    """Seconds until loading from the end, which begins after latency_s, and computing from the front, which
    begins at once, meet; and how many tokens were computed."""
    if latency_s >= num_tokens * token_s:
        return num_tokens * token_s, num_tokens
    seconds = token_s * (num_tokens * load_token_s + latency_s) / (load_token_s + token_s)
    return seconds, seconds / token_s
