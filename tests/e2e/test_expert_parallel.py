from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, random_prompt
from tests.e2e.stack import running_stack, wait_until

Oracle = Callable[[list[int], int], list[int]]


@pytest.mark.parametrize("ep_size", [2, 3])
def test_a_group_of_ranks_gives_the_tokens_of_transformers(
    tiny_model: Path, oracle: Oracle, tmp_path: Path, ep_size: int
) -> None:
    prompts = [random_prompt(seed, 20 + 37 * seed) for seed in range(6)]
    with running_stack(tiny_model, tmp_path, *SMALL, "--ep-size", str(ep_size)) as stack:
        assert len(stack.processes("decode")) == ep_size
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: stack.output_ids(prompt, 32), prompts))
        assert answers == [oracle(prompt, 32) for prompt in prompts]
        stack.assert_no_block_is_lost()


def test_a_killed_rank_takes_its_group_with_it_and_the_group_comes_back(
    tiny_model: Path, oracle: Oracle, tmp_path: Path
) -> None:
    prompt = random_prompt(50, 60)
    with running_stack(tiny_model, tmp_path, *SMALL, "--ep-size", "2") as stack:
        before = {p["name"]: p["pid"] for p in stack.processes("decode")}
        stack.kill(stack.processes("decode")[1]["name"])

        def is_back() -> bool:
            ranks = stack.processes("decode")
            return all(p["state"] == "ready" and p["pid"] != before[p["name"]] for p in ranks)

        wait_until(is_back, "both ranks have new processes", timeout_s=90)
        assert stack.output_ids(prompt, 24) == oracle(prompt, 24)
