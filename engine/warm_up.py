"""Steps on made-up sequences before the first real ones, so that no request waits for a compiler.

Graphs compile what they hold when they are captured. Prompts that no graph fits (too many at once, too much
in the cache before them, wanted logprobs) are launched kernel by kernel, and kernels are compiled for a kind
of shape when they first meet it.
"""

from __future__ import annotations

from contextlib import nullcontext

from engine.kv_cache import KvCache
from engine.runner import Runner
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledBatch
from engine.sequence import Sequence

_MANY = 2048  # tokens: what is compiled for more of them is the same
# Of a step: kernels for few rows differ by their number, and behind the last attention a prompt has one row.
_NUM_PROMPTS = (2, 3, 4, 5, 9, 17, 25, 48, 49, 97, 193)
_ROUND = 16  # kernels for sizes that this divides differ from the others
_GREEDY = SamplingParams(temperature=0.0)
_DRAWN = (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.9))


def warm_up(runner: Runner, kv_cache: KvCache, token_budget: int, max_model_len: int) -> None:
    """Writes to blocks of the cache, which nobody uses yet."""
    block_size = kv_cache.layout.block_size
    num_places = kv_cache.num_blocks * block_size
    longest = min(token_budget, max_model_len - 1 - block_size, num_places - block_size)
    many = min(longest, _MANY)
    sizes = {many, many - 1, longest, longest - 1, longest // _ROUND * _ROUND}
    steps = [(1, size, _GREEDY) for size in sorted(sizes)]
    steps += [(num_prompts, many, _GREEDY) for num_prompts in _NUM_PROMPTS]
    steps += [(num_prompts, many, drawn) for num_prompts in (1, 9) for drawn in _DRAWN]
    device_steps = runner.device_steps
    with nullcontext() if device_steps is None else device_steps.without_chunk_graphs():
        for num_prompts, num_tokens, sampling in steps:
            for context in (0, block_size):
                most = min(max_model_len - 1, num_places // num_prompts // block_size * block_size) - context
                size = min(num_tokens // num_prompts, most)
                if size > 1:  # one row is a decode
                    runner.launch(_batch(num_prompts, size, context, sampling, block_size)).collect()
    runner.forget_expert_load()


def _batch(
    num_prompts: int, size: int, context: int, sampling: SamplingParams, block_size: int
) -> ScheduledBatch:
    num_blocks = -(-(context + size) // block_size)
    batch = ScheduledBatch()
    for i in range(num_prompts):
        seq = Sequence(i, [i] * (context + size), sampling)
        seq.block_table = list(range(i * num_blocks, (i + 1) * num_blocks))
        seq.num_computed_tokens = context
        batch.seqs.append(seq)
        batch.num_scheduled_tokens.append(size)
        batch.num_decodes += size == 1
    return batch
