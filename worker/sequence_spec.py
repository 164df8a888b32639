"""From a SequenceSpec on the wire to a Sequence of the engine."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from engine.engine import Engine
from engine.grammar.matcher import GrammarMatcher
from engine.kv_load import KvSource
from engine.sampling_params import SamplingParams
from engine.sequence import KvListener, PrefixHashes, Sequence
from proto.common_pb2 import SequenceSpec
from servicekit.errors import InvalidRequest
from servicekit.rpc import MAX_MESSAGE_BYTES
from worker.async_engine import AsyncEngine
from worker.conversions import sampling_from_pb
from worker.grammars import build_matcher

_LOGPROB_BYTES = 12  # of one token id and its logprob on the wire, at most


async def decode_sequence(
    engine: AsyncEngine, spec_pb: SequenceSpec, kv_source: KvSource | None = None
) -> Sequence:
    """Raises InvalidRequest."""
    sampling = checked_sampling(spec_pb)
    return _build(engine, spec_pb, sampling, await build_matcher(engine, spec_pb), kv_source)


async def prefill_sequence(
    engine: AsyncEngine, spec_pb: SequenceSpec, kv_listener: KvListener, kv_source: KvSource | None = None
) -> Sequence:
    """A sequence that ends with its next token and keeps its blocks. Raises InvalidRequest."""
    sampling = replace(checked_sampling(spec_pb), max_tokens=len(spec_pb.output_ids) + 1)
    matcher = await build_matcher(engine, spec_pb)
    return _build(engine, spec_pb, sampling, matcher, kv_source, kv_listener)


def checked_sampling(spec_pb: SequenceSpec) -> SamplingParams:
    """Raises InvalidRequest for what no engine can run or no message can carry."""
    sampling = sampling_from_pb(spec_pb.sampling)
    if len(spec_pb.output_ids) >= sampling.max_tokens:
        raise InvalidRequest(
            f"max_tokens is {sampling.max_tokens} and {len(spec_pb.output_ids)} tokens are already there"
        )
    if sampling.num_prompt_logprobs is not None:
        num_prompt_tokens = len(spec_pb.prompt_ids)
        num_entries = num_prompt_tokens * (sampling.num_prompt_logprobs + 2)
        if num_entries * _LOGPROB_BYTES > MAX_MESSAGE_BYTES // 2:
            raise InvalidRequest(
                f"{sampling.num_prompt_logprobs} logprobs for each of {num_prompt_tokens} prompt tokens are "
                "too many; ask for fewer",
                param="prompt_logprobs",
            )
    return sampling


def num_prompt_blocks(spec_pb: SequenceSpec, block_size: int) -> int:
    """Blocks of the tokens whose KV a prefill worker computes."""
    return -(-(len(spec_pb.prompt_ids) + len(spec_pb.output_ids)) // block_size)


def add_sequence(engine: Engine, seq: Sequence) -> None:
    """Raises InvalidRequest for a sequence that this engine can never run."""
    try:
        engine.add(seq)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def reserve_sequence(engine: Engine, seq: Sequence) -> int:
    """Blocks already held. Raises InvalidRequest for a sequence that this engine can never run."""
    try:
        return engine.reserve(seq)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def _build(
    engine: AsyncEngine,
    spec_pb: SequenceSpec,
    sampling: SamplingParams,
    matcher: GrammarMatcher | None,
    kv_source: KvSource | None,
    kv_listener: KvListener | None = None,
) -> Sequence:
    seq = Sequence(
        engine.next_seq_id(),
        _token_array(spec_pb.prompt_ids),
        sampling,
        output_ids=tuple(spec_pb.output_ids),
        cache_salt=spec_pb.cache_salt,
        tenant=spec_pb.tenant,
        priority=spec_pb.priority,
        keeps_blocks=kv_listener is not None,
        kv_listener=kv_listener,
        kv_source=kv_source,
        matcher=matcher,
    )
    # Here, because between two steps of the engine thread everybody would wait for it.
    chain = engine.engine.hash_chain
    tokens_u32 = array("I", np.asarray(seq.token_ids).astype(np.uint32).tobytes())
    hashes = chain.hashes(tokens_u32, seq.cache_salt, seq.tenant)
    seq.prefix = PrefixHashes(chain, seq.cache_salt, seq.tenant, hashes)
    return seq


def _token_array(token_ids_pb: Iterable[int]) -> array[int]:
    """As the array that a Sequence keeps, without an int for each token."""
    token_ids: array[int] = array("q")
    token_ids.frombytes(np.array(token_ids_pb, dtype=np.int64).tobytes())
    return token_ids
