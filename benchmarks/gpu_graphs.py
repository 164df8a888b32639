"""How long the graphs of a step take on the device: decodes, chunks, and both in one pass.

    python -m benchmarks.gpu_graphs [--context 1150] [--decodes 1 32 128 256] [--tokens 64 256 1024 2048]
                                    [--fp8] [--kv-cache-dtype fp8]

DeepSeek-V2-Lite's shape with made-up weights, near-uniform routing. Milliseconds are medians of
replays, without a host in between.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_engine import build
from benchmarks.gpu_shape import V2_LITE
from engine.device_steps import DeviceSteps
from engine.prepared_batch import PreparedBatch, prepare
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledBatch
from engine.sequence import Sequence

NUM_REPLAYS = 9


class Steps:
    """The graphs of an engine, with sequences that it does not know of in blocks that nobody else uses."""

    def __init__(self, steps: DeviceSteps, context: int) -> None:
        self._steps = steps
        self._context = context
        self._rng = np.random.default_rng(0)
        self._next_block = 0

    def decodes(self, num_seqs: int) -> list[Sequence]:
        seqs = [self._sequence(self._context + 1) for _ in range(num_seqs)]
        for seq in seqs:
            seq.num_computed_tokens = self._context
        return seqs

    def chunks(self, num_tokens: int) -> PreparedBatch:
        """Prompts of at most 1,024 tokens, whole."""
        sizes = [1024] * (num_tokens // 1024) + ([num_tokens % 1024] if num_tokens % 1024 else [])
        batch = ScheduledBatch([self._sequence(size) for size in sizes], sizes)
        return prepare(batch, self._steps._tensors, speculates=False)

    def _sequence(self, num_tokens: int) -> Sequence:
        prompt = self._rng.integers(0, V2_LITE["vocab_size"], num_tokens).tolist()
        seq = Sequence(self._next_block, prompt, SamplingParams(temperature=0.0))
        block_size = self._steps._kv_cache.layout.block_size
        num_blocks = -(-num_tokens // block_size)
        seq.block_table = list(range(self._next_block, self._next_block + num_blocks))
        self._next_block += num_blocks
        return seq


def milliseconds(run: Callable[[], object]) -> float:
    """A run's time on the device; launches of the next one hide behind it."""
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(NUM_REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return float(np.median([a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]))


def measure(steps: DeviceSteps, num_decodes: list[int], num_tokens: list[int], context: int) -> None:
    made = Steps(steps, context)
    assert steps._decodes is not None and steps._mixed is not None
    decodes, mixed = steps._decodes, steps._mixed
    seqs = made.decodes(max(num_decodes))
    alone = {n: milliseconds(lambda n=n: decodes.launch(seqs[:n], {})) for n in num_decodes}  # type: ignore[misc]
    print("| decodes | chunk tokens | decodes alone ms | chunk alone ms | together ms | saved |", flush=True)
    for size in num_tokens:
        chunks = made.chunks(size)
        num_wanted = len(chunks.sampled)
        chunk = milliseconds(lambda c=chunks, n=num_wanted: steps._chunks.run(c.batch, n))  # type: ignore[misc]
        for n in num_decodes:
            both = milliseconds(
                lambda n=n, c=chunks, w=num_wanted: mixed.launch(seqs[:n], {}, c.batch, w)  # type: ignore[misc]
            )
            saved = 1 - both / (alone[n] + chunk)
            print(f"| {n} | {size} | {alone[n]:.2f} | {chunk:.2f} | {both:.2f} | {saved:.0%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_graphs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--context", type=int, default=1150, help="cached tokens of each decode")
    parser.add_argument("--decodes", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 2048])
    parser.add_argument("--fp8", action="store_true", help="weights in FP8")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        engine = build(Path(name) / "model", is_fp8=args.fp8, kv_cache_dtype=args.kv_cache_dtype)
        steps = engine._runner.device_steps
        assert steps is not None
        measure(steps, args.decodes, args.tokens, args.context)


if __name__ == "__main__":
    main()
