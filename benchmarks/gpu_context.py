"""Prompt chunks behind a cached context: checked, then timed in three forms.

- graph: what the cache holds is expanded into memory of fixed size, as chunk graphs do;
- gather: all rows of the sequence are gathered and expanded, as steps without graphs do;
- absorbed: queries on the latents by the kernel of decodes, several tokens of a chunk as if they were heads
  of one (the merge with the chunk's own rows is not in it).

Each contains the attention to the chunk's own rows. T rows of one chunk, L cached ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from benchmarks.gpu_timing import graph_time, relative_error
from engine.attention.device_plan import PagedContext
from engine.chunk_graphs import MAX_CACHED_ROWS, MAX_CHUNKS
from engine.kernels.attention_context import ExpandTuning, expand_context
from engine.kernels.attention_decode import DecodeTuning, mla_decode
from engine.kernels.attention_prefill import (
    CachedRows,
    PrefillTuning,
    Segments,
    max_shares,
    mla_prefill,
)
from engine.kernels.mla_fp8_rows import quantise_mla_rows

HEADS, RANK, ROPE, NOPE, VALUE, BLOCK_SIZE = 16, 512, 64, 128, 128, 16
NUM_LAYERS = 4  # in turn, so that a layer's rows and weights are not in L2 by its own last turn
NUM_TOKENS = (64, 256, 1024, 2048)
LENGTHS = (512, 2048, 8192)
EXPAND_TILINGS = (
    ExpandTuning(),
    ExpandTuning(num_warps=4),
    ExpandTuning(num_stages=4, num_programs=132),
    ExpandTuning(num_columns=256, num_programs=132),
    ExpandTuning(num_columns=256, num_stages=4, num_programs=132),
)
PREFILL_TILINGS = (
    PrefillTuning(),
    PrefillTuning(num_stages=2),
    PrefillTuning(num_keys=128, num_stages=2),
    PrefillTuning(num_queries=64, num_warps=4),
    PrefillTuning(num_queries=64, num_keys=128, num_warps=4, num_stages=2),
)
ABSORBED_TILINGS = (
    DecodeTuning(num_rows=32, num_warps=8, max_heads=64),
    DecodeTuning(num_rows=64, num_warps=8, max_heads=64),
)
TOLERANCE = 0.01  # of the norm, in bfloat16


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


class Case:
    """Chunks of (cached, new) rows in a graph of num_rows, with the weights of a few layers."""

    def __init__(self, chunks: list[tuple[int, int]], num_rows: int, *, is_fp8: bool = False) -> None:
        """is_fp8: for expand() alone."""
        self.chunks = chunks
        self.num_rows = num_rows
        needed = [-(-(cached + new) // BLOCK_SIZE) for cached, new in chunks]
        self.caches = _random(NUM_LAYERS, sum(needed) + 1, BLOCK_SIZE, RANK + ROPE)
        blocks = torch.randperm(sum(needed) + 1)[1:].to(torch.int32).split(needed)
        tables = torch.zeros(MAX_CHUNKS, MAX_CACHED_ROWS // BLOCK_SIZE, dtype=torch.int32)
        for row, table in zip(tables, blocks, strict=False):
            row[: len(table)] = table
        slots = [
            (table.long()[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[: cached + new]
            for table, (cached, new) in zip(blocks, chunks, strict=True)
        ]
        self.slots_L = torch.cat(slots).cuda()
        own = [part[cached:] for part, (cached, _) in zip(slots, chunks, strict=True)]
        self.own_slots = torch.cat(own).cuda()
        self.new_start = self._starts([new for _, new in chunks])
        self.all_start = self._starts([cached + new for cached, new in chunks])
        cached_start = self._starts([cached for cached, _ in chunks])
        self.paged = PagedContext(cached_start, tables.cuda(), MAX_CACHED_ROWS)
        self.q_THQ = _random(num_rows, HEADS, NOPE + ROPE) / 14
        self.rows_LTC = _random(NUM_LAYERS, num_rows, RANK + ROPE)
        for cache, rows in zip(self.caches, self.rows_LTC, strict=True):
            rows[: len(self.own_slots)] = cache.flatten(0, 1)[self.own_slots]
        if is_fp8:
            stored = [quantise_mla_rows(cache.flatten(0, 1), RANK) for cache in self.caches]
            self.caches = torch.stack(stored).unflatten(1, self.caches.shape[1:3])
        self.expansion_LKC = _random(NUM_LAYERS, HEADS * (NOPE + VALUE), RANK) / RANK**0.5

    @staticmethod
    def _starts(lengths: list[int]) -> torch.Tensor:
        """With places of chunks that are not there."""
        padded = torch.tensor([0, *lengths] + [0] * (MAX_CHUNKS - len(lengths)))
        return padded.cumsum(0).to(device="cuda", dtype=torch.int32)

    def expand(self, tuning: ExpandTuning | None, layer: int) -> CachedRows:
        context = self.paged
        return expand_context(
            self.caches[layer],
            context.block_tables,
            context.start,
            self.expansion_LKC[layer],
            HEADS,
            context.max_rows,
            tuning,
        )

    def _own(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.rows_LTC[layer]
        key_value = functional.linear(rows[:, :RANK], self.expansion_LKC[layer])
        return key_value.unflatten(-1, (HEADS, -1)), rows[:, RANK:]

    def plain(self, layer: int) -> torch.Tensor:
        """As if nothing were cached."""
        return mla_prefill(self.q_THQ, *self._own(layer), Segments(self.new_start, self.new_start))

    def graph(
        self, tuning: PrefillTuning | None, expand: ExpandTuning | None, shares: int | None, layer: int
    ) -> torch.Tensor:
        cached = self.expand(expand, layer)
        segments = Segments(self.new_start, self.new_start)
        return mla_prefill(self.q_THQ, *self._own(layer), segments, tuning, cached=cached, shares=shares)

    def gather(self, layer: int) -> torch.Tensor:
        rows = self.caches[layer].flatten(0, 1).index_select(0, self.slots_L)
        key_value = functional.linear(rows[:, :RANK], self.expansion_LKC[layer]).unflatten(-1, (HEADS, -1))
        return mla_prefill(self.q_THQ, key_value, rows[:, RANK:], Segments(self.new_start, self.all_start))

    def absorbed(self, tuning: DecodeTuning, shares: int, layer: int) -> torch.Tensor:
        """Of one chunk; the number of its rows is a multiple of four."""
        tokens = tuning.max_heads // HEADS
        by_head = self.expansion_LKC[layer].unflatten(0, (HEADS, -1))
        q_THC = self.q_THQ.new_empty(self.num_rows, HEADS, RANK + ROPE)
        q_THC[..., RANK:] = self.q_THQ[..., NOPE:]
        absorbed_HTC = q_THC[..., :RANK].transpose(0, 1)
        torch.bmm(self.q_THQ[..., :NOPE].transpose(0, 1), by_head[:, :NOPE], out=absorbed_HTC)
        num_tiles = self.num_rows // tokens
        latent = mla_decode(
            q_THC.view(num_tiles, tokens * HEADS, -1),
            self.caches[layer],
            self.paged.block_tables[:1].expand(num_tiles, -1),
            self.paged.start[1:2].expand(num_tiles).contiguous(),
            RANK,
            shares=shares,
            tuning=tuning,
        )
        latent_HTC = latent.view(self.num_rows, HEADS, RANK).transpose(0, 1)
        return self.plain(layer) + torch.bmm(latent_HTC, by_head[:, NOPE:].transpose(1, 2)).transpose(0, 1)

    def reference(self, layer: int) -> torch.Tensor:
        """Chunk by chunk in float32; padding rows are 0."""
        out = torch.zeros(self.num_rows, HEADS, VALUE, device="cuda")
        all_rows = self.caches[layer].flatten(0, 1).index_select(0, self.slots_L).float()
        first = 0
        for rows, (cached, new) in zip(
            all_rows.split([cached + new for cached, new in self.chunks]), self.chunks, strict=True
        ):
            expanded = (rows[:, :RANK] @ self.expansion_LKC[layer].float().T).unflatten(-1, (HEADS, -1))
            q = self.q_THQ[first : first + new].float()
            scores = torch.einsum("thn,lhn->htl", q[..., :NOPE], expanded[..., :NOPE])
            scores += torch.einsum("thr,lr->htl", q[..., NOPE:], rows[:, RANK:])
            is_hidden = torch.ones(new, cached + new, device="cuda").triu(cached + 1).bool()
            probs = scores.masked_fill(is_hidden, -torch.inf).softmax(-1)
            out[first : first + new] = torch.einsum("htl,lhv->thv", probs, expanded[..., NOPE:])
            first += new
        return out


@dataclass(frozen=True, slots=True)
class Timed:
    us: float  # of one layer
    name: str


def _time_all(calls: dict[str, Callable[[int], object]]) -> list[Timed]:
    """Fastest first. A tiling that does not fit the chip is no result."""
    found = []
    for name, call in calls.items():
        try:
            seconds = graph_time([partial(call, layer) for layer in range(NUM_LAYERS)])
        except Exception as error:  # noqa: BLE001 - Triton's own, of the compiler or of the driver
            print(f"  {name} {type(error).__name__}: {str(error)[:80]}")
            continue
        found.append(Timed(1e6 * seconds, name))
    return sorted(found, key=lambda timed: timed.us)


def _check() -> None:
    mixed = [(0, 100), (700, 64), (1000, 1), (33, 200), (0, 0), (2048, 40)]
    for num_rows, chunks in ((64, [(3000, 60)]), (512, mixed), (2048, [*mixed, (4096, 1500)])):
        case = Case(chunks, num_rows)
        expected = case.reference(0)
        variants: dict[str, Callable[[int], torch.Tensor]] = {
            _prefill_name(tuning, shares): partial(case.graph, tuning, None, shares)
            for tuning, shares in itertools.product(PREFILL_TILINGS, (1, None))
        }
        variants |= {_expand_name(t): partial(case.graph, None, t, None) for t in EXPAND_TILINGS}
        for name, call in variants.items():
            try:
                found = call(0)
            except Exception as failure:  # noqa: BLE001 - as above
                print(f"  {name} {type(failure).__name__}: {str(failure)[:80]}")
                continue
            error = relative_error(found, expected)
            assert error < TOLERANCE, f"{num_rows} rows, {name}: error {error:.4f}"
        print(f"check {num_rows} rows, {len(chunks)} chunks: within {TOLERANCE}", flush=True)


def _check_replay() -> None:
    """A captured graph follows what it finds on the device: no context, and all of it again."""
    case = Case([(2000, 60), (0, 9), (40, 100)], 256)
    call = partial(case.graph, None, None, None, 0)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    start = case.paged.start.clone()
    for name, now, expected in (
        ("none", torch.zeros_like(start), case.plain(0)),
        ("all", start, case.reference(0)),
    ):
        case.paged.start.copy_(now)
        graph.replay()
        error = relative_error(found, expected)
        assert error < TOLERANCE, f"a graph replayed with context '{name}': error {error:.4f}"
    print("check of a replayed graph: follows the context", flush=True)


def _expand_name(t: ExpandTuning) -> str:
    return f"{t.num_rows}x{t.num_columns} warps {t.num_warps} stages {t.num_stages} programs {t.num_programs}"


def _prefill_name(t: PrefillTuning, shares: int | None) -> str:
    return f"{t.num_queries}x{t.num_keys} warps {t.num_warps} stages {t.num_stages} shares {shares}"


def _time_expansion() -> None:
    for length in LENGTHS:
        case = Case([(length, 64)], 64)
        flops = 2 * length * RANK * HEADS * (NOPE + VALUE)
        calls = {_expand_name(t): partial(case.expand, t) for t in EXPAND_TILINGS}
        fp8 = Case([(length, 64)], 64, is_fp8=True)
        calls["the default, of a cache in FP8"] = partial(fp8.expand, None)
        found = _time_all(calls)
        print(f"expansion of {length}")
        for timed in found:
            print(f"  {timed.us:8.1f} us {flops / timed.us / 1e6:4.0f} TFLOP/s {timed.name}", flush=True)


def _time_forms(num_tokens: int, length: int) -> None:
    case = Case([(length, num_tokens)], num_tokens)
    pairs = num_tokens * length + num_tokens**2 // 2
    flops = 2 * HEADS * (pairs * (NOPE + ROPE + VALUE) + (length + num_tokens) * RANK * (NOPE + VALUE))
    graph = _time_all(
        {
            _prefill_name(tuning, shares): partial(case.graph, tuning, None, shares)
            for tuning in PREFILL_TILINGS
            for shares in sorted({1, max_shares(num_tokens), min(8, 2 * max_shares(num_tokens))})
        }
    )
    own = _prefill_name(PREFILL_TILINGS[0], max_shares(num_tokens))
    gather = _time_all({"gather": case.gather})
    absorbed = _time_all(
        {
            f"absorbed rows {tuning.num_rows} shares {shares}": partial(case.absorbed, tuning, shares)
            for tuning in ABSORBED_TILINGS
            for shares in {max(1, min(32, 4 * 132 // num_tokens)), max(1, min(32, 8 * 132 // num_tokens))}
        }
    )
    print(f"{num_tokens} tokens behind {length}")
    for timed in [*graph[:2], *(entry for entry in graph[2:] if entry.name == own), *gather, *absorbed[:1]]:
        print(f"  {timed.us:8.1f} us {flops / timed.us / 1e6:4.0f} TFLOP/s {timed.name}", flush=True)


def _time_no_context() -> None:
    """What a graph pays where nothing is cached, beside the form that cannot have it."""
    for num_tokens in NUM_TOKENS:
        case = Case([(0, num_tokens)], num_tokens)
        found = _time_all({"plain": case.plain, "graph": partial(case.graph, None, None, None)})
        times = ", ".join(f"{timed.name} {timed.us:.1f} us" for timed in found)
        print(f"{num_tokens} tokens, nothing cached: {times}", flush=True)


def time_contexts() -> None:
    _check()
    _check_replay()
    _time_no_context()
    _time_expansion()
    for num_tokens, length in itertools.product(NUM_TOKENS, LENGTHS):
        _time_forms(num_tokens, length)
