"""Blocks that some worker has are not computed again: from a peer, from host memory, from disk."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from proto.common_pb2 import KvPeer
from tests.e2e.conftest import SMALL, random_prompt
from tests.e2e.stack import Stack, running_stack, wait_until
from tests.fakes.fake_workers import Reply, greedy_spec, router_link

Oracle = Callable[[list[int], int], list[int]]
BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two decode workers that compute their prompts themselves; small steps, so that a fetch has time."""
    options = [*SMALL, "--aggregated", "--decode", "2", "--token-budget", "64", "--max-running", "32"]
    with running_stack(tiny_model, tmp_path_factory.mktemp("pair"), *options) as running:
        yield running


def _worker(stack: Stack, name: str) -> dict[str, Any]:
    return next(process for process in stack.processes("decode") if process["name"] == name)


def _ask(stack: Stack, name: str, prompt: list[int], max_tokens: int, peer: str | None = None) -> Reply:
    """Straight to one worker, past the router; `peer` is offered for all full blocks of the prompt."""
    address = _worker(stack, name)["address"]
    peer_pb = None
    if peer is not None:
        num_blocks = len(prompt) // BLOCK_SIZE
        peer_pb = KvPeer(worker_id=peer, address=_worker(stack, peer)["address"], num_blocks=num_blocks)

    async def ask() -> Reply:
        worker: Any = SimpleNamespace(address=address)
        async with router_link(worker) as router:
            return await router.finish(greedy_spec(prompt, max_tokens), peer=peer_pb)

    return asyncio.run(ask())


def _metric(stack: Stack, worker: str, name: str) -> float:
    return stack.metrics(_worker(stack, worker)).get(name, 0.0)


def _all_ready(stack: Stack) -> None:
    wait_until(
        lambda: all(p["state"] == "ready" for p in stack.state()["processes"]), "all are ready", timeout_s=60
    )


def test_next_turn_finds_prompt_and_answer_where_they_were_decoded(pair: Stack, oracle: Oracle) -> None:
    prompt = random_prompt(30, 200)
    answer = _ask(pair, "decode-0", prompt, 60).token_ids
    second = [*prompt, *answer, *random_prompt(31, 40)]
    reply = _ask(pair, "decode-0", second, 16)

    # The KV of the answer's last token is never computed.
    num_known = (len(prompt) + len(answer) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert reply.timings.num_hit_tokens == num_known
    assert reply.token_ids == oracle(second, 16)
    pair.assert_no_block_is_lost()


def test_next_turn_at_another_worker_fetches_prompt_and_answer(pair: Stack, oracle: Oracle) -> None:
    prompt = random_prompt(32, 1500)
    answer = _ask(pair, "decode-0", prompt, 60).token_ids
    second = [*prompt, *answer, *random_prompt(33, 40)]
    reply = _ask(pair, "decode-1", second, 16, peer="decode-0")

    assert reply.token_ids == oracle(second, 16)
    assert reply.timings.num_fetched_tokens > 0
    assert reply.timings.num_hit_tokens >= reply.timings.num_fetched_tokens
    assert _metric(pair, "decode-1", "baton_fetch_blocks_total") > 0
    assert _metric(pair, "decode-0", "baton_fetch_sent_bytes_total") > 0
    pair.assert_no_block_is_lost()


def test_peer_killed_in_the_middle_of_a_fetch_costs_only_time(pair: Stack, oracle: Oracle) -> None:
    prompt = random_prompt(34, 3000)
    _ask(pair, "decode-0", prompt, 1)
    with ThreadPoolExecutor(1) as pool:
        # Stopped, not dead: the fetch begins and cannot end.
        pid = _worker(pair, "decode-0")["pid"]
        os.kill(pid, signal.SIGSTOP)
        reply = pool.submit(_ask, pair, "decode-1", prompt, 16, "decode-0")
        wait_until(
            lambda: _metric(pair, "decode-1", "baton_engine_used_blocks") > 0, "it computes", timeout_s=20
        )
        os.kill(pid, signal.SIGKILL)
        assert reply.result().token_ids == oracle(prompt, 16)
    _all_ready(pair)
    pair.assert_no_block_is_lost()


def test_prompts_that_evict_each_other_come_back_from_host_memory(
    tiny_model: Path, tmp_path: Path, oracle: Oracle
) -> None:
    options = ["--dtype", "float32", "--threads", "1", "--token-budget", "64", "--max-running", "32"]
    options += ["--num-blocks", "130", "--max-model-len", "2048", "--aggregated"]
    prompts = [random_prompt(40 + i, 1500) for i in range(3)]
    with running_stack(tiny_model, tmp_path, *options, "--host-kv-bytes", str(1 << 30)) as stack:
        first = [_ask(stack, "decode-0", prompt, 8).token_ids for prompt in prompts]
        replies = [_ask(stack, "decode-0", prompt, 8) for prompt in prompts]

        assert first == [reply.token_ids for reply in replies] == [oracle(prompt, 8) for prompt in prompts]
        assert all(reply.timings.num_loaded_tokens > 0 for reply in replies)
        stack.assert_no_block_is_lost()


def test_worker_that_was_killed_finds_its_blocks_on_disk(
    tiny_model: Path, tmp_path: Path, oracle: Oracle
) -> None:
    options = ["--dtype", "float32", "--threads", "1", "--token-budget", "64", "--max-running", "32"]
    options += ["--num-blocks", "130", "--max-model-len", "2048", "--aggregated"]
    options += ["--disk-kv-dir", str(tmp_path / "kv"), "--disk-kv-bytes", str(1 << 30)]
    prompts = [random_prompt(50 + i, 1500) for i in range(3)]
    with running_stack(tiny_model, tmp_path / "work", *options) as stack:
        for prompt in prompts:
            _ask(stack, "decode-0", prompt, 8)
        old_pid = _worker(stack, "decode-0")["pid"]
        stack.kill("decode-0")
        wait_until(
            lambda: _worker(stack, "decode-0")["pid"] not in (None, old_pid), "a new one", timeout_s=60
        )
        _all_ready(stack)
        reply = _ask(stack, "decode-0", prompts[0], 8)

        assert reply.token_ids == oracle(prompts[0], 8)
        assert reply.timings.num_loaded_tokens > 0
        stack.assert_no_block_is_lost()


def test_workers_of_one_machine_share_their_host_memory(
    tiny_model: Path, tmp_path: Path, oracle: Oracle
) -> None:
    options = ["--dtype", "float32", "--threads", "1", "--token-budget", "64", "--max-running", "32"]
    options += ["--num-blocks", "130", "--max-model-len", "2048", "--aggregated", "--decode", "2"]
    prompts = [random_prompt(60 + i, 1500) for i in range(3)]
    with running_stack(tiny_model, tmp_path, *options, "--host-kv-bytes", str(1 << 30)) as stack:
        for prompt in prompts:  # each evicts the one before
            _ask(stack, "decode-0", prompt, 8)
        reply = _ask(stack, "decode-1", prompts[0], 8, peer="decode-0")
        pids = [_worker(stack, name)["pid"] for name in ("decode-0", "decode-1")]
        in_common = set.intersection(*map(_memory_files, pids))  # soon: what is not used is unmapped

        assert reply.token_ids == oracle(prompts[0], 8)
        assert reply.timings.num_fetched_tokens > 0
        assert len(in_common) == 2  # the other one's device cache and host memory
        stack.assert_no_block_is_lost()


def _memory_files(pid: int) -> set[str]:
    """Inodes of the memory files of KV caches that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/memfd:baton-kv" in line}
