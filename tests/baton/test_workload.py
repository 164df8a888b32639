import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.workload import (
    Conversations,
    RequestClass,
    Workload,
    mixed_sessions,
    poisson_arrivals,
)


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others():
    first = Workload(num_requests=3, prompt_len=20, output_len=1, seed=7)
    again = Workload(num_requests=3, prompt_len=20, output_len=1, seed=7)
    other = Workload(num_requests=3, prompt_len=20, output_len=1, seed=8)
    assert first.prompts() == again.prompts()
    assert first.prompts() != other.prompts()


def test_prompts_have_the_asked_length_and_ids_of_the_vocabulary():
    prompts = Workload(num_requests=50, prompt_len=33, output_len=1, vocab_size=150).prompts()
    assert {len(prompt) for prompt in prompts} == {33}
    ids = [token_id for prompt in prompts for token_id in prompt]
    assert 100 <= min(ids) and max(ids) < 150


def test_only_the_shared_prefix_is_common():
    first, second = Workload(num_requests=2, prompt_len=64, output_len=1, shared_prefix_len=48).prompts()
    assert first[:48] == second[:48]
    assert first[48:] != second[48:]


def test_poisson_arrivals_keep_the_rate_and_never_go_back():
    times = poisson_arrivals(4000, rate_per_s=20.0, seed=1)
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times[-1] / 3999 == pytest.approx(1 / 20.0, rel=0.05)
    assert times == poisson_arrivals(4000, rate_per_s=20.0, seed=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_requests": 0},
        {"prompt_len": 0},
        {"output_len": 0},
        {"shared_prefix_len": 11},
        {"vocab_size": 100},
        {"num_groups": 0},
    ],
)
def test_a_workload_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError):
        Workload(**{"num_requests": 1, "prompt_len": 10, "output_len": 1, **wrong})


def test_a_rate_of_zero_is_refused():
    with pytest.raises(ValueError, match="rate"):
        poisson_arrivals(3, 0.0, seed=0)


@given(st.integers(1, 6), st.integers(0, 40), st.integers(1, 30), st.integers(0, 5))
def test_every_prompt_begins_with_the_prefix_of_one_group(num_groups, shared, own, seed):
    workload = Workload(
        num_requests=12,
        prompt_len=shared + own,
        output_len=1,
        shared_prefix_len=shared,
        num_groups=num_groups,
        seed=seed,
    )
    prefixes = workload.prefixes()
    assert len(prefixes) == num_groups
    assert all(len(prompt) == shared + own and prompt[:shared] in prefixes for prompt in workload.prompts())


def test_the_share_of_an_endless_cache_is_the_one_asked_for():
    workload = Workload(num_requests=400, prompt_len=50, output_len=1, shared_prefix_len=40, num_groups=4)
    prompts = workload.prompts()
    seen = {tuple(prefix) for prefix in workload.prefixes()}
    num_hit = sum(40 for prompt in prompts if tuple(prompt[:40]) in seen)
    assert num_hit / sum(map(len, prompts)) == pytest.approx(0.8)
    assert len({tuple(prompt[:40]) for prompt in prompts}) == 4
    assert len({tuple(prompt[40:]) for prompt in prompts}) == 400


def test_conversations_are_the_same_by_seed_and_bounded():
    shape = {"num_sessions": 5, "num_turns": 3, "prompt_len": 7, "output_len": 4, "system_len": 11}
    conversations = Conversations(**shape, num_groups=2, mean_think_s=0.5)
    sessions = conversations.sessions()
    assert sessions == Conversations(**shape, num_groups=2, mean_think_s=0.5).sessions()
    assert sessions != Conversations(**shape, num_groups=2, mean_think_s=0.5, seed=1).sessions()
    assert [session.num_requests for session in sessions] == [3] * 5
    assert {len(session.turns[0].new_ids) for session in sessions} == {18}
    assert {len(turn.new_ids) for session in sessions for turn in session.turns[1:]} == {7}
    assert len({session.turns[0].new_ids[:11] for session in sessions}) == 2
    thinks = [turn.think_s for session in sessions for turn in session.turns]
    assert thinks[::3] == [0.0] * 5
    assert all(0 < think_s <= 2.0 for index, think_s in enumerate(thinks) if index % 3)
    held = sum(len(turn.new_ids) + turn.output_len for turn in sessions[0].turns)
    assert held == conversations.max_context_len


def test_conversations_without_turns_are_refused():
    with pytest.raises(ValueError, match="turns"):
        Conversations(num_sessions=1, num_turns=0, prompt_len=1, output_len=1)


def test_a_class_is_read_from_its_text():
    chat = RequestClass.parse("chat=75:512:256")
    assert chat == RequestClass(name="chat", weight=75.0, prompt_len=512, output_len=256)


@pytest.mark.parametrize(
    "text", ["chat", "chat=1:2", "=1:2:3", "chat=0:2:3", "chat=1:0:3", "chat=1:2:x", "a=nan:1:1"]
)
def test_a_class_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="class"):
        RequestClass.parse(text)


def test_classes_are_mixed_by_weight_with_their_own_lengths():
    classes = [RequestClass.parse("chat=3:20:8"), RequestClass.parse("long=1:90:2")]
    sessions = mixed_sessions(classes, 2000, vocab_size=500, seed=4)
    assert sessions == mixed_sessions(classes, 2000, vocab_size=500, seed=4)
    lengths = {(s.class_name, len(s.turns[0].new_ids), s.turns[0].output_len) for s in sessions}
    assert lengths == {("chat", 20, 8), ("long", 90, 2)}
    assert sum(s.class_name == "chat" for s in sessions) / 2000 == pytest.approx(0.75, abs=0.03)


def test_two_classes_of_one_name_are_refused():
    same = RequestClass.parse("chat=3:20:8")
    with pytest.raises(ValueError, match="same name"):
        mixed_sessions([same, same], 3, vocab_size=500, seed=0)
