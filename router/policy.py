"""Which workers serve a sequence: a pure function of what is known about them.

`prefix` takes the least cost in seconds (route_cost.py) over pairs of decode worker and prefill worker, and
over decode workers that prefill by themselves; the prompt may be brought partly from a peer that holds more
of it. `round_robin` and `least_loaded` know nothing of costs: they are what `prefix` is measured against.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from operator import attrgetter
from typing import Literal, NamedTuple, TypeVar

from router.route_cost import (
    Candidate,
    Prompt,
    RouteRequest,
    Seat,
    Terms,
    handoff_cost_s,
    prompt_on,
    seat_at,
    terms_local,
    terms_remote,
)

PolicyName = Literal["prefix", "round_robin", "least_loaded"]
DecodeReason = Literal["least_cost", "imbalance", "drawn", "round_robin", "least_loaded"]
PrefillReason = Literal["remote", "local", "no_prefill_worker"]

# A hit must not pile all work on one worker: one beyond both limits over the least loaded one is barred.
MAX_REQUEST_SPREAD = 16
MAX_REQUEST_RATIO = 1.5
# Pairs are made of so many workers of each role, the best by what can be said of them alone.
MAX_PAIRED = 8

_worker_id = attrgetter("worker_id")
_T = TypeVar("_T")


class Option(NamedTuple):
    """One way to serve the sequence."""

    seat: Seat
    prompt: Prompt
    terms: Terms
    cost_s: float

    @property
    def decode_id(self) -> str:
        return self.seat.worker.worker_id

    @property
    def prefill_id(self) -> str | None:
        """None: the decode worker prefills."""
        prefill = self.prompt.worker
        return None if prefill is self.seat.worker else prefill.worker_id

    @property
    def ids(self) -> tuple[str, str]:
        return self.decode_id, self.prefill_id or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    decode_id: str
    prefill_id: str | None  # None: the decode worker prefills
    peer_id: str | None  # whoever computes the prompt may fetch from it
    decode_reason: DecodeReason
    prefill_reason: PrefillReason
    num_hit_tokens: int  # expected: prompt tokens from a cache, on either worker
    num_computed_tokens: int  # expected, where the prompt is computed
    terms: Terms
    is_measured: bool  # the terms rest on what workers measured
    options: tuple[Option, ...]  # what it was chosen from


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    name: PolicyName
    temperature_s: float = 0.0  # prefix; above 0: an option is drawn, with odds of e^(-cost / temperature_s)
    local_prefill_max_tokens: int = 32  # the others hand off what is longer


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """What makes decisions differ that know the same."""

    turn: int  # counts decisions: equal costs take turns, and it drives round robin
    draw: float = 0.0  # in [0, 1)


def choose(
    config: PolicyConfig,
    request: RouteRequest,
    decode: Iterable[Candidate],
    prefill: Iterable[Candidate],
    chance: Chance,
) -> Decision:
    """`decode` is not empty. Neither order matters."""
    turn = chance.turn
    decode, prefill = sorted(decode, key=_worker_id), sorted(prefill, key=_worker_id)
    if config.name != "prefix":
        return _choose_simply(config, request, decode, prefill, turn)
    holders = _holders([*decode, *prefill], turn)
    seats = [seat_at(request, worker) for worker in decode]
    alone = [_alone(request, seat, holders) for seat in seats]
    pairing = _Pairing(request, [prompt_on(request, worker, holders) for worker in prefill], turn)
    barred = _barred(decode)
    allowed = [not is_barred for is_barred in barred]
    options = [option for option, is_allowed in zip(alone, allowed, strict=True) if is_allowed]
    options += pairing.options([seat for seat, is_allowed in zip(seats, allowed, strict=True) if is_allowed])
    reason: DecodeReason = "least_cost"
    chosen = _least(options, turn)
    if config.temperature_s > 0:
        reason, chosen = "drawn", _drawn(options, config.temperature_s, chance.draw)
    elif any(barred):
        best_barred = min(
            min(option.cost_s, pairing.least_s(option.seat))
            for option, is_barred in zip(alone, barred, strict=True)
            if is_barred
        )
        reason = "imbalance" if best_barred < chosen.cost_s else reason
    return _decide(request, chosen, reason, options, has_prefill=bool(pairing.able(chosen.seat)))


class _Pairing:
    """Finds the pairs worth looking at. Each side is ranked by what can be said of it alone, so that a fleet
    of hundreds costs hundreds of looks and not their square."""

    def __init__(self, request: RouteRequest, prompts: Sequence[Prompt], turn: int) -> None:
        self._request = request
        self._turn = turn
        self._by_layout: dict[str, list[Prompt]] = {}
        self._by_host: dict[tuple[str, str], Prompt] = {}  # the best one of a layout on a host
        groups: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            groups.setdefault(prompt.worker.layout_fingerprint, []).append(prompt)
        for layout, group in groups.items():
            costs = [prompt.total_s for prompt in group]
            self._by_layout[layout] = _shortlist(group, costs, turn // MAX_PAIRED)
            for prompt, cost in zip(group, costs, strict=True):
                if not prompt.worker.host_id:
                    continue
                place = (layout, prompt.worker.host_id)
                best = self._by_host.get(place)
                if best is None or cost < best.total_s:
                    self._by_host[place] = prompt

    def able(self, seat: Seat) -> list[Prompt]:
        """The best prefill workers that can hand over to it."""
        return self._by_layout.get(seat.worker.layout_fingerprint, [])

    def least_s(self, seat: Seat) -> float:
        """No pair with this seat costs less."""
        able = self.able(seat)
        if not able:
            return math.inf
        return seat.total_s + min(prompt.total_s for prompt in able)

    def options(self, seats: Sequence[Seat]) -> list[Option]:
        paired = [seat for seat in seats if self.able(seat)]
        ranks = [self._rank_s(seat) for seat in paired]
        options = []
        for seat in _shortlist(paired, ranks, self._turn):
            prompts = self.able(seat)
            neighbour = self._by_host.get((seat.worker.layout_fingerprint, seat.worker.host_id))
            if neighbour is not None and all(neighbour is not prompt for prompt in prompts):
                prompts = [*prompts, neighbour]
            for prompt in prompts:
                terms = terms_remote(self._request, prompt, seat)
                options.append(Option(seat, prompt, terms, terms.total_s))
        return options

    def _rank_s(self, seat: Seat) -> float:
        best = self.able(seat)[0]
        return seat.total_s + handoff_cost_s(self._request, best, seat, best.load_s + best.compute_s)


def _alone(request: RouteRequest, seat: Seat, holders: list[Candidate]) -> Option:
    prompt = prompt_on(request, seat.worker, holders)
    terms = terms_local(prompt, seat)
    return Option(seat, prompt, terms, terms.total_s)


def _holders(workers: Sequence[Candidate], turn: int) -> list[Candidate]:
    """The longest prefix of each layout, longest first; equal ones take turns to be fetched from."""
    longest: dict[str, list[Candidate]] = {}
    for worker in workers:
        if not worker.num_hit_tokens:
            continue
        best = longest.setdefault(worker.layout_fingerprint, [worker])
        if worker.num_hit_tokens > best[0].num_hit_tokens:
            longest[worker.layout_fingerprint] = [worker]
        elif worker.num_hit_tokens == best[0].num_hit_tokens and worker is not best[0]:
            best.append(worker)
    holders = [best[turn % len(best)] for best in longest.values()]
    return sorted(holders, key=lambda holder: (-holder.num_hit_tokens, holder.worker_id))


def _barred(workers: Sequence[Candidate]) -> list[bool]:
    fewest = min(worker.num_requests for worker in workers)
    most = max(fewest + MAX_REQUEST_SPREAD, fewest * MAX_REQUEST_RATIO)
    return [worker.num_requests > most for worker in workers]


def _shortlist(items: Sequence[_T], costs: Sequence[float], turn: int) -> list[_T]:
    """The MAX_PAIRED cheapest, cheapest first. Equal ones are among them by turns: so many turns long that
    each can have its own in _least()."""
    count, first = len(items), turn - turn % MAX_PAIRED
    ranked = nsmallest(MAX_PAIRED, range(count), key=lambda i: (costs[i], (i - first) % count))
    return [items[i] for i in ranked]


def _least(options: Sequence[Option], turn: int) -> Option:
    """The cheapest. Of equal ones that with the fewest requests, then the longest prefix, where it decodes;
    then they take turns."""
    ranks = [(o.cost_s, o.seat.worker.num_requests, o.seat.num_missing_tokens) for o in options]
    least = min(ranks)
    equal = [option for option, rank in zip(options, ranks, strict=True) if rank == least]
    decode_ids = sorted({option.decode_id for option in equal})
    decode_id = decode_ids[turn % len(decode_ids)]
    there = sorted((option for option in equal if option.decode_id == decode_id), key=attrgetter("ids"))
    return there[turn // len(decode_ids) % len(there)]


def _drawn(options: Sequence[Option], temperature_s: float, draw: float) -> Option:
    ordered = sorted(options, key=attrgetter("ids"))
    least_s = min(option.cost_s for option in ordered)
    odds = [math.exp((least_s - option.cost_s) / temperature_s) for option in ordered]
    left = draw * math.fsum(odds)
    for option, odd in zip(ordered, odds, strict=True):
        left -= odd
        if left < 0:
            return option
    return max(ordered, key=lambda option: -option.cost_s)  # rounding: draw was next to 1


def _choose_simply(
    config: PolicyConfig,
    request: RouteRequest,
    decode: Sequence[Candidate],
    prefill: Sequence[Candidate],
    turn: int,
) -> Decision:
    reason: DecodeReason = "round_robin" if config.name == "round_robin" else "least_loaded"
    chosen = _pick(decode, [worker.num_requests for worker in decode], reason, turn)
    able = [worker for worker in prefill if worker.layout_fingerprint == chosen.layout_fingerprint]
    seat = seat_at(request, chosen)
    if able and seat.num_missing_tokens > config.local_prefill_max_tokens:
        helper = _pick(able, [worker.num_waiting_tokens for worker in able], reason, turn)
        prompt = prompt_on(request, helper, [])
        terms = terms_remote(request, prompt, seat)
        option = Option(seat, prompt, terms, terms.total_s)
    else:
        option = _alone(request, seat, [])
    return _decide(request, option, reason, [option], has_prefill=bool(able))


def _pick(workers: Sequence[Candidate], loads: Sequence[int], reason: DecodeReason, turn: int) -> Candidate:
    if reason == "round_robin":
        return workers[turn % len(workers)]
    least = min(loads)
    equal = [worker for worker, load in zip(workers, loads, strict=True) if load == least]
    return equal[turn % len(equal)]


def _decide(
    request: RouteRequest,
    chosen: Option,
    reason: DecodeReason,
    options: Sequence[Option],
    *,
    has_prefill: bool,
) -> Decision:
    prompt = chosen.prompt
    prefill_reason: PrefillReason = "local" if has_prefill else "no_prefill_worker"
    num_hit_tokens = request.num_prompt_tokens - prompt.num_computed_tokens
    if request.max_tokens > 1:
        num_hit_tokens = max(num_hit_tokens, chosen.seat.worker.num_hit_tokens)
    return Decision(
        decode_id=chosen.decode_id,
        prefill_id=chosen.prefill_id,
        peer_id=prompt.peer_id,
        decode_reason=reason,
        prefill_reason="remote" if chosen.prefill_id else prefill_reason,
        num_hit_tokens=num_hit_tokens,
        num_computed_tokens=prompt.num_computed_tokens,
        terms=chosen.terms,
        is_measured=prompt.worker.rates.is_measured,
        options=tuple(options),
    )
