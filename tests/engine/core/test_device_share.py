from __future__ import annotations

import pytest

from engine.device_share import DeviceShare
from engine.sequence import Sequence
from tests.engine.core.engine_driver import greedy
from tests.fakes.fake_model import build_fake_engine, expected_tokens


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_after_a_step_it_rests_for_the_rest_of_the_time() -> None:
    clock = Clock()
    share = DeviceShare(0.25, clock)
    assert share.rest_s == 0.0
    share.spent(0.02)
    assert share.rest_s == pytest.approx(0.06)
    clock.now += 0.05
    assert share.rest_s == pytest.approx(0.01)
    clock.now += 0.05
    assert share.rest_s == 0.0


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_is_a_part(share: float) -> None:
    with pytest.raises(ValueError, match="device_share"):
        DeviceShare(share)


def test_an_engine_rests_after_prompt_tokens_and_not_after_decodes() -> None:
    clock = Clock()
    engine = build_fake_engine(token_budget=20)
    engine.device_share = DeviceShare(1e-9, clock)  # the smallest step is followed by a long rest
    prompt = list(range(1, 31))
    engine.add(Sequence(1, prompt, greedy(3)))
    tokens: list[int] = []
    for num_rests in (1, 1, 0, 0):  # two chunks of the prompt, of which the second gives a token
        assert engine.has_work
        tokens += [token_id for output in engine.step().outputs for token_id in output.token_ids]
        assert engine.has_work is (num_rests == 0 and len(tokens) < 3)
        assert (engine.next_work_s is not None) is bool(num_rests)
        clock.now += 1e12
    assert tokens == expected_tokens(prompt, 3)
