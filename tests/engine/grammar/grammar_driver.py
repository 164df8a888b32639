"""Engines whose fake model draws from the vocabulary of the tiny tokenizer, and what grammars they follow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.engine import Engine
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.grammar import Grammar, GrammarKind
from engine.grammar.matcher import GrammarMatcher
from engine.outputs import FinishReason, SequenceOutput
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.fakes.fake_model import EOS_TOKEN_ID, FakeModel, build_fake_engine
from tests.fakes.tiny_tokenizer import build_tokenizer

VOCAB_SIZE = 320  # more than the tokenizer has
MAX_TOKENS = 400


@cache
def tokenizer() -> Tokenizer:
    return build_tokenizer()


def load_tiny_vocabulary() -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer().to_str(), n_vocab=VOCAB_SIZE, eos_token=[EOS_TOKEN_ID])


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(load_tiny_vocabulary)


def compiled(grammar: Grammar | None, output_ids: list[int] | None = None) -> GrammarMatcher | None:
    return None if grammar is None else compiler().compile(grammar, output_ids or []).result(20)


def engine_of(**options: Any) -> Engine:
    return build_fake_engine(model=FakeModel(VOCAB_SIZE), **{"num_blocks": 256, **options})


def sequence(
    seq_id: int,
    prompt_ids: list[int],
    grammar: Grammar | None,
    *,
    output_ids: list[int] | None = None,
    **params: Any,
) -> Sequence:
    keeps_blocks = params.pop("keeps_blocks", False)
    kv_listener = params.pop("kv_listener", None)
    sampling = SamplingParams(grammar=grammar, **{"max_tokens": MAX_TOKENS, "seed": seq_id, **params})
    return Sequence(
        seq_id,
        prompt_ids,
        sampling,
        output_ids=output_ids or [],
        matcher=compiled(grammar, output_ids),
        keeps_blocks=keeps_blocks,
        kv_listener=kv_listener,
    )


def run_all(engine: Engine, seqs: list[Sequence]) -> dict[int, list[SequenceOutput]]:
    """By sequence id."""
    outputs: dict[int, list[SequenceOutput]] = {seq.seq_id: [] for seq in seqs}
    for seq in seqs:
        engine.add(seq)
    while engine.has_work:
        for output in engine.step().outputs:
            outputs[output.seq_id].append(output)
        engine.check_integrity()
    return outputs


def tokens_of(outputs: list[SequenceOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def text_of(token_ids: list[int]) -> str:
    """Without the end-of-sequence token, which must be the last."""
    *body, last = token_ids
    assert last == EOS_TOKEN_ID
    return tokenizer().decode(body, skip_special_tokens=False)


def finished_text(outputs: list[SequenceOutput]) -> str:
    assert outputs[-1].finish_reason is FinishReason.STOP
    return text_of(tokens_of(outputs))


@dataclass(frozen=True)
class Form:
    """A grammar, and by other means than the library's whether a text is of it."""

    grammar: Grammar
    accepts: Callable[[str], bool]

    def __repr__(self) -> str:
        return f"{self.grammar.kind.value} {self.grammar.text}"


def regex_form(pattern: str) -> Form:
    grammar = Grammar(kind=GrammarKind.REGEX, text=pattern)
    return Form(grammar, lambda text: re.fullmatch(pattern, text) is not None)


_atoms = st.one_of(
    st.sampled_from(["[a-f]", "[^a-z]", "[0-9A-F]", r"\.", "é", "x", "中", "hello", " "]),
    st.text("abc01 ", min_size=1, max_size=4),
)
_ranges = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda r: f"{{{r[0]},{sum(r)}}}")


def _larger(patterns: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(patterns, min_size=2, max_size=3).map("".join),
        st.lists(patterns, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(patterns, _ranges).map(lambda pair: f"({pair[0]}){pair[1]}"),
    )


regexes = st.recursive(_atoms, _larger, max_leaves=8).map(regex_form)

Checked = tuple[dict[str, Any], Callable[[Any], bool]]  # a schema, and whether a value is of it


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integers(low: int, span: int) -> Checked:
    schema = {"type": "integer", "minimum": low, "maximum": low + span}
    return schema, lambda value: _is_int(value) and low <= value <= low + span


def _strings(longest: int) -> Checked:
    return {"type": "string", "maxLength": longest}, lambda v: isinstance(v, str) and len(v) <= longest


def _enums(values: list[Any]) -> Checked:
    return {"enum": values}, lambda v: any(type(v) is type(each) and v == each for each in values)


def _arrays(items: Checked, low: int, span: int) -> Checked:
    schema = {"type": "array", "items": items[0], "minItems": low, "maxItems": low + span}
    return schema, lambda v: isinstance(v, list) and low <= len(v) <= low + span and all(map(items[1], v))


def _objects(properties: dict[str, Checked], optional: set[str]) -> Checked:
    required = [name for name in properties if name not in optional]
    schema = {
        "type": "object",
        "properties": {name: each[0] for name, each in properties.items()},
        "required": required,
        "additionalProperties": False,
    }

    def accepts(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and set(required) <= set(value) <= set(properties)
            and all(properties[name][1](each) for name, each in value.items())
        )

    return schema, accepts


def _unions(choices: list[Checked]) -> Checked:
    return {"anyOf": [each[0] for each in choices]}, lambda v: any(each[1](v) for each in choices)


_scalars = st.one_of(
    st.builds(_integers, st.integers(-1000, 1000), st.integers(0, 5000)),
    st.builds(_strings, st.integers(0, 5)),
    st.builds(
        _enums, st.lists(st.sampled_from(["a", "é\n", 'q"', 1, -7, None, True]), min_size=1, max_size=3)
    ),
    st.just(({"type": "boolean"}, lambda v: isinstance(v, bool))),
)
_names = st.sampled_from(["a", "the baton", "é", "0", "hello"])


def _nested(schemas: st.SearchStrategy[Checked]) -> st.SearchStrategy[Checked]:
    return st.one_of(
        st.builds(_arrays, schemas, st.integers(0, 2), st.integers(0, 2)),
        st.builds(_objects, st.dictionaries(_names, schemas, max_size=3), st.sets(_names, max_size=2)),
        st.builds(_unions, st.lists(schemas, min_size=1, max_size=3)),
    )


def _schema_form(checked: Checked) -> Form:
    schema, accepts = checked
    grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema), is_compact=True)
    return Form(grammar, lambda text: accepts(json.loads(text)))


schemas = st.recursive(_scalars, _nested, max_leaves=6).map(_schema_form)
forms = st.one_of(regexes, schemas)
