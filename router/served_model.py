"""A model that this router serves: how its text is read, and the workers that run it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jinja2

from kvstore.prefix_index import PrefixIndex
from router.api_types import ChatRequest, CompletionRequest
from router.caller import ANYBODY, Caller
from router.chat_template import ChatTemplate
from router.fleet import Fleet
from router.generation import Generation, GenerationBuilder, refuse_long_prompts
from router.model_dir import ModelDir, ModelDirError, load_model_dir
from router.output.chat_output import ThoughtTokens
from router.output.reasoning import END_THINK, THINK
from router.output.rules import OutputRules, detect_reasoning_parser, detect_tool_parser
from router.overload import OverloadGuard
from router.policy import PolicyConfig
from router.prompts import PromptReader
from router.refusals import NotAllowed
from router.route_planner import RoutePlanner
from router.settings import ModelSource, RouterSettings
from router.tokenizer import Tokenizer
from router.tool_prompt import ToolPrompt
from servicekit.errors import InvalidRequest

_FALLBACK_MODEL_LEN = 1 << 20  # no worker and no config.json says: workers refuse what they cannot hold


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    name: str
    model_dir: ModelDir
    tokenizer: Tokenizer
    prompts: PromptReader
    generations: GenerationBuilder
    fleet: Fleet
    planner: RoutePlanner
    overload: OverloadGuard
    max_prompt_tokens: int | None  # of this deployment, below what the model holds

    @property
    def max_model_len(self) -> int:
        known = [self.fleet.max_model_len(), self.model_dir.max_position_embeddings]
        return min((length for length in known if length), default=_FALLBACK_MODEL_LEN)

    async def read(self, request: ChatRequest | CompletionRequest) -> Generation:
        """InvalidRequest for what this model cannot do."""
        max_model_len = self.max_model_len
        if isinstance(request, ChatRequest):
            prompts = await self.prompts.read_chat(request, max_model_len)
        else:
            prompts = await self.prompts.read_completion(request, max_model_len)
        refuse_long_prompts(prompts, self.max_prompt_tokens)
        return self.generations.build(request, prompts, max_model_len)


class ServedModels:
    """By the name in a request; the first one that the caller may use answers requests that name none."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = dict(models)
        self.first = next(iter(self._models.values()))

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def named(self, name: str | None, caller: Caller = ANYBODY) -> ServedModel:
        """InvalidRequest with code model_not_found; NotAllowed for one that `caller` may not use."""
        if name is None:
            name = next(filter(caller.may_use, self._models), self.first.name)
        if name not in self._models:
            raise InvalidRequest(f"the model {name!r} does not exist", param="model", code="model_not_found")
        if not caller.may_use(name):
            raise NotAllowed(f"this API key may not use the model {name!r}")
        return self._models[name]


def build_served_model(
    settings: RouterSettings, source: ModelSource, fleet: Fleet, index: PrefixIndex
) -> ServedModel:
    """ModelDirError when the model cannot be read."""
    model_dir = load_model_dir(source.path)
    tokenizer = Tokenizer.from_file(model_dir.tokenizer_file, model_dir.vocab_size)
    rules = _output_rules(settings, model_dir, tokenizer)
    return ServedModel(
        name=source.name,
        model_dir=model_dir,
        tokenizer=tokenizer,
        prompts=_prompt_reader(model_dir, tokenizer, rules),
        generations=GenerationBuilder(tokenizer, rules, model_dir.sampling_defaults, settings.max_sequences),
        fleet=fleet,
        planner=RoutePlanner(
            fleet,
            index,
            PolicyConfig(
                name=settings.policy,
                temperature_s=settings.policy_temperature_s,
                local_prefill_max_tokens=settings.local_prefill_max_tokens,
            ),
        ),
        overload=OverloadGuard(settings.max_queue_wait_s),
        max_prompt_tokens=settings.max_prompt_tokens,
    )


def _output_rules(settings: RouterSettings, model_dir: ModelDir, tokenizer: Tokenizer) -> OutputRules:
    tools, reasoning = settings.tool_parser, settings.reasoning_parser
    template = model_dir.chat_template
    return OutputRules(
        tools=detect_tool_parser(template) if tools == "auto" else tools,
        reasoning=detect_reasoning_parser(template) if reasoning == "auto" else reasoning,
        tags=ThoughtTokens(tokenizer.id_of(THINK), tokenizer.id_of(END_THINK)),
    )


def _prompt_reader(model_dir: ModelDir, tokenizer: Tokenizer, rules: OutputRules) -> PromptReader:
    source, template = model_dir.chat_template, _chat_template(model_dir)
    if source is None or template is None or template.shows_tools:
        return PromptReader(tokenizer, template)
    return PromptReader(tokenizer, template, ToolPrompt.of(source, rules.tools))


def _chat_template(model_dir: ModelDir) -> ChatTemplate | None:
    if model_dir.chat_template is None:
        return None
    try:
        return ChatTemplate(model_dir.chat_template, model_dir.special_tokens)
    except jinja2.TemplateSyntaxError as error:
        raise ModelDirError(
            f"{model_dir.path}: chat template, line {error.lineno}: {error.message}"
        ) from error
