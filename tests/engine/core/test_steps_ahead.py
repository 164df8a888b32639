"""Steps launched before the tokens of the last one are read: whatever joins, ends, leaves or runs out of
blocks meanwhile, every sequence gets the tokens it would get alone.

The device here is a cache of token ids: a step writes the ids of its rows into their slots and finds the next
token from all ids that it reads back through the block table. So a block that was given away too early, a row
at the wrong place or a stale token changes what follows.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

import pytest

from engine.engine import Engine, EngineLimits
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.launch import StepResult
from engine.outputs import FinishReason
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledBatch, SchedulerConfig
from engine.sequence import Sequence
from engine.speculation.draft_state import DraftState
from engine.speculation.verification import single_tokens

BLOCK_SIZE, VOCAB, EOS, MAX_MODEL_LEN = 4, 40, 0, 48


def next_token(token_ids: list[int]) -> int:
    return blake2b(bytes(token_ids), digest_size=1).digest()[0] % VOCAB


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    """What follows the prompt, to the end."""
    token_ids = list(prompt)
    while len(token_ids) - len(prompt) < max_tokens and len(token_ids) < MAX_MODEL_LEN:
        token_ids.append(next_token(token_ids))
        if token_ids[-1] == EOS:
            break
    return token_ids[len(prompt) :]


@dataclass(slots=True)
class CountingLaunch:
    found: dict[Sequence, int]
    is_open: bool
    was_collected: bool = False
    has_ended: bool = False
    device_s: float | None = None

    @property
    def is_done(self) -> bool:
        return self.was_collected or self.has_ended

    def collect(self) -> StepResult:
        assert not self.was_collected
        self.was_collected = True
        return StepResult(
            single_tokens(list(self.found), list(self.found.values()), [None] * len(self.found))
        )


@dataclass(slots=True)
class TokenDevice:
    """In place of a Runner. Logprobs stand for everything that the host must draw."""

    num_slots: int
    cache: list[int] = field(default_factory=list)
    launches: list[CountingLaunch] = field(default_factory=list)
    num_ahead: int = 0

    def __post_init__(self) -> None:
        self.cache = [-1] * self.num_slots

    def launch(self, batch: ScheduledBatch, layer_done: object) -> CountingLaunch:
        before = self.launches[-1] if self.launches else None
        if before is not None and not before.was_collected:
            assert before.is_open
            assert all(launch.was_collected for launch in self.launches[:-1])
            self.num_ahead += 1
        found = {}
        for seq, num_tokens in zip(batch.seqs, batch.num_scheduled_tokens, strict=True):
            first, end = seq.num_computed_tokens, seq.num_computed_tokens + num_tokens
            for position in range(first, end):
                if position < seq.num_tokens:
                    token_id = seq.token_ids[position]
                else:
                    assert before is not None and not before.was_collected and seq.num_pending_tokens == 1
                    token_id = before.found[seq]
                self.cache[self._slot(seq, position)] = token_id
            if num_tokens == seq.num_remaining_tokens:
                found[seq] = next_token([self.cache[self._slot(seq, position)] for position in range(end)])
        is_open = all(seq.sampling.num_logprobs is None for seq in found)
        self.launches.append(CountingLaunch(found, is_open))
        return self.launches[-1]

    def num_rows(self, batch: ScheduledBatch) -> int:
        return batch.num_tokens

    def unpack_draft(self, handed: object, num_tokens: int) -> DraftState:
        return DraftState()

    @staticmethod
    def _slot(seq: Sequence, position: int) -> int:
        return seq.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def build(num_blocks: int, max_running: int = 4) -> tuple[Engine, TokenDevice]:
    layout = KvLayout(
        model_fingerprint="test", num_layers=1, token_shape=(1,), dtype="float32", block_size=BLOCK_SIZE
    )
    device = TokenDevice(num_blocks * BLOCK_SIZE)
    limits = EngineLimits(max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB, eos_token_ids=frozenset({EOS}))
    config = SchedulerConfig(token_budget=12, max_running=max_running, growth_tokens=1)
    engine = Engine(device, KvCache(layout, num_blocks), limits, config)  # type: ignore[arg-type]
    return engine, device


def sequence(seq_id: int, prompt: list[int], max_tokens: int, num_logprobs: int | None = None) -> Sequence:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, num_logprobs=num_logprobs)
    return Sequence(seq_id, prompt, sampling)


def always_listens(engine: Engine) -> Engine:
    """To the end of each step that runs, however short it is."""
    engine._clock.plan_at = lambda work, began: time.monotonic() + 60.0  # type: ignore[method-assign]
    return engine


def run(
    engine: Engine,
    found: dict[int, list[int]],
    reasons: dict[int, FinishReason],
    listen: Callable[[float], None] | None = None,
) -> None:
    for output in engine.step(listen).outputs:
        assert output.seq_id not in reasons
        found.setdefault(output.seq_id, []).extend(output.token_ids)
        if output.finish_reason is not None:
            reasons[output.seq_id] = output.finish_reason
    engine.check_integrity()


class Traffic:
    """Sequences that come and are aborted at random, between steps or also while one runs."""

    def __init__(self, seed: int, *, listens: bool) -> None:
        self.rng = rng = random.Random(seed)
        self.engine, self.device = build(num_blocks=rng.choice([14, 18, 40]))
        self._listen = self.listen if listens else None
        if listens:
            always_listens(self.engine)
        self.num_heard = 0
        self.prompts: dict[int, tuple[list[int], int]] = {}
        self.found: dict[int, list[int]] = {}
        self.reasons: dict[int, FinishReason] = {}
        self.aborted: set[int] = set()
        self._shared = [rng.randrange(1, VOCAB) for _ in range(9)]

    def run(self, num_seqs: int) -> None:
        rng = self.rng
        while len(self.prompts) < num_seqs:
            self.add()
            for _ in range(rng.randrange(4)):
                self.step()
            if rng.random() < 0.15:
                self.abort()
        while self.engine.has_work:
            self.step()

    def step(self) -> None:
        if self.engine.has_work:
            run(self.engine, self.found, self.reasons, self._listen)

    def listen(self, seconds: float) -> None:
        assert 0.0 < seconds < 61.0
        self.num_heard += 1
        for _ in range(self.rng.choice([0, 0, 1, 2]) if len(self.prompts) < 40 else 0):
            self.add()
        if self.rng.random() < 0.05:
            self.abort()

    def add(self) -> None:
        rng, seq_id = self.rng, len(self.prompts)
        own = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 20))]
        self.prompts[seq_id] = self._shared[: rng.choice([0, 4, 9])] + own, rng.randrange(1, 24)
        num_logprobs = rng.choice([None] * 6 + [0])
        self.engine.add(sequence(seq_id, *self.prompts[seq_id], num_logprobs=num_logprobs))

    def abort(self) -> None:
        victim = self.rng.randrange(len(self.prompts))
        if victim not in self.reasons:
            self.aborted.add(victim)
            self.engine.abort(victim)
            self.engine.check_integrity()


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_tokens_are_those_of_a_sequence_alone(seed: int, listens: bool) -> None:
    traffic = Traffic(seed, listens=listens)
    traffic.run(num_seqs=40)
    for seq_id, (prompt, max_tokens) in traffic.prompts.items():
        expected, found = alone(prompt, max_tokens), traffic.found.get(seq_id, [])
        if seq_id in traffic.aborted:
            assert expected[: len(found)] == found
        else:
            assert found == expected, seq_id
            is_stopped = expected[-1] == EOS
            assert traffic.reasons[seq_id] is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
    assert traffic.device.num_ahead > 20
    assert (traffic.num_heard > 20) is listens
    assert all(launch.was_collected for launch in traffic.device.launches)


def test_every_step_behind_the_first_is_launched_ahead() -> None:
    engine, device = build(num_blocks=40)
    prompt = next(p for p in ([n] for n in range(1, VOCAB)) if EOS not in alone(p, 20))
    engine.add(sequence(0, prompt, 20))
    num_steps = 0
    while engine.has_work:
        assert len(engine.step().outputs) == 1
        num_steps += 1
    # The last token is known to be the last before it is read: nothing is computed behind it.
    assert (num_steps, len(device.launches), device.num_ahead) == (20, 20, 19)


def test_a_chunk_is_launched_beside_decodes_that_are_under_way() -> None:
    engine, device = build(num_blocks=40)
    engine.add(sequence(0, [1, 2, 3], 20))
    engine.step()
    engine.add(sequence(1, [5] * 8, 3))
    engine.step()
    assert [len(launch.found) for launch in device.launches] == [1, 1, 2]
    assert [launch.was_collected for launch in device.launches] == [True, True, False]


def test_who_joins_while_a_step_runs_is_in_the_next_one() -> None:
    """And hears of its first token after that one step, not after two."""
    engine, device = build(num_blocks=40)
    always_listens(engine)
    engine.add(sequence(0, [1, 2, 3], 20))
    engine.step()
    late = sequence(1, [5] * 3, 3)
    engine.step(lambda seconds: None if late.arrival else engine.add(late))
    assert [len(launch.found) for launch in device.launches] == [1, 1, 2]
    assert {output.seq_id for output in engine.step().outputs} == {0, 1}


def test_who_leaves_while_a_step_runs_is_not_in_the_next_one() -> None:
    engine, device = build(num_blocks=40)
    always_listens(engine)
    for seq_id in range(2):
        engine.add(sequence(seq_id, [1, 2, 3], 20))
    engine.step()
    step = engine.step(lambda seconds: engine.abort(1))
    assert [output.seq_id for output in step.outputs] == [0]
    assert [len(launch.found) for launch in device.launches] == [2, 2, 1]


def test_a_step_that_has_ended_is_not_listened_beside() -> None:
    engine, device = build(num_blocks=40)
    always_listens(engine)
    engine.add(sequence(0, [1, 2, 3], 20))
    engine.step()
    device.launches[-1].has_ended = True
    engine.step(lambda seconds: pytest.fail("the device waits"))
    assert len(device.launches) == 3


def test_without_a_free_block_the_step_under_way_is_read_first() -> None:
    """Who must give blocks back is decided when every token is known."""
    engine, device = build(num_blocks=12)
    prompts = {seq_id: [seq_id + 1] * 15 for seq_id in range(3)}
    for seq_id, prompt in prompts.items():
        engine.add(sequence(seq_id, prompt, 24))
    found: dict[int, list[int]] = {}
    reasons: dict[int, FinishReason] = {}
    num_preemptions = 0
    while engine.has_work:
        was_collected = [launch.was_collected for launch in device.launches]
        step = engine.step()
        num_preemptions += step.stats.num_preemptions
        if step.stats.num_preemptions:
            assert all(was_collected)
        for output in step.outputs:
            found.setdefault(output.seq_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                reasons[output.seq_id] = output.finish_reason
        engine.check_integrity()
    assert num_preemptions
    assert found == {seq_id: alone(prompt, 24) for seq_id, prompt in prompts.items()}


def test_tokens_that_the_host_draws_hold_up_the_step_behind_them() -> None:
    engine, device = build(num_blocks=40)
    prompt = next(p for p in ([n] for n in range(1, VOCAB)) if EOS not in alone(p, 6))
    engine.add(sequence(0, prompt, 6, num_logprobs=0))
    while engine.has_work:
        engine.step()
    assert (len(device.launches), device.num_ahead) == (6, 0)


def test_a_step_under_way_is_waited_for_when_the_engine_closes() -> None:
    engine, device = build(num_blocks=40)
    engine.add(sequence(0, [1, 2, 3], 20))
    engine.step()
    assert not device.launches[-1].was_collected
    engine.abort_all()
    engine.close()
    assert device.launches[-1].was_collected


def test_a_device_that_fails_does_not_keep_the_engine_from_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, device = build(num_blocks=40)
    engine.add(sequence(0, [1, 2, 3], 20))
    engine.step()

    def fail(launch: CountingLaunch) -> StepResult:
        launch.was_collected = True
        raise RuntimeError("the device is lost")

    closed: list[bool] = []
    monkeypatch.setattr(engine._tiers, "close", lambda: closed.append(True))
    monkeypatch.setattr(CountingLaunch, "collect", fail)
    engine.close()
    assert device.launches[-1].was_collected
    assert closed == [True]
