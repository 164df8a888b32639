"""The requests of OpenAI's API, with the extensions that vLLM and SGLang share.

Types are strict and null means "not set". What depends on the model is checked in router/generation.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from router.structure_types import StructureFields
from router.tool_types import ToolChoice, Tools

MAX_LOGPROBS = 20
MAX_CHOICES = 128  # OpenAI's; of all prompts together RouterSettings.max_sequences
MAX_STOPS = 16
MAX_BAD_WORDS = 128
MAX_ALLOWED_IDS = 4096
MAX_TEMPERATURE = 2.0
MAX_TOKEN_ID = (1 << 31) - 1


def pack_ids(token_ids: Sequence[int]) -> array[int]:
    """Of a prompt; what is packed stays as it is. As a list they would be visited one by one whenever garbage
    is searched for."""
    return token_ids if isinstance(token_ids, array) else array("q", token_ids)


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Finite = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[Finite, Field(ge=-2, le=2)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[Sequence[_TokenId], Field(min_length=1), AfterValidator(pack_ids)]
PromptText = Annotated[str, StringConstraints(min_length=1)]


class _ApiModel(BaseModel):
    # Fields that we do not know are kept, to be logged at debug level, and have no effect.
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_ApiModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SharedFields(BaseModel):
    """Taken by every endpoint that generates, also by /v1/responses and /v1/messages."""

    min_tokens: Annotated[int, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # -1 and 0: off
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=256)] | None = None
    ignore_eos: bool | None = None
    cache_salt: Annotated[str, StringConstraints(max_length=256)] | None = None
    request_id: Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,128}$")] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # the smaller, the earlier


def shared_fields(request: SharedFields) -> dict[str, Any]:
    return {name: getattr(request, name) for name in SharedFields.model_fields}


class GenerationFields(_ApiModel, StructureFields, SharedFields):
    """What both endpoints take."""

    model: str | None = None  # none: the first one that is served
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None
    stop: Annotated[list[StopText], Field(max_length=MAX_STOPS), BeforeValidator(_one_or_many)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None  # no tokenizer that we read puts any
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None  # keep so many at the end; -1: as fit
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    bad_words: Annotated[list[StopText], Field(max_length=MAX_BAD_WORDS)] | None = None
    allowed_token_ids: Annotated[list[int], Field(min_length=1, max_length=MAX_ALLOWED_IDS)] | None = None
    return_token_ids: bool | None = None
    user: str | None = None  # no effect
    # Known, and refused when they ask for something: ignoring them would give a wrong answer.
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    prompt_embeds: Any = None


class TextPart(_ApiModel):
    type: Literal["text"]
    text: str


class CalledFunction(_ApiModel):
    name: str
    arguments: str | dict[str, Any] = "{}"


class CalledTool(_ApiModel):
    """A call of an earlier turn."""

    function: CalledFunction


class ChatMessage(_ApiModel):
    """Other fields (name, tool_call_id, reasoning_content ...) go to the chat template as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    tool_calls: list[CalledTool] | None = None


class ChatRequest(GenerationFields):
    cuts_max_tokens: ClassVar[bool] = False  # to what the context has room for, instead of refusing

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, StringConstraints(max_length=32)] | None = None  # for the chat template
    include_reasoning: bool | None = None
    functions: list[dict[str, Any]] | None = None


class CompletionRequest(GenerationFields):
    prompt: PromptText | TokenIds | Annotated[list[PromptText | TokenIds], Field(min_length=1)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
