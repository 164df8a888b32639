"""Workers are killed and clients go away; requests finish or end with a clear error, and no block is lost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import HANDS_OFF, SMALL, random_prompt
from tests.e2e.stack import Stack, running_stack, wait_until

Oracle = Callable[[list[int], int], list[int]]


@pytest.fixture(scope="module")
def fragile(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two decode workers, one prefill worker; small steps so that prompts take a while."""
    options = [*SMALL, *HANDS_OFF, "--decode", "2", "--token-budget", "64", "--max-running", "32"]
    with running_stack(tiny_model, tmp_path_factory.mktemp("fragile"), *options) as running:
        yield running


def _name_of_busy(stack: Stack, role: str) -> str | None:
    for process in stack.processes(role):
        if process["state"] == "ready" and stack.metrics(process).get("baton_engine_used_blocks", 0) > 0:
            return process["name"]
    return None


def _stream(stack: Stack, prompt: list[int], max_tokens: int) -> Iterator[int]:
    """Token ids as they arrive."""
    for choice in _choices(stack, prompt, temperature=0, max_tokens=max_tokens, ignore_eos=True):
        yield from choice["token_ids"]


def _choices(stack: Stack, prompt: list[int], **fields: Any) -> Iterator[dict[str, Any]]:
    """The parts of all choices as they arrive."""
    body = {"model": "tiny", "prompt": prompt, "stream": True, "return_token_ids": True, **fields}
    with httpx.stream("POST", stack.url + "/v1/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                yield from event["choices"]


def _all_ready(stack: Stack) -> None:
    def ready() -> bool:
        return all(p["state"] == "ready" for p in stack.state()["processes"])

    wait_until(ready, "every process is ready again", timeout_s=60)


def test_killing_the_prefill_worker_in_the_middle_of_a_prompt_costs_only_time(
    fragile: Stack, oracle: Oracle
) -> None:
    prompt = random_prompt(1, 3000)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(fragile.output_ids, prompt, 16)
        wait_until(lambda: _name_of_busy(fragile, "prefill") is not None, "prefill works", timeout_s=20)
        fragile.kill("prefill-0")
        assert answer.result() == oracle(prompt, 16)
    _all_ready(fragile)
    fragile.assert_no_block_is_lost()


def test_without_a_prefill_worker_the_decode_worker_computes_the_prompt(
    fragile: Stack, oracle: Oracle
) -> None:
    _all_ready(fragile)
    fragile.kill("prefill-0")
    prompt = random_prompt(2, 300)
    assert fragile.output_ids(prompt, 16) == oracle(prompt, 16)
    _all_ready(fragile)
    fragile.assert_no_block_is_lost()


def test_a_stream_whose_decode_worker_is_killed_goes_on_with_no_token_lost_or_doubled(
    fragile: Stack, oracle: Oracle
) -> None:
    _all_ready(fragile)
    prompt = random_prompt(3, 200)
    received = []
    for token_id in _stream(fragile, prompt, 400):
        received.append(token_id)
        if len(received) == 20:
            name = _name_of_busy(fragile, "decode")
            assert name is not None
            fragile.kill(name)
    assert received == oracle(prompt, 400)
    _all_ready(fragile)
    fragile.assert_no_block_is_lost()


def _whole_answer(stack: Stack, prompt: list[int], *, kill_after: int | None, **fields: Any) -> list[str]:
    """The texts of all choices, by index; the decode worker is killed after so many parts of them."""
    texts = [""] * fields.get("n", 1)
    for num_parts, choice in enumerate(_choices(stack, prompt, **fields), 1):
        texts[choice["index"]] += choice["text"]
        if num_parts == kill_after:
            name = _name_of_busy(stack, "decode")
            assert name is not None
            stack.kill(name)
    assert kill_after is None or num_parts > kill_after, "it ended before the kill"
    return texts


def _handoff_bytes(stack: Stack) -> dict[int, float]:
    """Of each decode worker, by process id."""
    workers = stack.processes("decode")
    return {each["pid"]: stack.metrics(each).get("baton_handoff_bytes_total", 0.0) for each in workers}


def test_the_branches_of_a_killed_decode_worker_go_on_elsewhere_and_move_their_prompt_once(
    fragile: Stack,
) -> None:
    _all_ready(fragile)
    prompt = random_prompt(5, 800)
    fields = {"n": 4, "seed": 11, "temperature": 1.0, "max_tokens": 150, "ignore_eos": True}
    before = _handoff_bytes(fragile)
    undisturbed = _whole_answer(fragile, prompt, kill_after=None, **fields)
    between = _handoff_bytes(fragile)
    assert len(set(undisturbed)) == 4
    salted = {**fields, "cache_salt": "again"}  # so that the survivor has nothing of it
    assert _whole_answer(fragile, prompt, kill_after=40, **salted) == undisturbed
    _all_ready(fragile)
    after = _handoff_bytes(fragile)
    [survivor] = before.keys() & after.keys()
    moved, bytes_of_prompt = after[survivor] - between[survivor], sum(between.values()) - sum(before.values())
    assert bytes_of_prompt <= moved < 2 * bytes_of_prompt
    fragile.assert_no_block_is_lost()


_ROUTE = {
    "type": "array",
    "minItems": 24,
    "maxItems": 24,
    "items": {
        "type": "object",
        "properties": {"leg": {"type": "integer", "minimum": 0, "maximum": 99}, "hand": {"enum": ["l", "r"]}},
        "required": ["leg", "hand"],
        "additionalProperties": False,
    },
}


def test_an_answer_by_schema_whose_decode_worker_is_killed_goes_on_valid_and_the_same(fragile: Stack) -> None:
    _all_ready(fragile)
    structure = {"json": _ROUTE, "disable_any_whitespace": True}
    fields = {"seed": 3, "temperature": 1.0, "max_tokens": 2000, "structured_outputs": structure}
    prompt = random_prompt(6, 100)
    undisturbed = _whole_answer(fragile, prompt, kill_after=None, **fields)
    legs = json.loads(undisturbed[0])
    assert len(legs) == 24 and all(leg["hand"] in "lr" and 0 <= leg["leg"] <= 99 for leg in legs)
    assert _whole_answer(fragile, prompt, kill_after=60, **fields) == undisturbed
    _all_ready(fragile)
    fragile.assert_no_block_is_lost()


@pytest.mark.parametrize("state", ["queued", "prefilling", "decoding"])
def test_a_client_that_goes_away_frees_everything(fragile: Stack, state: str) -> None:
    _all_ready(fragile)
    prompt = random_prompt(10, 3500 if state != "decoding" else 40)
    gone = threading.Event()

    def talk() -> None:
        for _ in _stream(fragile, prompt, 2000 if state == "decoding" else 8):
            if gone.is_set():
                return

    body = {"model": "tiny", "prompt": prompt, "max_tokens": 500, "ignore_eos": True, "stream": True}
    if state == "queued":
        with pytest.raises(httpx.TimeoutException):
            httpx.post(fragile.url + "/v1/completions", json=body | {"stream": False}, timeout=0.05)
    elif state == "prefilling":
        with pytest.raises(httpx.TimeoutException):
            httpx.post(fragile.url + "/v1/completions", json=body | {"stream": False}, timeout=0.7)
    else:
        with httpx.stream("POST", fragile.url + "/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            for _ in range(6):
                next(lines)
    fragile.assert_no_block_is_lost()


def test_many_clients_that_leave_at_random_moments_leave_nothing_behind(fragile: Stack) -> None:
    _all_ready(fragile)

    def visit(index: int) -> None:
        body = {"model": "tiny", "prompt": random_prompt(100 + index, 20 + 45 * index), "max_tokens": 60}
        body |= {"ignore_eos": True}
        try:
            httpx.post(fragile.url + "/v1/completions", json=body, timeout=0.02 + 0.06 * index)
        except httpx.TimeoutException:
            return

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(32)))
    fragile.assert_no_block_is_lost()


def test_killing_redis_interrupts_nobody(fragile: Stack, oracle: Oracle) -> None:
    _all_ready(fragile)
    redis_pids = [p["pid"] for p in fragile.state()["processes"] if p["role"] == "redis"]
    prompt = random_prompt(4, 100)
    if redis_pids:
        fragile.kill("redis")
    else:
        _kill_child(fragile.process.pid, "valkey")
    time.sleep(0.2)
    assert fragile.output_ids(prompt, 32) == oracle(prompt, 32)


def _kill_child(parent: int, name: str) -> None:
    import psutil

    [server] = [c for c in psutil.Process(parent).children(recursive=True) if name in " ".join(c.cmdline())]
    server.kill()
