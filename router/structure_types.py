"""The fields of a request that say what its answer must look like: OpenAI's, vLLM's new and old, SGLang's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_GRAMMAR_CHARS = 256 << 10
MAX_STRUCTURE_CHOICES = 1024

GrammarText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
ChoiceTexts = Annotated[
    list[Annotated[str, StringConstraints(min_length=1)]],
    Field(min_length=1, max_length=MAX_STRUCTURE_CHOICES),
]
Schema = dict[str, Any] | GrammarText


class _StructureModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class JsonSchemaFormat(_StructureModel):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None  # a schema is always obeyed


class ResponseFormat(_StructureModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(_StructureModel):
    json_: Schema | None = Field(None, alias="json")
    regex: GrammarText | None = None
    choice: ChoiceTexts | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None


class StructureFields(BaseModel):
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: GrammarText | None = None
    guided_choice: ChoiceTexts | None = None
    guided_grammar: GrammarText | None = None
    json_schema: Schema | None = None
    regex: GrammarText | None = None
    ebnf: GrammarText | None = None
