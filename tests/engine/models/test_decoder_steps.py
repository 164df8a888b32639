"""What the runner relies on, beyond the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_driver import DrivenSequence, Driver, load_ours, random_reference
from test_models_match_transformers import llama, random_prompts, v2, v3

from engine.checkpoint.weights import open_weights
from engine.models import build_model
from engine.moe.dispatch import LocalDispatcher, Routed


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe")
    random_reference(v3()).save_pretrained(path)
    return path


class CountingDispatcher(LocalDispatcher):
    num_dispatches = num_combines = 0

    def dispatch(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor) -> Routed:
        self.num_dispatches += 1
        return super().dispatch(x_TD, expert_ids_TK)

    def combine(self, y_RD: torch.Tensor, weights_TK: torch.Tensor, routed: Routed) -> torch.Tensor:
        self.num_combines += 1
        return super().combine(y_RD, weights_TK, routed)


def test_idle_step_joins_every_dispatch_and_combine(moe_dir: Path) -> None:
    driver = load_ours(moe_dir)
    dispatcher = CountingDispatcher(16)
    with open_weights(moe_dir, "safetensors", torch.float32, driver.config) as weights:
        model = build_model(driver.config, weights, lambda _: dispatcher, torch.float32, "cpu")
    before = driver.cache.data.clone()

    hidden = model.forward(driver.batch([], []), driver.cache)

    assert hidden.shape == (0, 48)
    assert model.logits(hidden).shape == (0, 211)
    assert (dispatcher.num_dispatches, dispatcher.num_combines) == (2, 2)
    assert torch.equal(driver.cache.data, before)


def test_expert_load_counts_each_choice_once_by_layer(moe_dir: Path) -> None:
    driver = load_ours(moe_dir)
    [prompt] = random_prompts([9])
    driver.step([], [(DrivenSequence(prompt), 9)])
    driver.step([], [(DrivenSequence(prompt), 5)])

    load = driver.model.take_expert_load()

    assert load is not None and load.shape == (2, 16) and load.dtype == torch.int64
    assert load.sum(dim=1).tolist() == [14 * 4, 14 * 4]
    assert driver.model.take_expert_load().sum() == 0  # type: ignore[union-attr]


def test_model_without_experts_has_no_expert_load(tmp_path: Path) -> None:
    random_reference(llama()).save_pretrained(tmp_path)

    assert load_ours(tmp_path).model.take_expert_load() is None


def test_one_layer_of_each_kind_and_the_last_are_enough_for_a_rehearsal(tmp_path: Path) -> None:
    """A dense one and, of the four with experts, two: the last one may compute fewer rows."""
    random_reference(v3(num_hidden_layers=5)).save_pretrained(tmp_path)
    driver = load_ours(tmp_path)
    [prompt] = random_prompts([7])

    with driver.model.one_layer_of_each_kind():
        driver.step([], [(DrivenSequence(prompt), 7)])
    short = driver.model.take_expert_load()
    driver.step([], [(DrivenSequence(prompt), 7)])
    whole = driver.model.take_expert_load()

    assert short is not None and whole is not None
    assert short.sum(dim=1).tolist() == [0, 0, 7 * 4, 7 * 4]
    assert whole.sum(dim=1).tolist() == 4 * [7 * 4]


def test_layer_is_done_when_its_rows_are_in_the_cache(moe_dir: Path) -> None:
    driver = load_ours(moe_dir)
    [prompt] = random_prompts([7])
    batch = driver.batch([], [(DrivenSequence(prompt), 7)])
    seen: list[tuple[int, list[bool]]] = []

    def layer_done(layer: int) -> None:
        rows = driver.cache.data.flatten(1, 2)[:, batch.slot_mapping_T]
        seen.append((layer, [bool((rows[i] != 1e4).all()) for i in range(3)]))

    driver.model.forward(batch, driver.cache, layer_done)

    assert seen == [(0, [True, False, False]), (1, [True, True, False]), (2, [True, True, True])]


BF16_TOLERANCE = 0.05  # of the largest logit; transformers in bf16 differs from itself in fp32 as much


@pytest.mark.parametrize("config", [v3(), v2(topk_method="greedy"), llama()], ids=["v3", "v2", "llama"])
def test_bf16_logits_are_near_fp32(config: object, tmp_path: Path) -> None:
    reference = random_reference(config)
    reference.save_pretrained(tmp_path)
    [prompt] = random_prompts([40])
    driver: Driver = load_ours(tmp_path, "bfloat16")
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]

    found = driver.prompt_logits(prompt, 16)

    assert driver.cache.data.dtype == torch.bfloat16 and found.dtype == torch.float32
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < BF16_TOLERANCE
