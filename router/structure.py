"""What an answer must look like, whichever of the many fields asked for it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from proto import common_pb2
from router.structure_types import ResponseFormat, StructuredOutputs, StructureFields
from servicekit.errors import InvalidRequest

_KINDS = {
    "json_schema": common_pb2.GRAMMAR_KIND_JSON_SCHEMA,
    "json_object": common_pb2.GRAMMAR_KIND_JSON_OBJECT,
    "regex": common_pb2.GRAMMAR_KIND_REGEX,
    "ebnf": common_pb2.GRAMMAR_KIND_EBNF,
    "choice": common_pb2.GRAMMAR_KIND_CHOICE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    kind: Literal["json_schema", "json_object", "regex", "ebnf", "choice"]
    text: str = ""  # the schema, the regular expression, the grammar, or a JSON list of choices
    is_compact: bool = False  # JSON without whitespace between its tokens
    begin_after: tuple[int, ...] = ()  # token ids; the answer is free up to them

    def after(self, token_ids: tuple[int, ...]) -> Structure:
        return replace(self, begin_after=token_ids)

    def to_pb(self) -> common_pb2.Grammar:
        return common_pb2.Grammar(
            kind=_KINDS[self.kind],
            text=self.text,
            is_compact=self.is_compact,
            begin_after=self.begin_after,
        )


def read_structure(request: StructureFields) -> Structure | None:
    """InvalidRequest when two fields ask, or one of them for something that cannot be."""
    asked = {name: structure for name, structure in _asked(request).items() if structure is not None}
    if len(asked) > 1:
        raise InvalidRequest(f"{' and '.join(asked)} exclude each other", param=list(asked)[1])
    structure = next(iter(asked.values()), None)
    options = request.structured_outputs
    if structure is None and options is not None:
        raise InvalidRequest(
            "structured_outputs needs one of json, regex, choice, grammar, json_object",
            param="structured_outputs",
        )
    is_compact = options is not None and bool(options.disable_any_whitespace)
    return replace(structure, is_compact=True) if structure is not None and is_compact else structure


def _asked(request: StructureFields) -> dict[str, Structure | None]:
    return {
        "response_format": _of_response_format(request.response_format),
        "structured_outputs": _of_structured_outputs(request.structured_outputs),
        "guided_json": _schema(request.guided_json, "guided_json"),
        "guided_regex": _text("regex", request.guided_regex),
        "guided_grammar": _text("ebnf", request.guided_grammar),
        "guided_choice": _choice(request.guided_choice),
        "json_schema": _schema(request.json_schema, "json_schema"),
        "regex": _text("regex", request.regex),
        "ebnf": _text("ebnf", request.ebnf),
    }


def _of_response_format(given: ResponseFormat | None) -> Structure | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return Structure(kind="json_object")
    if given.json_schema is None or given.json_schema.schema_ is None:
        raise InvalidRequest(
            "response_format: json_schema needs a schema in json_schema.schema", param="response_format"
        )
    return _schema(given.json_schema.schema_, "response_format")


def _of_structured_outputs(given: StructuredOutputs | None) -> Structure | None:
    """None also when it only holds options for a structure asked for elsewhere."""
    if given is None:
        return None
    asked = [
        _schema(given.json_, "structured_outputs"),
        _text("regex", given.regex),
        _text("ebnf", given.grammar),
        _choice(given.choice),
        Structure(kind="json_object") if given.json_object else None,
    ]
    structures = [structure for structure in asked if structure is not None]
    if len(structures) > 1:
        raise InvalidRequest("structured_outputs asks for two structures", param="structured_outputs")
    return structures[0] if structures else None


def _schema(schema: Any, param: str) -> Structure | None:
    """An object, or a JSON text that holds one."""
    if schema is None:
        return None
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{param}: the schema is not valid JSON", param=param) from error
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{param}: a schema must be an object", param=param)
    return Structure(kind="json_schema", text=json.dumps(schema))


def _text(kind: Literal["regex", "ebnf"], text: str | None) -> Structure | None:
    return None if text is None else Structure(kind=kind, text=text)


def _choice(choices: list[str] | None) -> Structure | None:
    return None if choices is None else Structure(kind="choice", text=json.dumps(choices))
