"""Bringing a cached prefix from a slower place while its front is computed, until both meet.

Source: "Compute or Load KV Cache? Why Not Both?" (Cake), arXiv 2410.03065.

A run of blocks [first_block, end_block) of one sequence is shared out between two sides:

    first_block          front              back               end_block
        |  compute's       |   nobody's yet   |   the source's     |

The engine moves `front` up before it computes blocks, the source moves `back` down before it writes blocks,
so no block is ever written by both. When front == back and every claimed block is there, the sequence goes
on behind end_block. A source that fails gives what it claimed and did not write back to compute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvstore.block_hash import BlockTier


class KvSource(Protocol):
    """A place that holds leading blocks of one sequence; made for that sequence and used once."""

    num_blocks: int  # it has blocks [0, num_blocks) of the sequence, as far as it knows
    tier: BlockTier | None  # None: a peer

    def estimate_s(self, num_blocks: int) -> float:
        """Seconds to bring that many blocks, from measured rates."""
        ...

    def start(self, load: KvLoad) -> None:
        """Begin to bring [load.first_block, load.end_block), last blocks first. On the engine thread; returns
        at once. From then on the source ends the load exactly once, from any thread: by claim() returning an
        empty range with nothing outstanding, or by fail()."""
        ...


class KvLoad:
    """Thread-safe. `on_change` is called, on the thread of the caller and outside the lock, whenever the
    engine may be able to go on: a claim was completed or the load failed."""

    def __init__(self, first_block: int, block_ids: list[int], on_change: Callable[[], None]) -> None:
        """block_ids: of the run, where its blocks are in this worker's cache."""
        assert block_ids
        self.first_block = first_block
        self.end_block = first_block + len(block_ids)
        self._block_ids = block_ids
        self._on_change = on_change
        self._lock = threading.Lock()
        self._front = first_block
        self._back = self.end_block
        self._outstanding: set[range] = set()  # claimed, not complete
        self._is_open = True  # the source may claim
        self.failure: str | None = None

    # the source's side

    def shorten(self, end_block: int) -> None:
        """Before the first claim: the source has only the blocks before this one. What is behind them is not
        part of the load any more."""
        with self._lock:
            assert self._back == self.end_block, "shortened after a claim"
            if end_block < self.end_block:
                self.end_block = self._back = max(self._front, end_block)
        self._on_change()

    def claim(self, first_block: int) -> range:
        """The blocks from `first_block` up to what was claimed before, without those that compute has: the
        caller may write them, and must complete() exactly that range or fail(). Empty: stop."""
        with self._lock:
            if not self._is_open:
                return range(0)
            claimed = range(max(first_block, self._front), self._back)
            if claimed:
                self._back = claimed.start
                self._outstanding.add(claimed)
            return claimed

    def block_ids(self, blocks: range) -> list[int]:
        """Where these blocks of the sequence are in the cache."""
        return self._block_ids[blocks.start - self.first_block : blocks.stop - self.first_block]

    def complete(self, claimed: range) -> None:
        """The contents are in the cache, and verified."""
        with self._lock:
            self._outstanding.remove(claimed)
        self._on_change()

    def fail(self, reason: str) -> None:
        """Nothing more comes and nothing is being written; claimed and incomplete blocks go back to
        compute, with everything in front of them. Idempotent."""
        with self._lock:
            if self.failure is None and (self._is_open or self._outstanding):
                self.failure = reason
            self._is_open = False
            if self._outstanding:
                # Blocks behind the last incomplete one are good; those before it may not be.
                self._back = max(blocks.stop for blocks in self._outstanding)
                self._outstanding.clear()
        self._on_change()

    # the engine's side

    def advance(self, num_blocks: int) -> int:
        """Compute takes up to num_blocks more; how many it got."""
        with self._lock:
            taken = min(num_blocks, self._back - self._front)
            self._front += taken
            return taken

    def close(self) -> bool:
        """The engine wants nothing more. False: the source is still writing, and will call on_change when it
        no longer is; until then the blocks must not be given to anybody."""
        with self._lock:
            self._is_open = False
            return not self._outstanding

    @property
    def needs_engine(self) -> bool:
        """Whether the engine can do anything about it: it has met, failed or been closed."""
        with self._lock:
            return not self._is_open or (self._front >= self._back and not self._outstanding)

    def writing_ids(self) -> list[int]:
        """After close(): where the source may still be writing."""
        with self._lock:
            return [block_id for blocks in self._outstanding for block_id in self.block_ids(blocks)]

    @property
    def num_open_blocks(self) -> int:
        """Nobody's yet."""
        with self._lock:
            return max(0, self._back - self._front)

    @property
    def front(self) -> int:
        """Compute has, or is computing, the blocks before this one."""
        return self._front

    @property
    def num_loaded_blocks(self) -> int:
        """How many the source has claimed; once is_met, how many it brought."""
        return self.end_block - self._back

    @property
    def is_met(self) -> bool:
        """Every block of the run is the source's and there, or compute's."""
        with self._lock:
            return self._front >= self._back and not self._outstanding


@dataclass(frozen=True, slots=True)
class SequenceLoad:
    """What a sequence waits for."""

    load: KvLoad
    source: KvSource
    began: float  # monotonic seconds


@dataclass(frozen=True, slots=True)
class LoadedPrefix:
    """What a sequence got."""

    num_loaded_tokens: int = 0  # from this worker's lower tiers
    num_fetched_tokens: int = 0  # from a peer
    load_s: float = 0.0
