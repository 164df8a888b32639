"""One router before the workers of two models."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import SMALL
from tests.e2e.stack import Stack, running_stack, wait_until
from tests.fakes.redis_server import redis_server


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "llama"
    command = [sys.executable, "-m", "baton", "make-checkpoint", str(directory), "--arch", "llama"]
    subprocess.run(command, check=True, timeout=120)
    return directory


@pytest.fixture
def both(tiny_model: Path, llama: Path, tmp_path: Path) -> Iterator[Stack]:
    """A stack of "tiny" whose router also serves "llama", and a decode worker of that beside it."""
    with redis_server() as (_, url):
        environment = {"REDIS_URL": url, "BATON_ROUTER_EXTRA_MODELS": f"llama={llama}"}
        options = [*SMALL, "--aggregated", "--decode", "1"]
        worker_settings = {
            "BATON_DECODE_MODEL": str(llama),
            "BATON_DECODE_SERVED_MODEL_NAME": "llama",
            "BATON_DECODE_REDIS_URL": url,
            "BATON_DECODE_NUM_BLOCKS": "600",
            "BATON_DECODE_NUM_THREADS": "1",
        }
        with running_stack(tiny_model, tmp_path / "stack", *options, environment=environment) as stack:
            worker = subprocess.Popen(
                [sys.executable, "-m", "decode_svc"],
                env={k: v for k, v in os.environ.items() if not k.startswith("BATON_")} | worker_settings,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                yield stack
            finally:
                worker.terminate()
                worker.wait(timeout=30)


def test_a_request_goes_to_the_model_that_it_names(both: Stack) -> None:
    with openai.OpenAI(base_url=f"{both.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "llama"]

        def answers(model: str) -> bool:
            body = {"model": model, "prompt": "hi", "max_tokens": 1}
            return both.client.post("/v1/completions", json=body).status_code == 200

        wait_until(lambda: answers("llama"), "the worker of llama serves", timeout_s=60)
        texts = {}
        for model in ("tiny", "llama"):
            completion = client.completions.create(
                model=model, prompt="The way", max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
            )
            assert completion.model == model
            texts[model] = completion.choices[0].text
        assert texts["tiny"] != texts["llama"]
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="third", prompt="hi")
