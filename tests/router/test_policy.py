from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from router.policy import MAX_REQUEST_SPREAD, Candidate, Decision, PolicyName, choose


def decode(worker_id: str, **fields: int) -> Candidate:
    return Candidate(worker_id=worker_id, layout_fingerprint="a", **fields)


prefill = decode


def decide(
    decode_workers: list[Candidate],
    prefill_workers: list[Candidate] | None = None,
    *,
    policy: PolicyName = "prefix",
    num_prompt_tokens: int = 1000,
    turn: int = 0,
) -> Decision:
    return choose(
        policy,
        num_prompt_tokens,
        decode_workers,
        prefill_workers or [],
        local_prefill_max_tokens=128,
        turn=turn,
    )


def test_a_prefix_hit_attracts() -> None:
    decision = decide([decode("a"), decode("b", num_hit_tokens=512)])
    assert decision.decode_id == "b"
    assert decision.num_hit_tokens == 512


def test_a_long_queue_outweighs_a_hit() -> None:
    assert decide([decode("a"), decode("b", num_hit_tokens=512, num_waiting_tokens=600)]).decode_id == "a"


def test_running_requests_outweigh_a_small_hit() -> None:
    assert decide([decode("a"), decode("b", num_hit_tokens=64, num_requests=2)]).decode_id == "a"


def test_a_hit_does_not_pile_everything_on_one_worker() -> None:
    loaded = decode("b", num_hit_tokens=100_000, num_requests=MAX_REQUEST_SPREAD + 1)
    decision = decide([decode("a"), loaded], num_prompt_tokens=100_001)
    assert (decision.decode_id, decision.decode_reason) == ("a", "imbalance")


def test_equal_workers_take_turns() -> None:
    workers = [decode("a"), decode("b"), decode("c")]
    chosen = Counter(decide(workers, turn=turn).decode_id for turn in range(9))
    assert chosen == {"a": 3, "b": 3, "c": 3}


def test_a_long_uncached_prompt_goes_to_a_prefill_worker() -> None:
    decision = decide([decode("d")], [prefill("p")])
    assert (decision.prefill_id, decision.prefill_reason) == ("p", "remote")


def test_a_short_suffix_is_prefilled_by_the_decode_worker() -> None:
    decision = decide([decode("d", num_hit_tokens=900)], [prefill("p", num_hit_tokens=960)])
    assert (decision.prefill_id, decision.prefill_reason) == (None, "short_suffix")
    assert decision.num_hit_tokens == 900


def test_without_prefill_workers_the_decode_worker_prefills() -> None:
    assert decide([decode("d")]).prefill_reason == "no_prefill_worker"


def test_a_prefill_worker_with_another_layout_is_not_asked() -> None:
    other = Candidate(worker_id="p", layout_fingerprint="b")
    assert decide([decode("d")], [other]).prefill_reason == "no_prefill_worker"


def test_a_prefill_worker_that_holds_the_prefix_is_preferred() -> None:
    decision = decide([decode("d")], [prefill("p"), prefill("q", num_hit_tokens=800)])
    assert decision.prefill_id == "q"
    assert decision.num_hit_tokens == 800


def test_a_faster_prefill_worker_takes_the_longer_queue() -> None:
    slow = Candidate(worker_id="s", layout_fingerprint="a", prefill_tokens_per_s=100)
    fast = Candidate(
        worker_id="f", layout_fingerprint="a", prefill_tokens_per_s=1000, num_waiting_tokens=2000
    )
    assert decide([decode("d")], [slow, fast]).prefill_id == "f"


def test_round_robin_ignores_hits_and_load() -> None:
    workers = [decode("a", num_hit_tokens=900), decode("b", num_requests=50)]
    chosen = [decide(workers, policy="round_robin", turn=turn).decode_id for turn in range(4)]
    assert chosen == ["a", "b", "a", "b"]


def test_least_loaded_ignores_hits() -> None:
    workers = [decode("a", num_hit_tokens=900, num_requests=1), decode("b")]
    assert decide(workers, policy="least_loaded").decode_id == "b"


candidates = st.builds(
    Candidate,
    worker_id=st.uuids().map(str),
    layout_fingerprint=st.sampled_from("ab"),
    num_hit_tokens=st.integers(0, 999),
    num_requests=st.integers(0, 100),
    num_waiting_tokens=st.integers(0, 10_000),
    prefill_tokens_per_s=st.sampled_from([0.0, 10.0, 5000.0]),
)


@given(
    policy=st.sampled_from(["prefix", "round_robin", "least_loaded"]),
    decode_workers=st.lists(candidates, min_size=1, max_size=5),
    prefill_workers=st.lists(candidates, max_size=5),
    turn=st.integers(0, 10),
)
def test_a_decision_names_known_workers_that_can_hand_over(
    policy: PolicyName, decode_workers: list[Candidate], prefill_workers: list[Candidate], turn: int
) -> None:
    decision = decide(decode_workers, prefill_workers, policy=policy, turn=turn)
    [chosen] = [worker for worker in decode_workers if worker.worker_id == decision.decode_id]
    if decision.prefill_id is not None:
        [helper] = [worker for worker in prefill_workers if worker.worker_id == decision.prefill_id]
        assert helper.layout_fingerprint == chosen.layout_fingerprint
        assert 1000 - chosen.num_hit_tokens > 128
    assert decision == decide(decode_workers, prefill_workers, policy=policy, turn=turn)
