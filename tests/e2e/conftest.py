from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.stack import Stack, running_stack

VOCAB_SIZE = 4096


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/e2e/" in str(item.path.as_posix()):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DeepSeek-V3 with experts, made by the documented command."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    command = [sys.executable, "-m", "baton", "make-checkpoint", str(directory), "--arch", "deepseek_v3"]
    subprocess.run(command, check=True, timeout=120)
    return directory


@pytest.fixture(scope="session")
def oracle(tiny_model: Path) -> Callable[[list[int], int], list[int]]:
    return greedy_oracle(tiny_model)


def greedy_oracle(model_dir: Path) -> Callable[[list[int], int], list[int]]:
    """Greedy tokens by transformers, in float32, never stopping at an end-of-sequence token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def generate(prompt: list[int], num_tokens: int) -> list[int]:
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return output[0, len(prompt) :].tolist()

    return generate


@pytest.fixture(scope="session")
def stack(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Router, one prefill worker, one decode worker; for tests that kill nothing."""
    with running_stack(tiny_model, tmp_path_factory.mktemp("stack"), *SMALL, *HANDS_OFF) as running:
        yield running


# By length alone: costs would let the decode worker compute some prompts, as the model is so small.
HANDS_OFF = ("--policy", "least_loaded")
SMALL = ("--dtype", "float32", "--num-blocks", "600", "--threads", "1", "--token-budget", "256")


def random_prompt(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(num_tokens)]
