"""Random transformers checkpoints, and our models stepped over them without an engine."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from engine.checkpoint.model_config import ModelConfig, load_model_config
from engine.checkpoint.weights import open_weights
from engine.forward_batch import ForwardBatch
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.models import CausalLM, build_model

BLOCK_SIZE = 4


def random_reference(config: transformers.PreTrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A transformers model whose every weight matters: norms and correction biases are random too."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            tensor.data.normal_(1.0, 0.2)
        elif "bias" in name:
            tensor.data.normal_(0.0, 0.3)
        elif tensor.dim() >= 2:
            tensor.data.normal_(0.0, 1.2 / tensor.shape[-1] ** 0.5)
    return model


def load_ours(model_dir: Path, dtype: str = "float32") -> Driver:
    config = load_model_config(model_dir)
    torch_dtype = getattr(torch, dtype)
    with open_weights(model_dir, "safetensors", torch_dtype, config) as weights:
        return Driver(config, build_model(config, weights, None, torch_dtype, "cpu"), dtype)


@dataclass
class DrivenSequence:
    token_ids: list[int]
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0


class Driver:
    """Sequences with scattered blocks, stepped in any mixture of decode rows and prompt chunks."""

    def __init__(self, config: ModelConfig, model: CausalLM, dtype: str, num_blocks: int = 256) -> None:
        layout = KvLayout(
            model_fingerprint="test",
            num_layers=config.num_layers,
            token_shape=config.kv_token_shape,
            dtype=dtype,
            block_size=BLOCK_SIZE,
        )
        self.config = config
        self.model = model
        self.cache = KvCache(layout, num_blocks)
        self.cache.data.fill_(1e4)  # a row read without being written would be seen
        self._free_blocks = list(range(num_blocks))
        random.Random(0).shuffle(self._free_blocks)

    def step(self, decodes: list[DrivenSequence], chunks: list[tuple[DrivenSequence, int]]) -> torch.Tensor:
        """hidden_TD of one row of each decode, then of the next rows of each chunk."""
        batch = self.batch(decodes, chunks)
        return self.model.forward(batch, self.cache)

    def batch(self, decodes: list[DrivenSequence], chunks: list[tuple[DrivenSequence, int]]) -> ForwardBatch:
        token_ids, positions, slots, starts = [], [], [], [0]
        scheduled = [(seq, 1) for seq in decodes] + chunks
        for seq, num in scheduled:
            end = seq.num_computed + num
            while len(seq.block_table) * BLOCK_SIZE < end:
                seq.block_table.append(self._free_blocks.pop())
            rows = range(seq.num_computed, end)
            token_ids += [seq.token_ids[i] for i in rows]
            positions += rows
            slots += [seq.block_table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in rows]
            starts.append(starts[-1] + num)
            seq.num_computed = end
        return ForwardBatch(
            token_ids_T=torch.tensor(token_ids, dtype=torch.int64),
            positions_T=torch.tensor(positions, dtype=torch.int64),
            slot_mapping_T=torch.tensor(slots, dtype=torch.int64),
            num_decodes=len(decodes),
            query_start=starts,
            context_len=[seq.num_computed for seq, _ in scheduled],
            block_tables=[seq.block_table for seq, _ in scheduled],
            logits_rows_N=torch.empty(0, dtype=torch.int64),
        )

    def prompt_logits(self, token_ids: list[int], chunk_size: int) -> torch.Tensor:
        """[T, V] of a whole prompt computed in chunks."""
        seq = DrivenSequence(list(token_ids))
        hidden = []
        while seq.num_computed < len(token_ids):
            num = min(chunk_size, len(token_ids) - seq.num_computed)
            hidden.append(self.step([], [(seq, num)]))
        return self.model.logits(torch.cat(hidden))

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Greedy: prompts enter one a step as two chunks, while the earlier ones already decode."""
        waiting = [DrivenSequence(list(prompt)) for prompt in prompts]
        sequences, running = list(waiting), []
        while any(
            len(seq.token_ids) < len(p) + num_tokens for seq, p in zip(sequences, prompts, strict=True)
        ):
            decodes = [
                seq for seq in running if len(seq.token_ids) < _goal(seq, sequences, prompts, num_tokens)
            ]
            chunks = []
            if waiting:
                remaining = len(waiting[0].token_ids) - waiting[0].num_computed
                chunks = [(waiting[0], (remaining + 1) // 2 if waiting[0].num_computed == 0 else remaining)]
            hidden = self.step(decodes, chunks)
            next_ids = self.model.logits(hidden).argmax(dim=-1).tolist()
            for seq, token_id in zip(decodes, next_ids, strict=False):
                seq.token_ids.append(token_id)
            if waiting and waiting[0].num_computed == len(waiting[0].token_ids):
                waiting[0].token_ids.append(next_ids[-1])
                running.append(waiting.pop(0))
        return [seq.token_ids[len(p) :] for seq, p in zip(sequences, prompts, strict=True)]


def _goal(seq: DrivenSequence, sequences: list[DrivenSequence], prompts: list[list[int]], num: int) -> int:
    return len(prompts[next(i for i, other in enumerate(sequences) if other is seq)]) + num
