"""Random lives of many sequences in one engine that is too small for them."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from engine.outputs import TokenLogprobs
from engine.sequence import Sequence, SequenceStatus
from tests.engine.core.engine_driver import greedy
from tests.fakes.fake_model import NUM_LAYERS, build_fake_engine, expected_tokens

BLOCK_SIZE = 4

prompts = st.integers(0, 2).flatmap(
    # few different prefixes, so that prompts share blocks
    lambda kind: st.integers(1, 26).map(
        lambda length: tuple((kind * 50 + i * 3) % 200 for i in range(length))
    )
)


@cache
def expected(prompt_ids: tuple[int, ...], max_tokens: int) -> list[int]:
    return expected_tokens(list(prompt_ids), max_tokens)


class EngineLifecycle(RuleBasedStateMachine):
    running = Bundle("running")  # added here, or committed
    keeping = Bundle("keeping")  # sending side
    reserved = Bundle("reserved")  # receiving side, before extend
    extending = Bundle("extending")

    @initialize(
        num_blocks=st.integers(10, 20), growth_tokens=st.integers(1, 10), max_running=st.integers(1, 5)
    )
    def build(self, num_blocks: int, growth_tokens: int, max_running: int) -> None:
        self.engine = build_fake_engine(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            token_budget=max_running + 9,
            max_running=max_running,
            growth_tokens=growth_tokens,
        )
        self.next_id = 0
        self.cases: dict[int, tuple[tuple[int, ...], int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.finished: set[int] = set()
        self.aborted: set[int] = set()
        self.granted: dict[int, list[int]] = {}
        self.index: set[bytes] = set()

    def new(self, prompt_ids: tuple[int, ...], max_tokens: int, *, keeps_blocks: bool = False) -> Sequence:
        self.next_id += 1
        self.cases[self.next_id] = (prompt_ids, max_tokens)
        self.tokens[self.next_id] = []
        return Sequence(self.next_id, list(prompt_ids), greedy(max_tokens), keeps_blocks=keeps_blocks)

    @rule(target=running, prompt_ids=prompts, max_tokens=st.integers(1, 12))
    def add(self, prompt_ids: tuple[int, ...], max_tokens: int) -> int:
        seq = self.new(prompt_ids, max_tokens)
        self.engine.add(seq)
        return seq.seq_id

    @rule(target=keeping, prompt_ids=prompts)
    def add_keeping(self, prompt_ids: tuple[int, ...]) -> int:
        seq = self.new(prompt_ids, 1, keeps_blocks=True)
        self.engine.add(seq)
        return seq.seq_id

    @rule(target=reserved, prompt_ids=prompts, max_tokens=st.integers(1, 12))
    def reserve(self, prompt_ids: tuple[int, ...], max_tokens: int) -> int:
        seq = self.new(prompt_ids, max_tokens)
        num_held = self.engine.reserve(seq)
        assert num_held * BLOCK_SIZE < len(prompt_ids)
        return seq.seq_id

    @rule(target=extending, seq_id=consumes(reserved))
    def extend(self, seq_id: int) -> object:
        if seq_id in self.aborted:
            return multiple()

        def on_ready(block_ids: list[int]) -> None:
            assert seq_id not in self.granted
            self.granted[seq_id] = block_ids

        self.engine.extend(seq_id, on_ready)
        return seq_id

    @rule(target=running, seq_id=extending)
    def commit(self, seq_id: int) -> object:
        prompt_ids, max_tokens = self.cases[seq_id]
        if seq_id not in self.granted or self.tokens[seq_id]:
            return multiple()
        self._write_kv(self.granted[seq_id], prompt_ids)
        first = expected(prompt_ids, 1)[0]
        self.tokens[seq_id].append(first)
        output = self.engine.commit(seq_id, TokenLogprobs(first, 0.0))
        assert (output is not None) == (max_tokens == 1)
        if output is not None:
            self.finished.add(seq_id)
        return seq_id

    @rule(seq_id=st.one_of(running, keeping, reserved, extending))
    def abort(self, seq_id: int) -> None:
        self.engine.abort(seq_id)
        self.granted.pop(seq_id, None)
        self.aborted.add(seq_id)

    @rule(seq_id=keeping)
    def release(self, seq_id: int) -> None:
        if seq_id in self.finished:
            self.engine.release(seq_id)

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._step()

    @invariant()
    def accounts_add_up(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            load = self.engine.load()
            total = load.num_free_blocks + load.num_cached_blocks + load.num_used_blocks
            assert total == load.num_total_blocks

    def teardown(self) -> None:
        """Whatever happened: the rest runs to its end as soon as hand-offs are over."""
        if not hasattr(self, "engine"):
            return
        for seq in list(self.engine._seqs.values()):
            if seq.status in (SequenceStatus.RESERVED, SequenceStatus.EXTENDED):
                self.abort(seq.seq_id)
        self._release_kept()
        while self.engine.has_work:
            self._step()
            self._release_kept()
        self.engine.step()
        load = self.engine.load()
        assert (load.num_used_blocks, load.num_waiting, load.num_running) == (0, 0, 0)
        for seq_id, (prompt_ids, max_tokens) in self.cases.items():
            if seq_id not in self.aborted:
                assert self.tokens[seq_id] == expected(prompt_ids, max_tokens)

    def _release_kept(self) -> None:
        for seq in list(self.engine._seqs.values()):
            if seq.status is SequenceStatus.KEPT:
                self.engine.release(seq.seq_id)

    def _step(self) -> None:
        output = self.engine.step()
        for item in output.outputs:
            assert item.seq_id not in self.finished
            self.tokens[item.seq_id] += item.token_ids
            if item.finish_reason is not None:
                self.finished.add(item.seq_id)
        self.index |= {block_hash for block_hash, _ in output.block_events.placed}
        self.index -= set(output.block_events.removed)
        assert self.index == set(self.engine.cached_hashes())

    def _write_kv(self, block_ids: list[int], prompt_ids: tuple[int, ...]) -> None:
        """What a prefill worker would have sent, for all blocks: held ones hold the same."""
        positions = torch.arange(len(prompt_ids))
        slots = torch.tensor(block_ids)[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        for layer in range(NUM_LAYERS):
            rows = torch.stack((torch.tensor(prompt_ids), positions * NUM_LAYERS + layer), dim=1)
            self.engine.kv_cache.write_rows(layer, slots, rows.float())


TestEngineLifecycle = EngineLifecycle.TestCase
TestEngineLifecycle.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
