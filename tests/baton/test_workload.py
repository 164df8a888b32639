import pytest

from baton.bench.workload import Workload, poisson_arrivals


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
    ],
)
def test_a_workload_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError):
        Workload(**{"num_requests": 1, "prompt_len": 10, "output_len": 1, **wrong})


def test_a_rate_of_zero_is_refused():
    with pytest.raises(ValueError, match="rate"):
        poisson_arrivals(3, 0.0, seed=0)
