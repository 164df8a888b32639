"""One router before the workers of two models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.conftest import SMALL
from tests.e2e.stack import Stack, running_stack, wait_until
from tests.fakes.redis_server import redis_server


@contextmanager
def two_models(tiny_model: Path, work_dir: Path, environment: Mapping[str, str] = {}) -> Iterator[Stack]:
    """A stack of "tiny" whose router also serves "llama", and a decode worker of that beside it."""
    llama = work_dir / "llama"
    command = [sys.executable, "-m", "baton", "make-checkpoint", str(llama), "--arch", "llama"]
    subprocess.run(command, check=True, timeout=120)
    with redis_server() as (_, url):
        environment = {**environment, "REDIS_URL": url, "BATON_ROUTER_EXTRA_MODELS": f"llama={llama}"}
        options = [*SMALL, "--aggregated", "--decode", "1"]
        worker_settings = {
            "BATON_DECODE_MODEL": str(llama),
            "BATON_DECODE_SERVED_MODEL_NAME": "llama",
            "BATON_DECODE_REDIS_URL": url,
            "BATON_DECODE_NUM_BLOCKS": "600",
            "BATON_DECODE_NUM_THREADS": "1",
        }
        with running_stack(tiny_model, work_dir / "stack", *options, environment=environment) as stack:
            worker = subprocess.Popen(
                [sys.executable, "-m", "decode_svc"],
                env={k: v for k, v in os.environ.items() if not k.startswith("BATON_")} | worker_settings,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                wait_until(lambda: _answers(stack, "llama"), "the worker of llama serves", timeout_s=60)
                yield stack
            finally:
                worker.terminate()
                worker.wait(timeout=30)


def _answers(stack: Stack, model: str) -> bool:
    body = {"model": model, "prompt": "hi", "max_tokens": 1}
    return stack.client.post("/v1/completions", json=body).status_code == 200


@pytest.fixture(scope="module")
def both(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with two_models(tiny_model, tmp_path_factory.mktemp("both")) as stack:
        yield stack


def test_a_request_goes_to_the_model_that_it_names(both: Stack) -> None:
    with openai.OpenAI(base_url=f"{both.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "llama"]
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


def _samples(stack: Stack, name: str) -> dict[str, float]:
    """By model; of several others summed."""
    samples: dict[str, float] = {}
    for line in stack.client.get("/metrics").text.splitlines():
        if line.startswith(f"{name}{{"):
            model = line.partition('model_name="')[2].partition('"')[0]
            samples[model] = samples.get(model, 0.0) + float(line.split()[-1])
    return samples


@pytest.mark.parametrize(
    "name",
    [
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_count",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "baton_router_ttft_seconds_count",
        "baton_router_decisions_total",
    ],
)
def test_metrics_tell_the_models_apart(both: Stack, name: str) -> None:
    before = _samples(both, name)
    assert before.keys() == {"tiny", "llama"}
    for _ in range(2):
        body = {"model": "llama", "prompt": "The way", "max_tokens": 4, "ignore_eos": True}
        assert both.client.post("/v1/completions", json=body).status_code == 200
    after = _samples(both, name)
    assert after["tiny"] == before["tiny"]
    assert after["llama"] > before["llama"]


def _opening_and_state(stack: Stack, model: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    params = {"model": model} if model else {}
    with stack.client.stream("GET", "/ui/events", params=params) as response:
        assert response.status_code == 200
        data = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: "))
        return next(data), next(data)


def test_the_live_page_shows_each_model_with_its_own_workers(both: Stack) -> None:
    workers = {}
    for model in ("tiny", "llama", None):
        opening, state = _opening_and_state(both, model)
        assert opening["models"] == ["tiny", "llama"]
        assert opening["model"] == (model or "tiny")
        workers[model] = {worker["id"] for worker in state["workers"]}
    assert len(workers["tiny"]) == len(workers["llama"]) == 1
    assert workers["tiny"] == workers[None] and workers["tiny"].isdisjoint(workers["llama"])
    assert both.client.get("/ui/events?model=third").status_code == 404
