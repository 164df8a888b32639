"""Behind the last attention only rows are computed whose hidden state somebody wants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_driver import DrivenSequence, Driver, load_ours, random_reference
from test_models_match_transformers import llama, random_prompts, v2, v3

from engine.checkpoint.weights import open_weights
from engine.engine import Engine, EngineLimits
from engine.forward_batch import ForwardBatch
from engine.layers.rms_norm import RmsNorm
from engine.models import build_model
from engine.models.decoder import Decoder, DecoderLayer
from engine.moe.dispatch import LocalDispatcher, Routed
from engine.runner import Runner
from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerConfig
from engine.sequence import Sequence

VARIANTS = {
    "v3": lambda: v3(),
    "v3_all_dense": lambda: v3(first_k_dense_replace=3),
    "v3_biased": lambda: v3(attention_bias=True),
    "v2": lambda: v2(topk_method="greedy"),
    "llama": lambda: llama(),
}


@pytest.fixture(params=VARIANTS)
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Driver:
    return load_random(VARIANTS[request.param](), tmp_path)


def load_random(config: transformers.PreTrainedConfig, directory: Path) -> Driver:
    random_reference(config).save_pretrained(directory)
    return load_ours(directory)


class Fed:
    """Rows that feed-forward layers saw, and of them those of last layers."""

    def __init__(self) -> None:
        self.all: list[int] = []
        self.last: list[int] = []


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fed]:
    fed = Fed()
    final_norms: list[RmsNorm] = []
    feed, forward = DecoderLayer.feed, Decoder.forward

    def noted_feed(self: DecoderLayer, x_TD: torch.Tensor, attended_TD: torch.Tensor, norm: RmsNorm) -> Any:
        assert x_TD.shape == attended_TD.shape
        fed.all.append(x_TD.shape[0])
        if norm is final_norms[-1]:
            fed.last.append(x_TD.shape[0])
        return feed(self, x_TD, attended_TD, norm)

    def noted_forward(self: Decoder, *args: Any, **options: Any) -> torch.Tensor:
        final_norms.append(self._norm)
        return forward(self, *args, **options)

    monkeypatch.setattr(DecoderLayer, "feed", noted_feed)
    monkeypatch.setattr(Decoder, "forward", noted_forward)
    yield fed


def mixed_batch(driver: Driver) -> ForwardBatch:
    """Two decodes, a chunk from the front and one behind cached rows: 2 + 9 + 7 rows."""
    sequences = [DrivenSequence(prompt) for prompt in random_prompts([6, 4, 9, 12])]
    for seq, num in zip(sequences, (5, 3, 0, 5), strict=True):
        if num:
            driver.step([], [(seq, num)])
    return driver.batch(sequences[:2], [(sequences[2], 9), (sequences[3], 7)])


@pytest.mark.parametrize("rows", [[0, 1, 10, 17], [17, 3, 3, 0, 0], [12], list(range(18))])
def test_wanted_rows_are_those_of_a_pass_over_all(driver: Driver, fed: Fed, rows: list[int]) -> None:
    batch = mixed_batch(driver)
    expected_TD = driver.model.forward(batch, driver.cache)
    cache = driver.cache.data.clone()
    fed.all.clear()

    found_ND = driver.model.forward(batch, driver.cache, wanted_N=torch.tensor(rows))

    torch.testing.assert_close(found_ND, expected_TD[rows], rtol=1e-5, atol=2e-6)
    assert torch.equal(driver.cache.data, cache)
    assert fed.all == [18, 18, len(rows)]


def test_a_pass_without_wanted_rows_ends_behind_the_last_attention(driver: Driver, fed: Fed) -> None:
    batch = mixed_batch(driver)
    driver.model.forward(batch, driver.cache)
    cache = driver.cache.data.clone()
    driver.cache.data[:, batch.slot_mapping_T // 4, batch.slot_mapping_T % 4] = 1e4
    fed.all.clear()
    done: list[int] = []

    hidden_ND = driver.model.forward(
        batch, driver.cache, done.append, wanted_N=torch.empty(0, dtype=torch.int64)
    )

    assert hidden_ND.shape == (0, 48) and driver.model.logits(hidden_ND).shape == (0, 211)
    assert torch.equal(driver.cache.data, cache)
    assert done == [0, 1, 2]
    assert fed.all == [18, 18]


def test_wanted_rows_do_not_count_as_load_of_the_last_layer(tmp_path: Path) -> None:
    driver = load_random(v3(), tmp_path)
    [prompt] = random_prompts([7])
    batch = driver.batch([], [(DrivenSequence(prompt), 7)])

    driver.model.forward(batch, driver.cache, wanted_N=torch.tensor([6]))
    load = driver.model.take_expert_load()
    assert load is not None and load.sum(dim=1).tolist() == [7 * 4, 0]

    driver.model.forward(batch, driver.cache)
    load = driver.model.take_expert_load()
    assert load is not None and load.sum(dim=1).tolist() == [7 * 4, 7 * 4]


class PeersDispatcher:
    """As one of a group: ranks have agreed on the number of rows."""

    def __init__(self, num_experts: int) -> None:
        self._local = LocalDispatcher(num_experts)
        self.local_experts = self._local.local_experts
        self.num_rows: list[int] = []

    def dispatch(self, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor) -> Routed:
        self.num_rows.append(x_TD.shape[0])
        return self._local.dispatch(x_TD, expert_ids_TK)

    def combine(self, y_RD: torch.Tensor, weights_TK: torch.Tensor, routed: Routed) -> torch.Tensor:
        return self._local.combine(y_RD, weights_TK, routed)


@pytest.mark.parametrize("rows", [[17, 3, 3], []])
def test_every_row_reaches_the_experts_of_a_group(tmp_path: Path, rows: list[int]) -> None:
    driver = load_random(v3(), tmp_path)
    batch = mixed_batch(driver)
    expected_TD = driver.model.forward(batch, driver.cache)
    dispatcher = PeersDispatcher(16)
    with open_weights(tmp_path, "safetensors", torch.float32, driver.config) as weights:
        model = build_model(driver.config, weights, lambda _: dispatcher, torch.float32, "cpu")

    found_ND = model.forward(batch, driver.cache, wanted_N=torch.tensor(rows, dtype=torch.int64))

    assert dispatcher.num_rows == [18, 18]
    assert torch.equal(found_ND, expected_TD[rows])


def engine_of(driver: Driver, token_budget: int) -> Engine:
    limits = EngineLimits(max_model_len=128, vocab_size=211, eos_token_ids=frozenset())
    runner = Runner(driver.model, driver.cache, Sampler(frozenset()), token_budget, "cpu")
    return Engine(runner, driver.cache, limits, SchedulerConfig(token_budget=token_budget, max_running=4))


@pytest.mark.parametrize(
    ("lengths", "wanted", "last"),
    [
        ([19, 4], {}, [2, 2, 2]),  # 8 and 8 of the first, which are nobody's; 3 + 4; decodes
        ([19, 4], {"num_prompt_logprobs": 0}, [8, 8, 7, 2, 2]),
        ([4, 12], {}, [1, 1, 2, 1, 1]),  # 4 + 4; a decode + 4, twice; decodes
    ],
)
def test_an_engine_computes_what_is_read(
    tmp_path: Path, fed: Fed, lengths: list[int], wanted: dict[str, int], last: list[int]
) -> None:
    engine = engine_of(load_random(v3(), tmp_path), token_budget=8)
    for seq_id, prompt in enumerate(random_prompts(lengths)):
        sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, **wanted)
        engine.add(Sequence(seq_id, prompt, sampling))
    while engine.has_work:
        engine.step()

    assert fed.last == last
