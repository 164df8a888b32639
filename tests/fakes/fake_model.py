"""A real Engine around a model of a few lines: instant, deterministic, and honest about the KV cache.

The next token depends on everything that the cache holds of the sequence, in every layer: a block that was
not computed, not handed over, or handed over to the wrong place changes the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from engine.engine import Engine, EngineLimits
from engine.forward_batch import ForwardBatch
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.kv_outbox import KvOutbox
from engine.runner import Runner
from engine.sampler import Sampler
from engine.scheduler import SchedulerConfig
from engine.tiers.tier_store import LowerTiers

NUM_LAYERS = 3
VOCAB_SIZE = 211
EOS_TOKEN_ID = 0
_MODULUS = 1_000_003


class FakeModel:
    """KV of a token in a layer: (token id, position * NUM_LAYERS + layer)."""

    uses_kernels = False

    def __init__(self, vocab_size: int = VOCAB_SIZE) -> None:
        self.vocab_size = vocab_size
        self.num_forwards = 0

    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: KvCache,
        layer_done: Callable[[int], None] | None = None,
        *,
        wanted_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.num_forwards += 1
        num_layers = kv_cache.layout.num_layers
        for layer in range(num_layers):
            places = batch.positions_T * num_layers + layer
            rows = torch.stack((batch.token_ids_T, places), dim=1).to(torch.float32)
            kv_cache.write_rows(layer, batch.slot_mapping_T, rows)
            if layer_done is not None:
                layer_done(layer)
        states = [state for s in range(batch.num_seqs) for state in _states(batch, kv_cache, s)]
        hidden_TD = torch.tensor(states, dtype=torch.int64).view(-1, 1)
        return hidden_TD if wanted_N is None else hidden_TD[wanted_N]

    def one_layer_of_each_kind(self) -> AbstractContextManager[None]:
        return nullcontext()

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        tokens_1V = torch.arange(self.vocab_size).unsqueeze(0)
        return ((hidden_ND * 7919 + (tokens_1V + 1) * (hidden_ND % 977 + 13)) % 10_007).float() / 2000.0

    def logits_into(self, out_NV: torch.Tensor, hidden_ND: torch.Tensor) -> None:
        out_NV.copy_(self.logits(hidden_ND))

    def take_expert_load(self) -> torch.Tensor | None:
        return None


def _states(batch: ForwardBatch, kv_cache: KvCache, s: int) -> list[int]:
    begin, end = batch.query_start[s], batch.query_start[s + 1]
    context = batch.context_len[s]
    num_blocks = -(-context // kv_cache.layout.block_size)
    table = torch.tensor(batch.block_tables[s][:num_blocks])
    seen = torch.stack(
        [kv_cache.layer(i)[table].view(-1, 2)[:context] for i in range(kv_cache.layout.num_layers)]
    ).to(torch.int64)
    terms = ((seen[..., 0] + 1) * (seen[..., 1] * 31 + 17)).sum(0)
    running = terms.cumsum(0) % _MODULUS
    return [int(value) for value in running[context - (end - begin) :]]


def expected_tokens(prompt_ids: list[int], num_tokens: int, model: FakeModel | None = None) -> list[int]:
    """The greedy continuation, computed without an engine and without stopping at EOS_TOKEN_ID."""
    model = model or FakeModel()
    token_ids = list(prompt_ids)
    for _ in range(num_tokens):
        state = 0
        for position, token_id in enumerate(token_ids):
            for layer in range(NUM_LAYERS):
                state += (token_id + 1) * ((position * NUM_LAYERS + layer) * 31 + 17)
        logits = model.logits(torch.tensor([[state % _MODULUS]]))
        token_ids.append(int(logits.argmax()))
    return token_ids[len(prompt_ids) :]


def fake_kv_layout(block_size: int = 4, model_fingerprint: str = "fake") -> KvLayout:
    return KvLayout(
        model_fingerprint=model_fingerprint,
        num_layers=NUM_LAYERS,
        token_shape=(2,),
        dtype="float32",
        block_size=block_size,
    )


def build_fake_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    token_budget: int = 64,
    max_running: int = 16,
    growth_tokens: int = 16,
    max_model_len: int | None = None,
    is_shared: bool = False,
    model: FakeModel | None = None,
    tiers: LowerTiers | None = None,
    outbox_slots: int = 0,
) -> Engine:
    layout = fake_kv_layout(block_size)
    kv_cache = KvCache(layout, num_blocks, is_shared=is_shared)
    model = model or FakeModel()
    limits = EngineLimits(
        max_model_len=max_model_len or num_blocks * block_size,
        vocab_size=model.vocab_size,
        eos_token_ids=frozenset({EOS_TOKEN_ID}),
    )
    config = SchedulerConfig(token_budget=token_budget, max_running=max_running, growth_tokens=growth_tokens)
    runner = Runner(model, kv_cache, Sampler(limits.eos_token_ids), token_budget, "cpu")
    engine = Engine(runner, kv_cache, limits, config, tiers=tiers)
    if outbox_slots:
        engine.send_through(KvOutbox(kv_cache, outbox_slots))
    return engine
