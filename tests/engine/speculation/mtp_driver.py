"""Checkpoints with a layer of multi-token prediction, and engines over them, for the tests beside it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from engine.build import build_engine
from engine.engine import Engine, EngineLimits
from engine.engine_config import EngineConfig
from engine.outputs import FinishReason, TokenLogprobs
from engine.scheduler import SchedulerConfig
from engine.sequence import Sequence

VOCAB_SIZE = 4096
NUM_LAYERS = 4


def build(
    model_dir: Path, num_speculative_tokens: int, *, growth_tokens: int | None = None, **changes: Any
) -> Engine:
    settings = {"dtype": "float32", "num_blocks": 80, "max_running": 8, "token_budget": 512} | changes
    engine = build_engine(
        EngineConfig(model_dir=model_dir, num_speculative_tokens=num_speculative_tokens, **settings)
    )
    if growth_tokens is None:
        return engine
    config = SchedulerConfig(
        token_budget=settings["token_budget"],
        max_running=settings["max_running"],
        growth_tokens=growth_tokens,
        num_speculative_tokens=num_speculative_tokens,
    )
    limits = EngineLimits(
        max_model_len=engine.max_model_len, vocab_size=engine.vocab_size, eos_token_ids=engine.eos_token_ids
    )
    return Engine(engine._runner, engine.kv_cache, limits, config)


def random_prompts(lengths: tuple[int, ...], seed: int = 5) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


class Recorder:
    """Steps an engine and notes tokens, logprobs, ends, and the draft for each position of each sequence."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self.ends: dict[int, FinishReason | None] = {}
        self.drafts: dict[tuple[int, int], int] = {}
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_loads = 0
        self._seqs: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        self._seqs.append(seq)
        self.engine.add(seq)

    def watch(self, seq: Sequence, token_ids: tuple[int, ...]) -> None:
        """A sequence that came in by a hand-off."""
        self._seqs.append(seq)
        self.tokens[seq.seq_id] = list(token_ids)

    def step(self) -> None:
        step = self.engine.step()
        self.engine.check_integrity()
        self.num_steps += 1
        self.num_preemptions += step.stats.num_preemptions
        self.num_loads += sum(load.num_blocks > 0 for load in step.stats.loads)
        for output in step.outputs:
            self.tokens.setdefault(output.seq_id, []).extend(output.token_ids)
            self.logprobs.setdefault(output.seq_id, []).extend(output.logprobs)
            self.ends[output.seq_id] = output.finish_reason
        for seq in self._seqs:
            for i, token_id in enumerate(seq.draft.token_ids):
                self.drafts[seq.seq_id, seq.num_tokens + i] = token_id

    def run_until_ended(self, seq_id: int) -> None:
        """Also while it waits for others than the engine."""
        self.ends.pop(seq_id, None)
        while self.ends.get(seq_id) is None:
            self.step()

    def run(self) -> Recorder:
        while self.engine.has_work:
            self.step()
        return self
