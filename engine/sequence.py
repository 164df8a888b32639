"""A request inside one engine: tokens, blocks and how far the cache has caught up with them."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from engine.grammar.matcher import GrammarMatcher
from engine.kv_load import KvSource, LoadedPrefix, SequenceLoad
from engine.outputs import FinishReason, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.speculation.draft_state import DraftState
from kvstore.block_hash import BlockHash, HashChain

if TYPE_CHECKING:
    from engine.kv_cache import KvCache


class KvListener(Protocol):
    """Hears when KV of one sequence is final. Called on the engine thread, between or during forward passes,
    or, when the KV is copied off a device, on one other thread, perhaps after the output; it must return at
    once and must not raise (what it raises is a failed step)."""

    def started(self, num_blocks: int, num_hit_tokens: int, queue_s: float, origin: KvCache) -> None:
        """First scheduled; a keeps_blocks sequence now has all its blocks and is never preempted. Block ids
        of kv_ready() are those of `origin`: the engine's cache, or copies of it in host memory."""
        ...

    def kv_ready(self, first_layer: int, num_layers: int, first_block: int, block_ids: list[int]) -> None:
        """These bytes are in the cache and do not change until release() or abort(). Each block is announced
        once for each layer: the cached prefix right after started(), the partial last block with the last
        chunk."""
        ...


class SequenceStatus(enum.Enum):
    NEW = enum.auto()  # not yet the engine's
    WAITING = enum.auto()  # added, or preempted: holds no block
    RUNNING = enum.auto()  # holds all blocks of its tokens
    RESERVED = enum.auto()  # receiving side of a hand-off: holds its cached prefix
    EXTENDED = enum.auto()  # reserved, and holds all blocks of its prompt
    KEPT = enum.auto()  # finished, holds its blocks for the receiving side


@dataclass(slots=True)
class SequenceTimes:
    """Monotonic seconds of this process."""

    added: float = 0.0
    scheduled: float | None = None  # for the first time
    first_token: float | None = None


@dataclass(slots=True)
class PrefixHashes:
    """Hashes of a sequence's full blocks, computed as far as somebody asked."""

    chain: HashChain
    cache_salt: str
    tenant: str = ""
    hashes: list[BlockHash] = field(default_factory=list)

    @property
    def root(self) -> BlockHash:
        """The parent of the first block."""
        return self.chain.root(self.cache_salt, self.tenant)

    def upto(self, num_blocks: int, token_ids: array[int]) -> list[BlockHash]:
        """At least num_blocks hashes; all those blocks must be full of tokens."""
        size = self.chain.block_size
        while len(self.hashes) < num_blocks:
            parent = self.hashes[-1] if self.hashes else self.root
            start = len(self.hashes) * size
            self.hashes.append(self.chain.child(parent, token_ids[start : start + size]))
        return self.hashes


class Sequence:
    """num_computed_tokens catches up with len(token_ids); then a token is sampled and appended. Where steps
    are launched ahead of each other both run before what the host knows: tokens of a launched step count as
    computed, and the one that it samples is pending until it is read.

    The caller makes it and hands it to the engine, which owns it from then on.
    """

    __slots__ = (
        "arrival",
        "block_table",
        "cache_salt",
        "draft",
        "has_emitted",
        "has_started",
        "keeps_blocks",
        "kv_listener",
        "kv_source",
        "load",
        "loaded",
        "matcher",
        "max_output_tokens",
        "num_computed_tokens",
        "num_hit_tokens",
        "num_pending_tokens",
        "num_prompt_tokens",
        "num_registered_blocks",
        "outbox_slots",
        "prefix",
        "priority",
        "prompt_logprobs",
        "sampling",
        "seq_id",
        "status",
        "tenant",
        "times",
        "token_ids",
    )

    def __init__(  # noqa: PLR0913 - most of them are rare and keyword-only
        self,
        seq_id: int,
        prompt_ids: Iterable[int],
        sampling: SamplingParams,
        *,
        output_ids: Iterable[int] = (),
        cache_salt: str = "",
        tenant: str = "",
        priority: int = 0,
        keeps_blocks: bool = False,
        kv_listener: KvListener | None = None,
        kv_source: KvSource | None = None,
        matcher: GrammarMatcher | None = None,
    ) -> None:
        """output_ids were generated elsewhere and count against max_tokens. A keeps_blocks sequence ends with
        its next token, whatever max_tokens says, and holds its blocks until release() or abort(). `priority`:
        the smaller, the earlier it is served."""
        self.seq_id = seq_id
        self.status = SequenceStatus.NEW
        self.sampling = sampling
        self.cache_salt = cache_salt
        self.tenant = tenant
        self.priority = priority
        self.keeps_blocks = keeps_blocks
        self.kv_listener = kv_listener
        self.kv_source = kv_source  # a peer that holds leading blocks
        self.matcher = matcher  # of sampling.grammar
        self.load: SequenceLoad | None = None  # blocks are on their way; nothing behind them is computed
        self.loaded = LoadedPrefix()
        self.token_ids: array[int] = array("q", prompt_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.token_ids.extend(output_ids)
        self.max_output_tokens = self.num_output_tokens + 1 if keeps_blocks else sampling.max_tokens
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0  # sampled by steps that nobody has read yet
        self.num_hit_tokens = 0
        self.block_table: list[int] = []
        self.outbox_slots: range | None = None  # of its blocks' copies in the outbox
        self.num_registered_blocks = 0  # leading blocks that the prefix cache knows, or was offered
        self.draft = DraftState()
        self.prefix: PrefixHashes | None = None  # set when the engine takes the sequence
        self.arrival = 0  # order of joining the engine; the largest is the youngest
        self.has_started = False  # was scheduled at least once
        self.has_emitted = False  # a token was sampled or committed here
        self.prompt_logprobs: list[TokenLogprobs] = []  # of prompt tokens 1, 2, ... as far as computed
        self.times = SequenceTimes()

    @property
    def precedence(self) -> tuple[int, int]:
        """The smallest is served first and loses its blocks last: by priority, then by arrival."""
        return self.priority, self.arrival

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :].tolist()

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens, the pending one too, whose KV is not computed yet; sampling needs them all."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Such a sequence takes no prefix hit: the logits of every prompt token are needed."""
        no_token_yet = not self.has_emitted and self.num_output_tokens == 0
        return self.sampling.num_prompt_logprobs is not None and no_token_yet

    def restart(self) -> None:
        """Forget everything computed; the tokens stay. The caller has released the blocks."""
        self.block_table = []
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_registered_blocks = 0
        self.draft = DraftState()
        self.prompt_logprobs = []

    def finish_reason_after(self, eos_token_ids: frozenset[int], max_model_len: int) -> FinishReason | None:
        """Judges the newest token."""
        last = self.token_ids[-1]
        sampling = self.sampling
        if self.matcher is not None and self.matcher.is_open and last in eos_token_ids:
            return FinishReason.STOP  # drawn only where nothing else could follow, or where it may be drawn
        if self.num_output_tokens >= sampling.min_tokens:
            if last in sampling.stop_token_ids or (not sampling.ignore_eos and last in eos_token_ids):
                return FinishReason.STOP
        if self.num_output_tokens >= self.max_output_tokens or self.num_tokens >= max_model_len:
            return FinishReason.LENGTH
        return None
