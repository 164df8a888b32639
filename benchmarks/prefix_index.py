"""The prefix index: how long a lookup takes, what a block costs, how fast changes and snapshots are.

    python -m benchmarks.prefix_index [--quick]

Prompts have 100,000 tokens: 6,250 blocks of 16. Each case fills an index in a process of its own, so that its
memory can be told, and looks up sampled prompts twice with hashes made anew: the first time as the blocks
came, then over the runs that the first lookup left. Every lookup is a full hit of one worker at least. Then
the way through Redis: one worker writes, a mirror follows, that of a new router starts from a snapshot, which
brings blocks in no order and puts them in order by their places.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import psutil

from benchmarks.results_file import table, write_result
from kvstore import keys
from kvstore.block_hash import HASH_SIZE_BYTES, BlockHash, BlockTier, HashChain
from kvstore.block_order import ScannedBlocks, place_bytes
from kvstore.embedded import EmbeddedServer
from kvstore.index_mirror import IndexMirror
from kvstore.memory_index import MemoryIndex, Replacement
from kvstore.redis_index import RedisIndex
from kvstore.store import Store

NUM_TOKENS, BLOCK_SIZE = 100_000, 16
NUM_PROMPT_BLOCKS = NUM_TOKENS // BLOCK_SIZE
NUM_SAMPLES = 60  # prompts looked up
COLUMNS = (
    "blocks",
    "workers",
    "arrival",
    "bytes a block",
    "applied, 1/us",
    "first lookup p50 ms",
    "lookup p50 ms",
    "lookup max ms",
    "drop ms",
    "longest piece ms",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    num_prompts: int
    num_workers: int
    arrival: str  # a key of ARRIVALS


Piece = tuple[int, list[BlockHash], BlockTier]  # what one event says: worker, blocks, where they are now


def prompt_hashes(prompt: int) -> list[BlockHash]:
    """The same for the same number, as new objects."""
    raw = random.Random(prompt).randbytes(NUM_PROMPT_BLOCKS * HASH_SIZE_BYTES)
    return [BlockHash(raw[i : i + HASH_SIZE_BYTES]) for i in range(0, len(raw), HASH_SIZE_BYTES)]


def in_steps(case: Case, num_blocks: int = 128) -> Iterator[Piece]:
    """One prompt after the other at each worker, so many blocks an event."""
    for prompt in range(case.num_prompts):
        for worker in range(case.num_workers):
            yield from pieces(worker, prompt_hashes(prompt), num_blocks)


def one_by_one(case: Case) -> Iterator[Piece]:
    return in_steps(case, num_blocks=1)


def as_a_snapshot(case: Case) -> Iterator[Piece]:
    """As a mirror takes it from Redis: scanned in no order, put in order by place."""
    for worker in range(case.num_workers):
        scanned, place = ScannedBlocks(), 0
        for first in range(0, case.num_prompts, 10):  # of so many prompts at a time no order is left
            several = range(first, min(first + 10, case.num_prompts))
            hashes = [block_hash for prompt in several for block_hash in prompt_hashes(prompt)]
            found = [(block_hash, b"0" + place_bytes(place + i)) for i, block_hash in enumerate(hashes)]
            random.Random(first).shuffle(found)
            place += len(found)
            for start in range(0, len(found), 1000):
                scanned.add(dict(found[start : start + 1000]))
        for batch in scanned.batches():
            for tier, ordered in batch:
                yield worker, ordered, tier


def in_parts(case: Case) -> Iterator[Piece]:
    """The first worker has all of each prompt, the others its beginning; then ends go to slower tiers."""
    for prompt in range(case.num_prompts):
        draw = random.Random(-prompt)
        for worker in range(case.num_workers):
            hashes = prompt_hashes(prompt)
            length = draw.randint(1, len(hashes)) if worker else len(hashes)
            on_device, on_host = sorted(draw.choices(range(length), k=2))
            yield from pieces(worker, hashes[:length], 128)
            yield worker, hashes[on_host:length], BlockTier.DISK
            yield worker, hashes[on_device:on_host], BlockTier.HOST


def in_stripes(case: Case) -> Iterator[Piece]:
    """Every other 16 blocks are in host memory."""
    for worker, hashes, _ in in_steps(case):
        for start in range(0, len(hashes), 16):
            yield worker, hashes[start : start + 16], BlockTier(start // 16 % 2)


def pieces(worker: int, hashes: list[BlockHash], num_blocks: int) -> Iterator[Piece]:
    for start in range(0, len(hashes), num_blocks):
        yield worker, hashes[start : start + num_blocks], BlockTier.DEVICE


SNAPSHOT = "snapshot"
ARRIVALS: dict[str, Callable[[Case], Iterator[Piece]]] = {
    "steps of 2,048 tokens": in_steps,
    "parts and tiers differ": in_parts,
    "tier changes every 16 blocks": in_stripes,
    "one by one": one_by_one,
    SNAPSHOT: as_a_snapshot,
}


def cases(is_quick: bool) -> Iterator[Case]:
    million = 16 if is_quick else 160  # prompts
    for num_workers in (1, 4, 16):
        yield Case(num_prompts=million, num_workers=num_workers, arrival="steps of 2,048 tokens")
    yield Case(num_prompts=16, num_workers=128, arrival="steps of 2,048 tokens")
    for arrival in list(ARRIVALS)[1:]:
        yield Case(num_prompts=million, num_workers=4, arrival=arrival)


def run_case(case: Case) -> dict[str, Any]:
    """In a process of its own. Times are of the processor, so that neighbours do not count."""
    samples = random.Random(0).sample(range(case.num_prompts), min(NUM_SAMPLES, case.num_prompts))
    before = psutil.Process().memory_info().rss
    index = MemoryIndex()
    num_applied, filling_s = fill(index, case)
    num_bytes = psutil.Process().memory_info().rss - before
    num_blocks = index.num_blocks
    first_s = [lookup_s(index, prompt) for prompt in samples]
    later_s = [lookup_s(index, prompt) for prompt in samples]
    pieces_s = [elapsed_s(lambda: index.drop("worker-0"))]
    pieces_s += [elapsed_s(index.sweep) for _ in range(256)]
    assert not index.sweep()
    values = (
        num_blocks,
        case.num_workers,
        case.arrival,
        round(num_bytes / num_blocks),
        num_applied / filling_s / 1e6,
        median(first_s) * 1e3,
        median(later_s) * 1e3,
        max(later_s) * 1e3,
        sum(pieces_s) * 1e3,
        max(pieces_s) * 1e3,
    )
    return dict(zip(COLUMNS, values, strict=True))


def fill(index: MemoryIndex, case: Case) -> tuple[int, float]:
    """How many changes of a block at a worker were applied, and the seconds that took."""
    num_applied, seconds = 0, 0.0
    replacements: dict[int, Replacement] = {}
    for worker, hashes, tier in ARRIVALS[case.arrival](case):
        worker_id = f"worker-{worker}"
        began = time.thread_time()
        if case.arrival == SNAPSHOT:
            if worker not in replacements:
                replacements[worker] = index.replace(worker_id)
            replacements[worker].publish(hashes, tier)
        else:
            index.publish(worker_id, hashes, tier)
        seconds += time.thread_time() - began
        num_applied += len(hashes)
    for replacement in replacements.values():
        replacement.show()
    return num_applied, seconds


def lookup_s(index: MemoryIndex, prompt: int) -> float:
    hashes = prompt_hashes(prompt)
    began = time.thread_time()
    hits = index.lookup(hashes)
    seconds = time.thread_time() - began
    assert hits[0].num_blocks == NUM_PROMPT_BLOCKS
    return seconds


def elapsed_s(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


class Stalls:
    """The longest time that an event loop was held, from start() to stop(), in seconds of the processor."""

    def start(self) -> None:
        self._longest_s = 0.0
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> float:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        return self._longest_s

    async def _watch(self) -> None:
        while True:
            began = time.thread_time()
            await asyncio.sleep(0)
            self._longest_s = max(self._longest_s, time.thread_time() - began)


async def through_redis(url: str, num_prompts: int) -> list[str]:
    """What one worker with this many prompts, in three tiers, costs in Redis and at a router."""
    store = Store(url)
    shown, of_new_router = MemoryIndex(), MemoryIndex()
    mirror = IndexMirror(store, "bench", shown)
    writer = RedisIndex(store, "bench", "worker-0", "first", lease_s=600.0)
    writer.start()
    await writer.flush()
    await mirror.catch_up()
    empty_bytes = (await store.redis.info("memory"))["used_memory"]
    for prompt in range(num_prompts):
        writer.publish(prompt_hashes(prompt), BlockTier(prompt % len(BlockTier)))
    num_blocks = writer.num_pending
    facts = [f"Redis, {num_blocks} blocks of one worker:"]

    async def timed(what: str, work: Any) -> None:
        stalls = Stalls()
        stalls.start()
        began = time.perf_counter()
        await work()
        seconds = time.perf_counter() - began
        longest_ms = await stalls.stop() * 1e3
        rate = num_blocks / seconds / 1e3
        facts.append(
            f"{what}: {seconds:.2f} s, {rate:.0f} blocks/ms, loop held for {longest_ms:.1f} ms at most"
        )

    await timed("written", writer.flush)
    await timed("events applied by a mirror that follows", mirror.catch_up)
    await timed("snapshot by a new router", IndexMirror(store, "bench", of_new_router).catch_up)
    assert shown.tiers("worker-0") == of_new_router.tiers("worker-0")
    first_ms = [lookup_s(of_new_router, prompt) * 1e3 for prompt in range(0, num_prompts, 3)]
    facts.append(
        f"first lookups of {len(first_ms)} prompts after that snapshot: median {median(first_ms):.3f} ms, "
        f"longest {max(first_ms):.3f}"
    )
    facts.append(await redis_memory(store, num_blocks, empty_bytes))
    await writer.stop()
    await timed("leaving, at a mirror", mirror.catch_up)
    assert shown.num_blocks == 0
    await store.close()
    return facts


async def redis_memory(store: Store, num_blocks: int, empty_bytes: int) -> str:
    events_key = keys.index_events("bench")
    num_events = await store.redis.xlen(events_key)
    stream_bytes = await store.redis.memory_usage(events_key, samples=0)
    blocks_key = keys.worker_blocks("bench", "worker-0", "first")
    blocks_bytes = await store.redis.memory_usage(blocks_key, samples=0)
    used_bytes = (await store.redis.info("memory"))["used_memory"] - empty_bytes
    worst_mb = stream_bytes / num_events * keys.MAX_STREAM_EVENTS / 1e6
    return (
        f"its blocks {blocks_bytes / num_blocks:.1f} bytes each, all memory of Redis without the stream "
        f"{(used_bytes - stream_bytes) / num_blocks:.1f}; stream {stream_bytes / 1e6:.1f} MB in {num_events} "
        f"events of up to {keys.MAX_EVENT_HASHES} blocks, so {worst_mb:.0f} MB when it is full of such"
    )


def hashing() -> str:
    chain = HashChain(model_fingerprint="bench", block_size=BLOCK_SIZE)
    token_ids = random.Random(0).choices(range(128_000), k=NUM_TOKENS)
    hashing_s = median([elapsed_s(lambda: chain.hashes(token_ids)) for _ in range(20)])
    return f"hashing a prompt of {NUM_TOKENS} tokens: {hashing_s * 1e3:.2f} ms (median of 20)"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix_index", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a tenth of the blocks, no result file")
    is_quick = parser.parse_args().quick
    notes = [hashing()]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = list(pool.map(run_case, cases(is_quick)))
    server = EmbeddedServer()
    try:
        notes += asyncio.run(through_redis(server.start(), 16 if is_quick else 160))
    finally:
        server.stop()
    print("\n".join([*notes, *table(COLUMNS, rows)]))
    if not is_quick:
        title = f"Prefix index: lookups of {NUM_TOKENS} tokens, memory, changes"
        print(write_result("prefix-index", title, COLUMNS, rows, notes))


if __name__ == "__main__":
    main()
