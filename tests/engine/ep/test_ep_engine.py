"""Whole engines on random checkpoints: neither the number of ranks nor who has which request matters."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path

import pytest
from ep_ranks import run_doomed_ranks, run_ranks

from engine.build import build_engine
from engine.checkpoint.random_checkpoint import make_random_checkpoint
from engine.engine_config import EngineConfig
from engine.engine_thread import EngineThread
from engine.ep.ep_group import EpGroup
from engine.outputs import StepOutput
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.fakes.agreeing_checkpoint import make_agreeing_checkpoint

MAX_TOKENS = 24
PROMPT_LENGTHS = [70, 3, 1, 40, 17, 90]
ARCHITECTURES = ["deepseek_v3", "deepseek_v2"]


def prompts() -> list[list[int]]:
    chance = random.Random(7)
    return [[chance.randrange(1, 1000) for _ in range(length)] for length in PROMPT_LENGTHS]


class Answers:
    """What one rank's engine thread reports."""

    def __init__(self, num_expected: int) -> None:
        self.token_ids: dict[int, list[int]] = {}
        self.expert_load: list[list[int]] = []
        self.num_idle_steps = 0
        self.failures: list[BaseException] = []
        self.done = threading.Event()
        self._num_left = num_expected

    def take(self, step: StepOutput) -> None:
        self.num_idle_steps += step.stats.is_idle_step
        for layer, load in enumerate(step.stats.expert_load):
            if layer == len(self.expert_load):
                self.expert_load.append([0] * len(load))
            self.expert_load[layer] = [a + b for a, b in zip(self.expert_load[layer], load, strict=True)]
        for output in step.outputs:
            self.token_ids.setdefault(output.seq_id, []).extend(output.token_ids)
            self._num_left -= output.finish_reason is not None
        if self._num_left == 0:
            self.done.set()

    def fail(self, error: BaseException) -> None:
        self.failures.append(error)
        self.done.set()


def serve(
    group: EpGroup, model_dir: Path, ranks: list[int]
) -> tuple[dict[int, list[int]], list[list[int]], int]:
    """ranks[i] serves prompt i. Returns token ids by prompt, expert load and the number of idle steps."""
    config = EngineConfig(
        model_dir=model_dir, dtype="float32", num_blocks=64, max_model_len=256, token_budget=64, max_running=8
    )
    engine = build_engine(config, group)
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    own = [seq_id for seq_id, rank in enumerate(ranks) if rank == group.rank]
    answers = Answers(len(own))
    thread = EngineThread(engine, answers.take, answers.fail)
    thread.start()
    for seq_id in own:
        thread.call(lambda e, i=seq_id: e.add(Sequence(i, prompts()[i], sampling))).result(20.0)
    assert not own or answers.done.wait(30.0)
    assert not answers.failures, answers.failures
    assert thread.stop(30.0)
    engine.check_integrity()
    engine.kv_cache.close()
    return answers.token_ids, answers.expert_load, answers.num_idle_steps


@pytest.fixture(scope="module", params=ARCHITECTURES)
def single(request, tmp_path_factory):
    """The checkpoint, and what one rank with all experts answers."""
    model_dir = tmp_path_factory.mktemp("ep") / request.param
    make_random_checkpoint(model_dir, request.param)
    token_ids, expert_load, _ = run_ranks(1, serve, model_dir, [0] * len(PROMPT_LENGTHS))[0]
    assert [len(token_ids[i]) for i in range(len(PROMPT_LENGTHS))] == [MAX_TOKENS] * len(PROMPT_LENGTHS)
    return model_dir, token_ids, expert_load


@pytest.mark.parametrize(
    ("size", "ranks"),
    [
        pytest.param(2, [0, 0, 1, 0, 1, 0], id="ep2"),
        pytest.param(2, [1, 1, 1, 1, 1, 1], id="ep2-first-rank-idle"),
        pytest.param(3, [0, 1, 1, 0, 0, 1], id="ep3-last-rank-idle"),
        pytest.param(4, [1, 0, 0, 2, 0, 2], id="ep4-last-rank-idle"),
    ],
)
def test_tokens_do_not_depend_on_the_number_of_ranks(single, size, ranks):
    model_dir, expected, _ = single

    results = run_ranks(size, serve, model_dir, ranks)

    assert {seq_id: ids for token_ids, _, _ in results for seq_id, ids in token_ids.items()} == expected
    assert all(results[rank][2] >= MAX_TOKENS for rank in range(size) if rank not in ranks)


@pytest.mark.parametrize("ranks", [[0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]], ids=["both", "first-idle"])
def test_ranks_that_draft_stay_in_step(tmp_path: Path, ranks: list[int]) -> None:
    """Each rank accepts other drafts, and one has nothing to draft: the layer's collectives match all the
    same."""
    model_dir = tmp_path / "agreeing"
    make_agreeing_checkpoint(model_dir, 0.2)
    expected, expert_load, _ = run_ranks(1, serve, model_dir, [0] * len(PROMPT_LENGTHS))[0]

    results = run_ranks(2, serve, model_dir, ranks)

    assert {seq_id: ids for token_ids, _, _ in results for seq_id, ids in token_ids.items()} == expected
    assert len(expert_load) == 4  # three layers of experts in the model, and the one that drafts


@pytest.mark.parametrize("single", ["deepseek_v2"], indirect=True)
def test_expert_loads_of_all_ranks_add_up_to_that_of_one(single):
    """But that of the last layer, where one rank alone does not count rows of a pass that computes few."""
    model_dir, _, expected = single

    loads = [load for _, load, _ in run_ranks(2, serve, model_dir, [0, 1, 0, 1, 0, 1])]

    found = [[sum(pair) for pair in zip(*layers, strict=True)] for layers in zip(*loads, strict=True)]
    assert found[:-1] == expected[:-1]
    assert sum(found[-1]) == sum(found[0]) > sum(expected[-1])


def serve_until_rank_1_dies(group: EpGroup, model_dir: Path) -> list[str]:
    config = EngineConfig(
        model_dir=model_dir,
        dtype="float32",
        num_blocks=64,
        max_model_len=1024,
        token_budget=64,
        max_running=8,
    )
    answers = Answers(num_expected=1)
    thread = EngineThread(build_engine(config, group), answers.take, answers.fail)
    thread.start()
    if group.rank == 0:
        endless = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)
        thread.call(lambda engine: engine.add(Sequence(0, [1, 2, 3], endless)))
    if group.rank == 1:
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    assert answers.done.wait(20.0)
    return [f"{type(failure).__name__}: {failure}" for failure in answers.failures]


@pytest.mark.parametrize("single", ["deepseek_v3"], indirect=True)
def test_a_killed_rank_fails_the_engine_threads_of_the_others(single):
    results = run_doomed_ranks(3, serve_until_rank_1_dies, single[0])

    assert results == [
        ["EpGroupLost: EP rank 0: lost rank 1"],
        None,
        ["EpGroupLost: EP rank 2: lost rank 1"],
    ]
