"""Protobuf to dataclass and back, for what both kinds of worker say."""

from __future__ import annotations

from collections.abc import Iterable

from engine.grammar.grammar import Grammar, GrammarKind
from engine.kv_layout import KvLayout
from engine.outputs import FinishReason, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.speculation.handed_draft import HandedDraft
from proto import common_pb2, prefill_pb2
from servicekit.errors import HandoffFailed, InvalidRequest, Overloaded, ServingError, WorkerLost

_FINISH_REASONS = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: common_pb2.FINISH_REASON_ABORTED,
}
_GRAMMAR_KINDS = {
    common_pb2.GRAMMAR_KIND_JSON_SCHEMA: GrammarKind.JSON_SCHEMA,
    common_pb2.GRAMMAR_KIND_JSON_OBJECT: GrammarKind.JSON_OBJECT,
    common_pb2.GRAMMAR_KIND_REGEX: GrammarKind.REGEX,
    common_pb2.GRAMMAR_KIND_EBNF: GrammarKind.EBNF,
    common_pb2.GRAMMAR_KIND_LARK: GrammarKind.LARK,
    common_pb2.GRAMMAR_KIND_CHOICE: GrammarKind.CHOICE,
}
_ERROR_KINDS = (
    (InvalidRequest, common_pb2.ERROR_KIND_INVALID_REQUEST),
    (Overloaded, common_pb2.ERROR_KIND_OVERLOADED),
    (WorkerLost, common_pb2.ERROR_KIND_WORKER_LOST),
    (HandoffFailed, common_pb2.ERROR_KIND_HANDOFF_FAILED),
    (ServingError, common_pb2.ERROR_KIND_INTERNAL),
)


def sampling_from_pb(sampling_pb: common_pb2.SamplingParams) -> SamplingParams:
    """Raises InvalidRequest, naming the parameter that is out of range."""
    has_logprobs = sampling_pb.HasField("num_logprobs")
    has_prompt_logprobs = sampling_pb.HasField("num_prompt_logprobs")
    try:
        return SamplingParams(
            temperature=sampling_pb.temperature,
            top_p=sampling_pb.top_p,
            top_k=sampling_pb.top_k,
            min_p=sampling_pb.min_p,
            repetition_penalty=sampling_pb.repetition_penalty,
            presence_penalty=sampling_pb.presence_penalty,
            frequency_penalty=sampling_pb.frequency_penalty,
            seed=sampling_pb.seed,
            logit_bias=dict(sampling_pb.logit_bias),
            min_tokens=sampling_pb.min_tokens,
            max_tokens=sampling_pb.max_tokens,
            stop_token_ids=frozenset(sampling_pb.stop_token_ids),
            ignore_eos=sampling_pb.ignore_eos,
            num_logprobs=sampling_pb.num_logprobs if has_logprobs else None,
            num_prompt_logprobs=sampling_pb.num_prompt_logprobs if has_prompt_logprobs else None,
            grammar=grammar_from_pb(sampling_pb.grammar) if sampling_pb.HasField("grammar") else None,
            allowed_token_ids=tuple(sampling_pb.allowed_token_ids),
            bad_words=tuple(tuple(word.token_ids) for word in sampling_pb.bad_words),
        )
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def grammar_from_pb(grammar_pb: common_pb2.Grammar) -> Grammar:
    """Raises InvalidRequest for a kind that this worker does not know."""
    kind = _GRAMMAR_KINDS.get(grammar_pb.kind)
    if kind is None:
        raise InvalidRequest(f"this worker knows no grammar of kind {grammar_pb.kind}")
    return Grammar(
        kind=kind,
        text=grammar_pb.text,
        is_compact=grammar_pb.is_compact,
        begin_after=tuple(grammar_pb.begin_after),
    )


def layout_to_pb(layout: KvLayout) -> prefill_pb2.KvLayout:
    return prefill_pb2.KvLayout(
        model_fingerprint=layout.model_fingerprint,
        num_layers=layout.num_layers,
        token_shape=layout.token_shape,
        dtype=layout.dtype,
        block_size=layout.block_size,
    )


def layout_from_pb(layout_pb: prefill_pb2.KvLayout) -> KvLayout:
    """ValueError for a dtype that no KV cache has."""
    return KvLayout(
        model_fingerprint=layout_pb.model_fingerprint,
        num_layers=layout_pb.num_layers,
        token_shape=tuple(layout_pb.token_shape),
        dtype=layout_pb.dtype,
        block_size=layout_pb.block_size,
    )


def layout_difference(own: KvLayout, other_pb: prefill_pb2.KvLayout) -> str | None:
    """None when equal, else what differs, for an error message."""
    try:
        return own.difference(layout_from_pb(other_pb))
    except ValueError as error:
        return str(error)


def logprobs_to_pb(logprobs: TokenLogprobs) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        token_id=logprobs.token_id,
        logprob=logprobs.logprob,
        top_token_ids=logprobs.top_token_ids,
        top_logprobs=logprobs.top_logprobs,
    )


def logprobs_from_pb(logprobs_pb: common_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        logprobs_pb.token_id,
        logprobs_pb.logprob,
        tuple(logprobs_pb.top_token_ids),
        tuple(logprobs_pb.top_logprobs),
    )


def all_logprobs_to_pb(logprobs: Iterable[TokenLogprobs]) -> list[common_pb2.TokenLogprobs]:
    return [logprobs_to_pb(entry) for entry in logprobs]


def draft_to_pb(draft: HandedDraft) -> prefill_pb2.DraftState:
    return prefill_pb2.DraftState(token_ids=draft.token_ids, hidden=draft.hidden)


def draft_from_pb(draft_pb: prefill_pb2.DraftState) -> HandedDraft:
    return HandedDraft(tuple(draft_pb.token_ids), draft_pb.hidden)


def finish_reason_to_pb(reason: FinishReason | None) -> common_pb2.FinishReason:
    return common_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH_REASONS[reason]


def error_to_pb(error: ServingError) -> common_pb2.Error:
    kind = next(kind for error_type, kind in _ERROR_KINDS if isinstance(error, error_type))
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
    return common_pb2.Error(kind=kind, message=str(error), retry_after_s=retry_after_s)
