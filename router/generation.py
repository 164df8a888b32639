"""A checked request in the router's own terms: the same for both endpoints, nothing left to validate."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from proto import common_pb2
from router.api_types import ChatRequest, CompletionRequest, GenerationFields
from router.tokenizer import Tokenizer
from servicekit.errors import InvalidRequest

MAX_COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's, for text completions


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    token_ids: list[int]
    text: str | None  # None: given as token ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    kind: Literal["chat", "text"]
    prompts: list[Prompt]
    num_choices: int  # of each prompt
    sampling: list[common_pb2.SamplingParams]  # of each choice, prompt by prompt
    stops: tuple[str, ...]
    includes_stop: bool
    skips_special_tokens: bool
    has_logprobs: bool
    echoes: bool
    hides_output: bool  # max_tokens was 0: one token is drawn and not shown
    cache_salt: str
    returns_token_ids: bool
    streams: bool
    includes_usage: bool
    has_continuous_usage: bool


class GenerationBuilder:
    def __init__(
        self, tokenizer: Tokenizer, sampling_defaults: Mapping[str, float], max_sequences: int
    ) -> None:
        """`sampling_defaults`: of the model's generation_config.json, for what a request leaves open."""
        self._tokenizer = tokenizer
        self._sampling_defaults = sampling_defaults
        self._max_sequences = max_sequences

    def build(
        self, request: ChatRequest | CompletionRequest, prompts: list[Prompt], max_model_len: int
    ) -> Generation:
        """InvalidRequest for what this model cannot do."""
        refuse_unsupported(request)
        num_choices = request.n or 1
        if len(prompts) * num_choices > self._max_sequences:
            raise InvalidRequest(f"prompts times n may be {self._max_sequences}", param="n")
        is_chat = isinstance(request, ChatRequest)
        options = request.stream_options
        if options is not None and not request.stream:
            raise InvalidRequest("stream_options needs stream", param="stream_options")
        return Generation(
            kind="chat" if is_chat else "text",
            prompts=prompts,
            num_choices=num_choices,
            sampling=self._all_sampling(request, prompts, num_choices, max_model_len),
            stops=tuple(request.stop or ()),
            includes_stop=bool(request.include_stop_str_in_output),
            skips_special_tokens=request.skip_special_tokens is not False,
            has_logprobs=_num_logprobs(request) is not None,
            echoes=_echoes(request),
            hides_output=request.max_tokens == 0,
            cache_salt=request.cache_salt or "",
            returns_token_ids=bool(request.return_token_ids),
            streams=bool(request.stream),
            includes_usage=bool(options and options.include_usage),
            has_continuous_usage=bool(options and options.continuous_usage_stats),
        )

    def _all_sampling(
        self, request: GenerationFields, prompts: list[Prompt], num_choices: int, max_model_len: int
    ) -> list[common_pb2.SamplingParams]:
        shared = self._shared_sampling(request)
        root = secrets.randbits(64) if request.seed is None else request.seed % 2**64
        result: list[common_pb2.SamplingParams] = []
        for prompt in prompts:
            shared.max_tokens = _max_tokens(request, len(prompt.token_ids), max_model_len)
            if shared.min_tokens > shared.max_tokens:
                raise InvalidRequest(
                    f"min_tokens is {shared.min_tokens}, max_tokens {shared.max_tokens}", param="min_tokens"
                )
            for _ in range(num_choices):
                sampling = common_pb2.SamplingParams()
                sampling.CopyFrom(shared)
                sampling.seed = derive_seed(root, len(result))
                result.append(sampling)
        return result

    def _shared_sampling(self, request: GenerationFields) -> common_pb2.SamplingParams:
        """Everything but seed and max_tokens."""
        sampling = common_pb2.SamplingParams(
            temperature=self._value(request, "temperature", 1.0),
            top_p=self._value(request, "top_p", 1.0),
            top_k=max(0, int(self._value(request, "top_k", 0))),
            min_p=self._value(request, "min_p", 0.0),
            repetition_penalty=self._value(request, "repetition_penalty", 1.0),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=self._logit_bias(request.logit_bias or {}),
            min_tokens=request.min_tokens or 0,
            stop_token_ids=self.checked_ids(request.stop_token_ids or [], "stop_token_ids"),
            ignore_eos=bool(request.ignore_eos),
        )
        num_logprobs = _num_logprobs(request)
        if num_logprobs is not None:
            sampling.num_logprobs = num_logprobs
            if _echoes(request):
                sampling.num_prompt_logprobs = num_logprobs
        return sampling

    def _value(self, request: GenerationFields, name: str, fallback: float) -> float:
        given = getattr(request, name)
        return float(self._sampling_defaults.get(name, fallback) if given is None else given)

    def _logit_bias(self, biases: Mapping[str, float]) -> dict[int, float]:
        if not all(key.isascii() and key.isdigit() for key in biases):
            raise InvalidRequest("logit_bias: keys must be token ids", param="logit_bias")
        by_id = {int(key): bias for key, bias in biases.items()}
        self.checked_ids(list(by_id), "logit_bias")
        return by_id

    def checked_ids(self, token_ids: list[int], param: str) -> list[int]:
        """`token_ids`, when the model knows them all."""
        if token_ids and not (0 <= min(token_ids) and max(token_ids) < self._tokenizer.vocab_size):
            raise InvalidRequest(
                f"{param}: token ids must be in [0, {self._tokenizer.vocab_size})", param=param
            )
        return token_ids


def derive_seed(root: int, index: int) -> int:
    """The seed of choice `index`: of the first one the client's own, so that n does not change it."""
    if index == 0:
        return root
    digest = blake2b(root.to_bytes(8, "little") + index.to_bytes(4, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def refuse_too_long(num_prompt_tokens: int, max_model_len: int) -> None:
    """A prompt must leave room for one token."""
    if num_prompt_tokens >= max_model_len:
        raise InvalidRequest(
            f"the context holds {max_model_len} tokens, the prompt has at least {num_prompt_tokens}",
            param="prompt",
            code="context_length_exceeded",
        )


def refuse_long_prompts(prompts: list[Prompt], max_prompt_tokens: int | None) -> None:
    """`max_prompt_tokens`: what this deployment allows, below what the model could hold. None: no limit."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if max_prompt_tokens is not None and longest > max_prompt_tokens:
        raise InvalidRequest(
            f"a prompt may have {max_prompt_tokens} tokens here, this one has {longest}",
            param="prompt",
            code="context_length_exceeded",
        )


def refuse_unsupported(request: GenerationFields) -> None:
    """Fields that would change the answer and that we do not serve yet."""
    asked = {
        "response_format": (request.response_format or {}).get("type", "text") != "text",
        "suffix": bool(request.suffix),
        "best_of": request.best_of not in (None, request.n or 1),
        "prompt_embeds": request.prompt_embeds is not None,
    }
    if isinstance(request, ChatRequest):
        asked["tools"] = bool(request.tools) and request.tool_choice != "none"
        asked["functions"] = bool(request.functions)
    for name, is_asked in asked.items():
        if is_asked:
            raise InvalidRequest(f"{name} is not supported", param=name, code="unsupported_parameter")


def _max_tokens(request: GenerationFields, num_prompt_tokens: int, max_model_len: int) -> int:
    refuse_too_long(num_prompt_tokens, max_model_len)
    room = max_model_len - num_prompt_tokens
    given = request.max_tokens
    if isinstance(request, ChatRequest):
        given = request.max_completion_tokens if request.max_completion_tokens is not None else given
    if given is None:
        return room if isinstance(request, ChatRequest) else min(MAX_COMPLETION_TOKENS_DEFAULT, room)
    if given > room:
        raise InvalidRequest(
            f"the context holds {max_model_len} tokens and the prompt has {num_prompt_tokens}, "
            f"which leaves room for {room}; max_tokens is {given}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return max(1, given)


def _num_logprobs(request: GenerationFields) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    assert isinstance(request, ChatRequest)
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs", param="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


def _echoes(request: GenerationFields) -> bool:
    return isinstance(request, CompletionRequest) and bool(request.echo)
