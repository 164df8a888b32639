from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policy import (
    MAX_PAIRED,
    MAX_REQUEST_SPREAD,
    Candidate,
    Chance,
    Decision,
    PolicyConfig,
    PolicyName,
    choose,
)
from router.route_cost import RouteRequest
from router.worker_rates import KvCost, WorkerRates

NO_FETCH = KvCost(100.0, 0.0)
RATES = WorkerRates(token_bytes=1000.0, peer=NO_FETCH)
FETCHING = replace(RATES, peer=KvCost(0.005, 1 / 200e6))


def decode(worker_id: str, **fields: Any) -> Candidate:
    return Candidate(**{"worker_id": worker_id, "layout_fingerprint": "a", "rates": RATES, **fields})


prefill = decode


def decide(
    decode_workers: list[Candidate],
    prefill_workers: list[Candidate] | None = None,
    *,
    policy: PolicyName = "prefix",
    num_prompt_tokens: int = 1000,
    max_tokens: int = 100,
    temperature_s: float = 0.0,
    **chance: Any,
) -> Decision:
    request = RouteRequest(num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens)
    config = PolicyConfig(name=policy, temperature_s=temperature_s)
    return choose(config, request, decode_workers, prefill_workers or [], Chance(**{"turn": 0, **chance}))


# one decode worker or another


def test_a_prefix_hit_attracts() -> None:
    decision = decide([decode("a"), decode("b", num_hit_tokens=512)])
    assert decision.decode_id == "b"
    assert decision.num_hit_tokens == 512
    assert decision.num_computed_tokens == 488


def test_a_long_queue_outweighs_a_hit() -> None:
    assert decide([decode("a"), decode("b", num_hit_tokens=512, num_waiting_tokens=1200)]).decode_id == "a"


def test_a_short_queue_does_not_outweigh_a_hit() -> None:
    assert decide([decode("a"), decode("b", num_hit_tokens=512, num_waiting_tokens=300)]).decode_id == "b"


def test_running_requests_outweigh_a_small_hit() -> None:
    assert decide([decode("a"), decode("b", num_hit_tokens=64, num_requests=2)]).decode_id == "a"


def test_a_longer_answer_makes_a_full_batch_dearer() -> None:
    workers = [decode("a"), decode("b", num_hit_tokens=50, num_requests=1, num_handing_off=1)]
    assert decide(workers, max_tokens=2).decode_id == "b"
    assert decide(workers, max_tokens=1000).decode_id == "a"


def test_a_worker_without_room_is_avoided() -> None:
    full = decode("b", num_hit_tokens=50, num_requests=9, num_free_tokens=100, num_total_tokens=1000)
    decision = decide([decode("a", num_requests=9), full])
    assert decision.decode_id == "a"
    assert decide([full]).terms.wait_s > 0
    assert decide([replace(full, num_free_tokens=1014)]).terms.wait_s == 0


def test_a_hit_does_not_pile_everything_on_one_worker() -> None:
    loaded = decode("b", num_hit_tokens=100_000, num_requests=MAX_REQUEST_SPREAD + 1)
    decision = decide([decode("a"), loaded], num_prompt_tokens=100_001)
    assert (decision.decode_id, decision.decode_reason) == ("a", "imbalance")
    decision = decide([decode("a"), replace(loaded, num_requests=4)], num_prompt_tokens=100_001)
    assert (decision.decode_id, decision.decode_reason) == ("b", "least_cost")


def test_a_hot_worker_does_not_cost_the_others_their_hits() -> None:
    hot = decode("c", num_requests=MAX_REQUEST_SPREAD + 2)
    decision = decide([decode("a"), decode("b", num_hit_tokens=900, num_requests=1), hot])
    assert (decision.decode_id, decision.decode_reason) == ("b", "least_cost")


def test_equal_workers_take_turns() -> None:
    workers = [decode("a"), decode("b"), decode("c")]
    chosen = Counter(decide(workers, turn=turn).decode_id for turn in range(9))
    assert chosen == {"a": 3, "b": 3, "c": 3}


# hand-off or local prefill


def test_a_long_uncached_prompt_goes_to_a_prefill_worker() -> None:
    decision = decide([decode("d", num_requests=4)], [prefill("p")])
    assert (decision.prefill_id, decision.prefill_reason) == ("p", "remote")
    assert decision.terms.handoff_s > 0
    alone = decide([decode("d", num_requests=4)])
    assert alone.terms.disturb_s == pytest.approx(decision.terms.disturb_s + 4 * 1.0)  # 4 wait for a second


def test_requests_that_wait_for_their_own_prompt_are_not_held_up_by_another() -> None:
    """Or a queue at the prefill workers would keep prompts off the decode workers that could help."""
    waiting = decode("d", num_requests=20, num_handing_off=20)
    queued = prefill("p", num_waiting_tokens=2000)
    assert decide([waiting], [queued]).prefill_reason == "local"
    assert decide([replace(waiting, num_handing_off=0)], [queued]).prefill_id == "p"


def test_a_short_suffix_is_prefilled_by_the_decode_worker() -> None:
    decision = decide([decode("d", num_hit_tokens=998)], [prefill("p", num_hit_tokens=998)])
    assert (decision.prefill_id, decision.prefill_reason) == (None, "local")
    assert decision.num_hit_tokens == 998


def test_a_busy_prefill_worker_is_not_waited_for() -> None:
    busy = prefill("p", num_waiting_tokens=5000)
    assert decide([decode("d")], [busy]).prefill_reason == "local"


def test_what_the_decode_worker_holds_is_worth_more_than_a_prefill_worker_that_holds_less() -> None:
    decision = decide([decode("d", num_hit_tokens=900)], [prefill("p", num_hit_tokens=100)])
    assert decision.prefill_reason == "local"


def test_without_prefill_workers_the_decode_worker_prefills() -> None:
    decision = decide([decode("d")])
    assert (decision.prefill_id, decision.prefill_reason) == (None, "no_prefill_worker")


def test_a_prefill_worker_with_another_layout_is_not_asked() -> None:
    other = prefill("p", layout_fingerprint="b")
    assert decide([decode("d")], [other]).prefill_reason == "no_prefill_worker"


def test_a_prefill_worker_that_holds_the_prefix_is_preferred() -> None:
    decision = decide([decode("d")], [prefill("p"), prefill("q", num_hit_tokens=800)])
    assert decision.prefill_id == "q"
    assert decision.num_hit_tokens == 800


def test_a_faster_prefill_worker_takes_the_longer_queue() -> None:
    slow = prefill("s", rates=replace(RATES, prefill_token_s=0.01))
    fast = prefill("f", num_waiting_tokens=2000)
    assert decide([decode("d", num_requests=9)], [slow, fast]).prefill_id == "f"


def test_a_slow_network_keeps_the_prompt_where_it_is_decoded() -> None:
    slow = replace(RATES, stream=KvCost(0.005, 1e-5))  # 10 s for the prompt
    assert decide([decode("d", rates=slow)], [prefill("p")]).prefill_reason == "local"
    busy = decode("d", rates=slow, host_id="h", num_requests=1)
    assert decide([busy], [prefill("p", host_id="h")]).prefill_id == "p"


def test_a_transfer_hides_behind_the_compute() -> None:
    busy = decode("d", num_requests=99, rates=replace(RATES, token_bytes=100_000.0))  # half a second
    hidden = decide([busy], [prefill("p")])
    assert hidden.terms.handoff_s == RATES.stream.latency_s
    cached = decide([busy], [prefill("p", num_hit_tokens=999)])
    assert cached.terms.handoff_s > RATES.stream.latency_s


def test_blocks_that_the_decode_worker_holds_are_not_sent() -> None:
    workers = [decode("d", num_requests=99), decode("e", num_requests=99, num_hit_tokens=900)]
    decision = decide(workers, [prefill("p", num_hit_tokens=999)])
    assert decision.decode_id == "e"


def test_a_single_token_needs_no_transfer_and_no_decode() -> None:
    terms = decide([decode("d", num_requests=9)], [prefill("p", num_hit_tokens=999)], max_tokens=1).terms
    assert (terms.handoff_s, terms.decode_s, terms.disturb_s) == (RATES.stream.latency_s, 0, 0)


def test_prompts_queued_at_the_decode_worker_count_after_a_hand_off_too() -> None:
    workers = [decode("d", num_waiting_tokens=9000), decode("e")]
    assert decide(workers, [prefill("p")]).decode_id == "e"


# slower tiers and peers


def test_a_prefix_on_disk_is_worth_less_than_one_on_the_device() -> None:
    on_disk = decode("a", num_hit_tokens=900, num_disk_tokens=900)
    on_device = decode("b", num_hit_tokens=900)
    assert decide([on_disk, on_device]).decode_id == "b"
    assert decide([on_disk, decode("c")]).decode_id == "a"
    assert decide([on_disk]).terms.load_s > 0


def test_loading_that_takes_longer_than_computing_is_not_expected() -> None:
    rates = replace(RATES, disk=KvCost(5.0, 0.0))
    decision = decide([decode("a", num_hit_tokens=900, num_disk_tokens=900, rates=rates)])
    assert decision.num_computed_tokens == 1000
    assert decision.terms.ttft_s == pytest.approx(decide([decode("a")]).terms.ttft_s)


def test_loading_and_computing_share_the_work() -> None:
    """A token takes as long to load as to compute: together they take half of the time."""
    rates = replace(RATES, host=KvCost(0.0, 1e-6), prefill_token_s=1e-3)
    decision = decide([decode("a", num_hit_tokens=800, num_host_tokens=800, rates=rates)])
    assert decision.terms.load_s == pytest.approx(0.4)
    assert decision.num_computed_tokens == 600
    assert decision.num_hit_tokens == 800  # all of it is there, whoever brings it


def test_a_longer_prefix_of_another_worker_is_fetched() -> None:
    workers = [decode("d", num_hit_tokens=100), decode("e", num_hit_tokens=900, num_requests=12)]
    decision = decide([replace(worker, rates=FETCHING) for worker in workers])
    assert (decision.decode_id, decision.peer_id) == ("d", "e")
    assert decision.num_hit_tokens > 800
    assert decision.terms.load_s > 0


def test_a_prefill_worker_fetches_from_a_decode_worker() -> None:
    busy = decode("d", num_hit_tokens=600, num_requests=12, num_waiting_tokens=5000)
    decision = decide([busy], [prefill("p", rates=FETCHING)])
    assert (decision.decode_id, decision.prefill_id, decision.peer_id) == ("d", "p", "d")


def test_nothing_is_fetched_when_computing_is_faster() -> None:
    workers = [decode("d"), decode("e", num_hit_tokens=900, num_requests=14)]
    decision = decide(workers)
    assert (decision.decode_id, decision.peer_id) == ("d", None)


def test_nothing_is_fetched_from_another_layout_or_from_oneself() -> None:
    other = decode("e", num_hit_tokens=900, num_requests=14, layout_fingerprint="b")
    assert decide([decode("d", rates=FETCHING), other]).peer_id is None
    assert decide([decode("d", num_hit_tokens=900, rates=FETCHING)]).peer_id is None


def test_equal_peers_take_turns() -> None:
    holders = [prefill(f"p{i}", num_hit_tokens=900, num_waiting_tokens=90_000) for i in range(2)]
    peers = {decide([decode("d", rates=FETCHING)], holders, turn=turn).peer_id for turn in range(2)}
    assert peers == {"p0", "p1"}


# edges


def test_rates_of_zero_are_no_division_by_zero() -> None:
    free = KvCost(0.0, 0.0)
    zero = WorkerRates(
        step_s=0,
        prefill_token_s=0,
        decode_seq_s=0,
        stream=free,
        shared_memory=free,
        peer=free,
        host=free,
        disk=free,
    )
    workers = [decode("d", num_hit_tokens=9, num_host_tokens=9, rates=zero), decode("e", rates=zero)]
    decision = decide(workers, [prefill("p", num_hit_tokens=500, rates=zero)])
    assert decision.terms.total_s == 0


def test_a_huge_prompt_and_one_that_is_cached_have_finite_costs() -> None:
    for num_hit_tokens in (0, 999_999):
        worker = decode("d", num_hit_tokens=num_hit_tokens, num_total_tokens=10)
        decision = decide([worker], [prefill("p")], num_prompt_tokens=1_000_000)
        assert math.isfinite(decision.terms.total_s)


def test_draws_follow_the_costs() -> None:
    """Two seconds of difference at a temperature of two: odds of e to one."""
    workers = [decode("a"), decode("b", num_waiting_tokens=1990)]  # and a step
    random = Random(7)
    chosen = Counter(decide(workers, temperature_s=2.0, draw=random.random()).decode_id for _ in range(4000))
    assert chosen["a"] / chosen["b"] == pytest.approx(math.e, rel=0.1)


def test_a_low_temperature_leaves_nothing_to_chance() -> None:
    workers = [decode("a"), decode("b", num_waiting_tokens=1990)]
    for draw in (0.0, 0.5, 1 - 1e-16):
        decision = decide(workers, temperature_s=1e-3, draw=draw)
        assert (decision.decode_id, decision.decode_reason) == ("a", "drawn")


# the policies without costs


def test_round_robin_ignores_hits_and_load() -> None:
    workers = [decode("a", num_hit_tokens=900), decode("b", num_requests=50)]
    chosen = [decide(workers, policy="round_robin", turn=turn).decode_id for turn in range(4)]
    assert chosen == ["a", "b", "a", "b"]


def test_least_loaded_ignores_hits() -> None:
    workers = [decode("a", num_hit_tokens=900, num_requests=1), decode("b")]
    assert decide(workers, policy="least_loaded").decode_id == "b"


def test_policies_without_costs_hand_off_and_fetch_nothing() -> None:
    workers = [decode("a"), decode("b", num_hit_tokens=900)]
    for policy in ("round_robin", "least_loaded"):
        decision = decide(workers, [prefill("p")], policy=policy)
        assert (decision.decode_id, decision.prefill_id, decision.peer_id) == ("a", "p", None)
        assert decide(workers, [prefill("p")], policy=policy, num_prompt_tokens=30).prefill_id is None


# properties

rates = st.builds(
    WorkerRates,
    step_s=st.sampled_from([0.0, 0.01, 0.03]),
    prefill_token_s=st.sampled_from([0.0, 0.001, 0.0002]),
    decode_seq_s=st.sampled_from([0.0, 0.001]),
    token_bytes=st.sampled_from([0.0, 1000.0, 70_000.0]),
    stream=st.sampled_from([KvCost(0.005, 1e-9), KvCost(0.05, 1e-7)]),
    peer=st.sampled_from([KvCost(0.005, 1e-9), KvCost(0.5, 1e-7)]),
)


@st.composite
def candidates(draw: st.DrawFn) -> Candidate:
    num_hit_tokens = draw(st.sampled_from([0, 0, 100, 500, 999]))
    return Candidate(
        worker_id=str(draw(st.uuids())),
        layout_fingerprint=draw(st.sampled_from("ab")),
        host_id=draw(st.sampled_from(["", "h", "i"])),
        num_hit_tokens=num_hit_tokens,
        num_disk_tokens=draw(st.integers(0, num_hit_tokens)),
        num_requests=draw(st.integers(0, 30)),
        num_waiting_tokens=draw(st.sampled_from([0, 1, 300, 10_000])),
        num_free_tokens=draw(st.sampled_from([0, 1000])),
        num_total_tokens=draw(st.sampled_from([0, 2000])),
        rates=draw(rates),
    )


some_decode = st.lists(candidates(), min_size=1, max_size=6, unique_by=lambda worker: worker.worker_id)
some_prefill = st.lists(candidates(), max_size=6, unique_by=lambda worker: worker.worker_id)
POLICIES: list[PolicyName] = ["prefix", "round_robin", "least_loaded"]


@given(st.sampled_from(POLICIES), some_decode, some_prefill, st.integers(0, 10), st.integers(1, 100))
def test_a_decision_names_known_workers_that_can_hand_over(
    policy: PolicyName,
    decode_workers: list[Candidate],
    prefill_workers: list[Candidate],
    turn: int,
    max_tokens: int,
) -> None:
    fields: dict[str, Any] = {"policy": policy, "turn": turn, "max_tokens": max_tokens}
    decision = decide(decode_workers, prefill_workers, **fields)
    known = {worker.worker_id: worker for worker in [*decode_workers, *prefill_workers]}
    chosen = known[decision.decode_id]
    assert chosen in decode_workers
    computing = chosen
    if decision.prefill_id is not None:
        computing = known[decision.prefill_id]
        assert computing in prefill_workers
        assert computing.layout_fingerprint == chosen.layout_fingerprint
    if decision.peer_id is not None:
        peer = known[decision.peer_id]
        assert peer.layout_fingerprint == computing.layout_fingerprint
        assert peer.num_hit_tokens > computing.num_hit_tokens
    assert all(term >= 0 for term in decision.terms)
    assert 0 <= decision.num_hit_tokens < 1000
    assert decision == decide(decode_workers, prefill_workers, **fields)


@given(some_decode, some_prefill, st.integers(0, 10))
def test_the_cheapest_of_all_ways_is_taken(
    decode_workers: list[Candidate], prefill_workers: list[Candidate], turn: int
) -> None:
    """All ways: each decode worker that is not barred, alone or with each prefill worker of its layout."""
    decision = decide(decode_workers, prefill_workers, turn=turn)
    assert decision.terms.total_s == min(option.cost_s for option in decision.options)
    fewest = min(worker.num_requests for worker in decode_workers)
    seated = {option.decode_id for option in decision.options}
    assert seated == {
        worker.worker_id
        for worker in decode_workers
        if worker.num_requests <= max(fewest + MAX_REQUEST_SPREAD, 1.5 * fewest)
    }
    layouts = {worker.worker_id: worker.layout_fingerprint for worker in [*decode_workers, *prefill_workers]}
    ways = {(option.decode_id, option.prefill_id) for option in decision.options}
    assert ways == {
        (decode_id, helper)
        for decode_id in seated
        for helper in [None, *(worker.worker_id for worker in prefill_workers)]
        if helper is None or layouts[helper] == layouts[decode_id]
    }


@given(some_decode, some_prefill, st.integers(0, 10), st.randoms(use_true_random=False))
def test_the_order_of_the_workers_does_not_matter(
    decode_workers: list[Candidate], prefill_workers: list[Candidate], turn: int, random: Random
) -> None:
    decision = decide(decode_workers, prefill_workers, turn=turn)
    shuffled_decode, shuffled_prefill = decode_workers[:], prefill_workers[:]
    random.shuffle(shuffled_decode)
    random.shuffle(shuffled_prefill)
    assert decide(shuffled_decode, shuffled_prefill, turn=turn) == decision


@given(some_decode, some_prefill, st.integers(0, 10), st.integers(0, 20), st.integers(0, 9000), st.data())
def test_more_load_never_attracts(
    decode_workers: list[Candidate],
    prefill_workers: list[Candidate],
    turn: int,
    more_requests: int,
    more_tokens: int,
    data: st.DataObject,
) -> None:
    before = decide(decode_workers, prefill_workers, turn=turn)
    victims = {worker.worker_id for worker in [*decode_workers, *prefill_workers]}
    victim = data.draw(st.sampled_from(sorted(victims - {before.decode_id, before.prefill_id}) or [None]))
    if victim is None:
        return

    def loaded(worker: Candidate) -> Candidate:
        if worker.worker_id != victim:
            return worker
        return replace(
            worker,
            num_requests=worker.num_requests + more_requests,
            num_waiting_tokens=worker.num_waiting_tokens + more_tokens,
        )

    after = decide([*map(loaded, decode_workers)], [*map(loaded, prefill_workers)], turn=turn)
    # Equal costs take turns, and with fewer of them the turn falls elsewhere: never on a dearer one.
    if victim in (after.decode_id, after.prefill_id):
        assert after.terms.total_s == before.terms.total_s


def test_in_a_large_fleet_the_best_pair_is_found_though_not_all_are_looked_at() -> None:
    random = Random(3)

    def worker(role: str, index: int) -> Candidate:
        return decode(
            f"{role}{index:03}",
            num_hit_tokens=random.choice([0, 300, 600]),
            num_requests=random.randrange(10),
            num_waiting_tokens=random.randrange(3000),
        )

    decode_workers = [worker("d", index) for index in range(60)]
    prefill_workers = [worker("p", index) for index in range(60)]
    decision = decide(decode_workers, prefill_workers)
    assert len(decision.options) <= 60 + MAX_PAIRED * (MAX_PAIRED + 1)
    pairs = [decide([d], [p]).terms.total_s for d in decode_workers for p in prefill_workers]
    assert decision.terms.total_s <= min(pairs) * 1.05


def test_in_a_large_idle_fleet_all_get_their_turn() -> None:
    slow = replace(RATES, prefill_token_s=1.0)
    decode_workers = [decode(f"d{index:02}", rates=slow) for index in range(3 * MAX_PAIRED)]
    prefill_workers = [prefill(f"p{index:02}") for index in range(3 * MAX_PAIRED)]
    decisions = [decide(decode_workers, prefill_workers, turn=turn) for turn in range(300)]
    assert len({decision.decode_id for decision in decisions}) == len(decode_workers)
    assert len({decision.prefill_id for decision in decisions}) == len(prefill_workers)
