"""Hand-offs as on a GPU between processes of one machine: through the outbox, or copied from the prefill
worker's own cache, for whose device memory a shared file stands in. And what killed processes leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import HANDS_OFF, SMALL, random_prompt
from tests.e2e.stack import Stack, running_stack, wait_until

Oracle = Callable[[list[int], int], list[int]]
SHARED_FILE = "memfd:baton-kv"


@pytest.fixture(scope="module", params=["shared_memory", "device_memory"])
def carrier(request: pytest.FixtureRequest) -> str:
    """Once the decode worker knows the prefill worker."""
    return str(request.param)


@pytest.fixture(scope="module")
def stack(carrier: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    options = [*SMALL, *HANDS_OFF, "--token-budget", "64", "--max-running", "32"]
    environment = {
        "BATON_PREFILL_OUTBOX_BYTES": str(8 << 20),
        "BATON_DECODE_DEVICE_MEMORY": str(carrier == "device_memory"),
        "BATON_ROUTER_WORKER_TIMEOUT_S": "60",  # a busy machine takes long to start a worker
    }
    work_dir = tmp_path_factory.mktemp("outbox")
    with running_stack(tiny_model, work_dir, *options, environment=environment) as running:
        yield running


def shared_files(stack: Stack, role: str) -> set[str]:
    """Of other processes or its own, that the worker has mapped."""
    [process] = stack.processes(role)
    lines = Path(f"/proc/{process['pid']}/maps").read_text().splitlines()
    return {line[line.index("/") :] for line in lines if SHARED_FILE in line}


def in_common(stack: Stack) -> int:
    return len(shared_files(stack, "prefill") & shared_files(stack, "decode"))


def num_committed(stack: Stack, carrier: str) -> int:
    log = (stack.log_dir / "decode-0.log").read_text()
    return sum(carrier in line for line in log.splitlines() if "handoff_committed" in line)


def handed_off(stack: Stack) -> float:
    [process] = stack.processes("prefill")
    return stack.metrics(process).get("baton_prefill_sent_bytes_total", 0.0)


def busy(stack: Stack, role: str) -> bool:
    [process] = stack.processes(role)
    is_ready = process["state"] == "ready"
    return is_ready and stack.metrics(process).get("baton_engine_used_blocks", 0) > 0


def all_ready(stack: Stack) -> bool:
    return all(p["state"] == "ready" for p in stack.state()["processes"])


def test_the_tokens_are_those_of_the_model_and_the_bytes_stay_in_shared_memory(
    stack: Stack, oracle: Oracle, carrier: str
) -> None:
    first = random_prompt(7, 40)
    assert stack.output_ids(first, 12) == oracle(first, 12)
    assert num_committed(stack, "shared_memory") == 1
    before = num_committed(stack, carrier)
    prompts = [random_prompt(seed, length) for seed, length in ((1, 40), (2, 300), (3, 1000), (2, 300))]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: stack.output_ids(prompt, 12), prompts))
    # The prefill worker has its cache and its outbox; of these the decode worker has what it copies from, and
    # what it did a moment ago.
    assert len(shared_files(stack, "prefill")) == 2
    assert in_common(stack) == 1 or carrier == "device_memory"
    assert in_common(stack) >= 1
    assert answers == [oracle(prompt, 12) for prompt in prompts]
    assert num_committed(stack, carrier) == before + len(prompts)
    assert handed_off(stack) > 0
    stack.assert_no_block_is_lost()


def test_a_killed_prefill_worker_leaves_no_memory_behind(stack: Stack, oracle: Oracle) -> None:
    prompt = random_prompt(4, 3000)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stack.output_ids, prompt, 8)
        wait_until(lambda: busy(stack, "prefill"), "prefill works", timeout_s=20)
        before = shared_files(stack, "prefill")
        stack.kill("prefill-0")
        assert answer.result() == oracle(prompt, 8)
    # Its memory lives as long as somebody maps it: the decode worker lets go of it by itself.
    wait_until(lambda: not before & shared_files(stack, "decode"), "the outbox is unmapped", timeout_s=30)
    wait_until(lambda: all_ready(stack), "prefill is back", timeout_s=60)
    stack.assert_no_block_is_lost()


def test_a_killed_decode_worker_gives_the_slots_back(stack: Stack, oracle: Oracle) -> None:
    prompt = random_prompt(5, 3000)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stack.output_ids, prompt, 8)
        wait_until(lambda: busy(stack, "prefill"), "prefill works", timeout_s=20)
        stack.kill("decode-0")
        assert answer.result() == oracle(prompt, 8)
    wait_until(lambda: all_ready(stack), "decode is back", timeout_s=60)
    before = handed_off(stack)
    long = random_prompt(6, 3000)
    tokens = stack.output_ids(long, 4)
    assert in_common(stack) >= 1
    assert tokens == oracle(long, 4)
    assert handed_off(stack) > before
    stack.assert_no_block_is_lost()
