"""A checked request in the router's own terms: the same for both endpoints, nothing left to validate."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from proto import common_pb2
from router.api_types import ChatRequest, CompletionRequest, GenerationFields
from router.output.reasoning import END_THINK
from router.output.rules import OutputPlan, OutputRules
from router.structure import read_structure
from router.tokenizer import Tokenizer
from router.tool_use import ToolUse, read_tool_use
from servicekit.errors import InvalidRequest

MAX_COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's, for text completions


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    token_ids: array[int]  # packed
    text: str | None  # None: given as token ids, or cut
    ending: str = ""  # of the text


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    kind: Literal["chat", "text"]
    prompts: list[Prompt]
    num_choices: int  # of each prompt
    num_shown: int  # of them, the best
    sampling: list[common_pb2.SamplingParams]  # of each choice, prompt by prompt
    stops: tuple[str, ...]
    includes_stop: bool
    skips_special_tokens: bool
    has_logprobs: bool
    has_prompt_logprobs: bool
    echoes: bool
    hides_output: bool  # max_tokens was 0: one token is drawn and not shown
    cache_salt: str
    priority: int | None  # as asked for
    returns_token_ids: bool
    output: OutputPlan | None  # how the text of an answer is read; None: as it is
    shows_reasoning: bool
    streams: bool
    includes_usage: bool
    has_continuous_usage: bool


class GenerationBuilder:
    def __init__(
        self,
        tokenizer: Tokenizer,
        rules: OutputRules,
        sampling_defaults: Mapping[str, float],
        max_sequences: int,
    ) -> None:
        """`sampling_defaults`: of the model's generation_config.json, for what a request leaves open."""
        self._tokenizer = tokenizer
        self._rules = rules
        self._sampling_defaults = sampling_defaults
        self._max_sequences = max_sequences

    def build(
        self, request: ChatRequest | CompletionRequest, prompts: list[Prompt], max_model_len: int
    ) -> Generation:
        """InvalidRequest for what this model cannot do."""
        refuse_unsupported(request)
        num_choices = _num_choices(request)
        if len(prompts) * num_choices > self._max_sequences:
            raise InvalidRequest(f"prompts times n may be {self._max_sequences}", param="n")
        options = request.stream_options
        if options is not None and not request.stream:
            raise InvalidRequest("stream_options needs stream", param="stream_options")
        if request.prompt_logprobs is not None and request.stream:
            raise InvalidRequest("prompt_logprobs excludes stream", param="prompt_logprobs")
        tool_use = _tool_use(request)
        sampling = self._all_sampling(request, prompts, num_choices, max_model_len)
        self._structure(sampling, request, tool_use, prompts)
        return Generation(
            kind="chat" if isinstance(request, ChatRequest) else "text",
            prompts=prompts,
            num_choices=num_choices,
            num_shown=request.n or 1,
            sampling=sampling,
            stops=tuple(request.stop or ()),
            includes_stop=bool(request.include_stop_str_in_output),
            skips_special_tokens=request.skip_special_tokens is not False,
            has_logprobs=_num_logprobs(request) is not None,
            has_prompt_logprobs=request.prompt_logprobs is not None,
            echoes=_echoes(request),
            hides_output=request.max_tokens == 0,
            cache_salt=request.cache_salt or "",
            priority=request.priority,
            returns_token_ids=bool(request.return_token_ids),
            output=self._output(request, tool_use, prompts),
            shows_reasoning=not isinstance(request, ChatRequest) or request.include_reasoning is not False,
            streams=bool(request.stream),
            includes_usage=bool(options and options.include_usage),
            has_continuous_usage=bool(options and options.continuous_usage_stats),
        )

    def _output(
        self, request: GenerationFields, tool_use: ToolUse | None, prompts: list[Prompt]
    ) -> OutputPlan | None:
        if not isinstance(request, ChatRequest):
            return None
        return self._rules.output_plan(tool_use, prompts[0].ending)

    def _structure(
        self,
        sampling: list[common_pb2.SamplingParams],
        request: GenerationFields,
        tool_use: ToolUse | None,
        prompts: list[Prompt],
    ) -> None:
        """Sets the grammar that the answers must follow; a thought that the prompt opened comes before it."""
        structure = read_structure(request)
        called = tool_use.structure() if tool_use is not None else None
        if structure is not None and called is not None:
            raise InvalidRequest(
                "a forced tool_choice excludes response_format and other structured output",
                param="tool_choice",
            )
        structure = structure or called
        if structure is None:
            return
        if isinstance(request, ChatRequest) and self._rules.opens_thought(prompts[0].ending):
            structure = structure.after(self._tokenizer.ids_of(END_THINK))
        grammar = structure.to_pb()
        for each in sampling:
            each.grammar.CopyFrom(grammar)

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
            allowed_token_ids=self.checked_ids(request.allowed_token_ids or [], "allowed_token_ids"),
            bad_words=self._bad_words(request.bad_words or []),
        )
        _ask_logprobs(sampling, request)
        return sampling

    def _bad_words(self, words: list[str]) -> list[common_pb2.TokenIds]:
        """Each as it is written at the start of a text and inside one."""
        spellings = {self._tokenizer.ids_of(prefix + word.lstrip()) for word in words for prefix in ("", " ")}
        return [common_pb2.TokenIds(token_ids=ids) for ids in sorted(spellings) if ids]

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
    asked = {"suffix": bool(request.suffix), "prompt_embeds": request.prompt_embeds is not None}
    if isinstance(request, ChatRequest):
        asked["best_of"] = request.best_of not in (None, request.n or 1)
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
    if given > room and isinstance(request, ChatRequest) and request.cuts_max_tokens:
        return room
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


def _ask_logprobs(sampling: common_pb2.SamplingParams, request: GenerationFields) -> None:
    """What is shown, and what it takes to find the best of several."""
    num_logprobs = _num_logprobs(request)
    if num_logprobs is not None:
        sampling.num_logprobs = num_logprobs
    elif _num_choices(request) > (request.n or 1):
        sampling.num_logprobs = 0
    num_prompt_logprobs = [request.prompt_logprobs, num_logprobs if _echoes(request) else None]
    if asked := [num for num in num_prompt_logprobs if num is not None]:
        sampling.num_prompt_logprobs = max(asked)


def _num_choices(request: GenerationFields) -> int:
    """For each prompt."""
    num_shown = request.n or 1
    num_choices = request.best_of or num_shown
    if num_choices < num_shown:
        raise InvalidRequest(f"best_of is {num_choices}, less than n", param="best_of")
    if num_choices > num_shown and request.stream:
        raise InvalidRequest("best_of excludes stream: the best is known at the end", param="best_of")
    return num_choices


def _tool_use(request: GenerationFields) -> ToolUse | None:
    if not isinstance(request, ChatRequest):
        return None
    return read_tool_use(request.tools, request.tool_choice, request.parallel_tool_calls)


def _echoes(request: GenerationFields) -> bool:
    return isinstance(request, CompletionRequest) and bool(request.echo)
