"""Drafts over real processes: through hand-offs, beside a death, and between workers that disagree."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import HANDS_OFF, SMALL, greedy_oracle, random_prompt
from tests.e2e.stack import Stack, running_stack, wait_until
from tests.fakes.agreeing_checkpoint import make_agreeing_checkpoint

Oracle = Callable[[list[int], int], list[int]]


@pytest.fixture(scope="module")
def mtp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "mtp"
    make_agreeing_checkpoint(directory, 0.2)
    return directory


@pytest.fixture(scope="module")
def mtp_oracle(mtp_model: Path) -> Oracle:
    return greedy_oracle(mtp_model)


@pytest.fixture(scope="module")
def drafting(mtp_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Drafts without being asked, because the model has the layer for them."""
    options = [*SMALL, *HANDS_OFF, "--decode", "2"]
    with running_stack(mtp_model, tmp_path_factory.mktemp("drafting"), *options) as running:
        yield running


def total(stack: Stack, name: str) -> float:
    return sum(stack.metrics(process)[name] for process in stack.processes("decode"))


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 300])
def test_a_handed_off_prompt_is_answered_in_fewer_steps(
    drafting: Stack, mtp_oracle: Oracle, num_tokens: int
) -> None:
    before = total(drafting, "baton_engine_spec_accepted_tokens_total")
    prompt = random_prompt(num_tokens, num_tokens)
    answer = drafting.complete(prompt, max_tokens=64, ignore_eos=True, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == mtp_oracle(prompt, 64)
    assert answer["usage"]["completion_tokens"] == 64
    assert total(drafting, "baton_engine_spec_accepted_tokens_total") - before > 10
    drafting.assert_no_block_is_lost()


def test_logprobs_and_stop_strings_see_every_token(drafting: Stack, mtp_oracle: Oracle) -> None:
    prompt = random_prompt(50, 40)
    options = {"max_tokens": 40, "ignore_eos": True, "return_token_ids": True, "logprobs": 1}
    [choice] = drafting.complete(prompt, **options)["choices"]
    assert choice["token_ids"] == mtp_oracle(prompt, 40)
    assert len(choice["logprobs"]["token_logprobs"]) == 40
    stop = choice["text"][8:12]
    [stopped] = drafting.complete(prompt, **options, stop=[stop])["choices"]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == choice["text"][: choice["text"].index(stop)]


def test_the_same_seed_draws_the_same_answers(drafting: Stack) -> None:
    """Two answers of one request, again and again: on either worker, handed off or from its cache."""
    prompt = random_prompt(51, 60)

    def draw() -> list[list[int]]:
        fields = {"temperature": 0.7, "seed": 5, "n": 2, "max_tokens": 48, "ignore_eos": True}
        answer = drafting.complete(prompt, **fields, return_token_ids=True)
        return [choice["token_ids"] for choice in answer["choices"]]

    first = draw()
    assert first[0] != first[1]
    assert [draw() for _ in range(3)] == [first] * 3


def test_a_stream_goes_on_where_its_killed_worker_was(drafting: Stack, mtp_oracle: Oracle) -> None:
    prompt = random_prompt(52, 200)
    body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 400, "stream": True}
    body |= {"ignore_eos": True, "return_token_ids": True}
    received: list[int] = []
    was_killed = False
    with httpx.stream("POST", drafting.url + "/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                received += choice.get("token_ids") or ()
            if len(received) >= 20 and not was_killed:
                was_killed = True
                [busy] = [
                    process["name"]
                    for process in drafting.processes("decode")
                    if drafting.metrics(process)["baton_engine_used_blocks"] > 0
                ]
                drafting.kill(busy)
    assert was_killed
    assert received == mtp_oracle(prompt, 400)
    wait_until(
        lambda: all(process["state"] == "ready" for process in drafting.state()["processes"]),
        "every process is ready again",
        timeout_s=60,
    )
    drafting.assert_no_block_is_lost()


def test_workers_of_which_only_one_speculates_hand_nothing_over(
    mtp_model: Path, mtp_oracle: Oracle, tmp_path: Path
) -> None:
    environment = {"BATON_PREFILL_NUM_SPECULATIVE_TOKENS": "0", "BATON_DECODE_NUM_SPECULATIVE_TOKENS": "3"}
    with running_stack(mtp_model, tmp_path, *SMALL, *HANDS_OFF, environment=environment) as stack:
        prompt = random_prompt(53, 300)
        assert stack.output_ids(prompt, 48) == mtp_oracle(prompt, 48)
        [decode] = stack.processes("decode")
        metrics = stack.metrics(decode)
        assert metrics["baton_engine_prefill_tokens_total"] == 300
        assert metrics.get("baton_handoff_bytes_total", 0) == 0
        assert metrics["baton_engine_spec_draft_tokens_total"] > 30
        stack.assert_no_block_is_lost()
