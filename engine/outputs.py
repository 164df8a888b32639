"""What one engine step made."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.grammar.step_masks import GrammarTimes
from kvstore.block_hash import BlockHash, BlockTier

if TYPE_CHECKING:
    from engine.speculation.handed_draft import HandedDraft


class FinishReason(enum.Enum):
    STOP = "stop"  # end-of-sequence or stop token id
    LENGTH = "length"  # max_tokens or the model's longest context
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Under the model's own distribution: before penalties, temperature and truncation."""

    token_id: int
    logprob: float
    top_token_ids: tuple[int, ...] = ()  # likeliest first
    top_logprobs: tuple[float, ...] = ()


@dataclass(slots=True, kw_only=True)  # one a token: to make a frozen one takes seven times as long
class SequenceOutput:
    """New tokens, or the end, of one sequence. Nobody changes it.

    After a finish_reason the engine has forgotten seq_id, unless the sequence was added with keeps_blocks:
    then its blocks stay until release().
    """

    seq_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each token id, or none
    finish_reason: FinishReason | None = None
    error: str | None = None  # why the sequence cannot go on, with ABORTED: the request's own fault
    num_hit_tokens: int = 0  # set with the first token
    queue_s: float = 0.0  # added -> first scheduled; set with the first token
    prefill_s: float = 0.0  # first scheduled -> first token sampled; set with the first token
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # set with the first token: of prompt tokens 1, 2, ...
    num_loaded_tokens: int = 0  # of num_hit_tokens: from host memory or disk; set with the first token
    num_fetched_tokens: int = 0  # of num_hit_tokens: from a peer; set with the first token
    load_s: float = 0.0  # first scheduled -> the last of those was there; set with the first token
    draft: HandedDraft | None = None  # of a keeps_blocks sequence, for the engine that goes on with it


@dataclass(frozen=True, slots=True)
class BlockEvents:
    """Changes of this worker's prefix cache, for the prefix index. A hash is named at most once."""

    placed: tuple[tuple[BlockHash, BlockTier], ...] = ()  # with the fastest tier where it is now
    removed: tuple[BlockHash, ...] = ()  # in no tier any more


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """Of host memory or disk. free + cached + used = what fits."""

    tier: BlockTier
    num_free_blocks: int
    num_cached_blocks: int
    num_used_blocks: int  # being read or written
    block_bytes: int
    num_lost_blocks: int  # since the start, of all lower tiers: gone before they were saved
    load_bytes_per_s: float = 0.0  # as measured; 0: nothing was loaded yet
    load_latency_s: float = 0.0


class LoadOutcome(enum.Enum):
    COMPLETE = "complete"  # the source brought all blocks
    MET = "met"  # compute had some of them first
    FAILED = "failed"  # the source gave up; compute had the rest
    DROPPED = "dropped"  # the sequence was aborted or preempted


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStats:
    """One load that has ended."""

    tier: BlockTier | None  # the slowest that it read; None: a peer
    outcome: LoadOutcome
    num_blocks: int  # that it brought
    load_s: float


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Drafts that a step checked."""

    num_drafts: int = 0  # sequences that had any
    num_draft_tokens: int = 0
    num_accepted_at: tuple[int, ...] = ()  # accepted tokens by place in the draft

    @property
    def num_accepted_tokens(self) -> int:
        return sum(self.num_accepted_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    num_prefill_tokens: int  # computed in this step
    num_decode_tokens: int  # of decoding sequences, one each: without drafts
    num_running: int
    num_waiting: int  # added but not scheduled, or preempted
    num_waiting_tokens: int  # still to compute for the sequences not yet past their prompt
    num_free_blocks: int  # free and not cached
    num_cached_blocks: int  # unused, kept for prefix hits
    num_used_blocks: int  # owned by sequences or reservations
    num_preemptions: int  # in this step
    num_hit_tokens: int  # prompt tokens of sequences first scheduled in this step that came from the cache,
    # and those that loads brought meanwhile
    num_queried_tokens: int  # prompt tokens of those sequences
    step_s: float
    ended_at: float = 0.0  # monotonic
    listened_s: float = 0.0  # beside it, before the step behind it was planned
    kept_device_waiting: bool = False  # it ended before that one was launched
    is_idle_step: bool = False
    grammar: GrammarTimes = field(default_factory=GrammarTimes)
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    expert_load: tuple[tuple[int, ...], ...] = ()  # [moe layer][logical expert] tokens routed in this step
    tiers: tuple[TierStats, ...] = ()  # below the device
    loads: tuple[LoadStats, ...] = ()  # that ended in this step, or since the last one


@dataclass(frozen=True, slots=True)
class StepOutput:
    outputs: list[SequenceOutput]
    stats: StepStats
    block_events: BlockEvents = field(default_factory=BlockEvents)
