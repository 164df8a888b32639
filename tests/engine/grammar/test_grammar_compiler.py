from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from engine.grammar.compiler import GrammarCompiler, compiler_for_model
from engine.grammar.grammar import MAX_JSON_CHARS, MAX_RULES_CHARS, Grammar, GrammarError, GrammarKind
from tests.engine.grammar.grammar_driver import (
    compiled,
    engine_of,
    finished_text,
    load_tiny_vocabulary,
    run_all,
    sequence,
    tokenizer,
)
from tests.fakes.tiny_tokenizer import EOS_ID, write_model_dir


def output_of(grammar: Grammar, seed: int = 1) -> str:
    return finished_text(run_all(engine_of(), [sequence(1, [5, 6], grammar, seed=seed)])[1])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GrammarKind.REGEX, "("),
        (GrammarKind.REGEX, "(?=a)b"),
        (GrammarKind.REGEX, "a" * 20_000),
        (GrammarKind.REGEX, "(" * 5000 + "a" + ")" * 2000),
        (GrammarKind.JSON_SCHEMA, "not json"),
        (GrammarKind.JSON_SCHEMA, "[1]"),
        (GrammarKind.JSON_SCHEMA, '{"type": "number of things"}'),
        (GrammarKind.JSON_SCHEMA, '{"$ref": "http://example.org/schema"}'),
        (GrammarKind.JSON_SCHEMA, '{"items":' * 9000 + "{}" + "}" * 9000),
        (GrammarKind.JSON_SCHEMA, json.dumps({"properties": {"a": {"pattern": "a?" * 9000}}})),
        (GrammarKind.JSON_SCHEMA, json.dumps({"patternProperties": {"a?" * 9000: {}}})),
        (GrammarKind.JSON_OBJECT, "{}"),
        (GrammarKind.EBNF, 'root ::= ( "a"'),
        (GrammarKind.EBNF, "root ::= " + "(" * 9000 + '"a"' + ")" * 9000),
        (GrammarKind.LARK, "start: MISSING"),
        (GrammarKind.LARK, "start: " + "(" * 9000 + '"a"' + ")" * 9000),
        (GrammarKind.CHOICE, "[]"),
        (GrammarKind.CHOICE, '["a", 1]'),
        (GrammarKind.CHOICE, "a"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_an_error_of_one_line(kind: GrammarKind, text: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compiled(Grammar(kind=kind, text=text))
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 400


def _chain(limit: int) -> str:
    """Rules that name each other, as many as the limit lets in."""
    lines, size = ["start: r0\n"], 40
    while size < limit:
        lines.append(f"r{len(lines) - 1}: r{len(lines)}\n")
        size += len(lines[-1])
    return "".join(lines) + f'r{len(lines) - 1}: "x"\n'


def _references(limit: int) -> str:
    definitions: dict[str, object] = {}
    size = 60
    while size < limit:
        entry = {"type": "array", "items": {"$ref": f"#/$defs/{len(definitions) + 1}"}}
        definitions[f"{len(definitions)}"] = entry
        size += len(json.dumps(entry)) + 8 + len(f"{len(definitions)}")
    definitions[f"{len(definitions)}"] = {"type": "integer"}
    return json.dumps({"$ref": "#/$defs/0", "$defs": definitions})


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GrammarKind.LARK, _chain(MAX_RULES_CHARS - 100)),
        (GrammarKind.JSON_SCHEMA, _references(MAX_JSON_CHARS - 300)),
    ],
    ids=["rules", "references"],
)
def test_the_longest_chains_of_rules_do_not_end_the_process(kind: GrammarKind, text: str) -> None:
    assert compiled(Grammar(kind=kind, text=text)) is not None


def test_kinds() -> None:
    made = json.loads(output_of(Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"enum": [{"a": [1, "é"]}]}')))
    assert made == {"a": [1, "é"]}
    choices = ["red", 'a "quoted" word', "über\n", "中"]
    drawn = {
        output_of(Grammar(kind=GrammarKind.CHOICE, text=json.dumps(choices)), seed) for seed in range(40)
    }
    assert drawn == set(choices)
    gbnf = 'root ::= item ("," item){2}\nitem ::= [0-9]'
    assert [part.isdigit() for part in output_of(Grammar(kind=GrammarKind.EBNF, text=gbnf)).split(",")] == [
        True
    ] * 3
    lark = 'start: "x" item\nitem: /[ab]{2}/'
    assert output_of(Grammar(kind=GrammarKind.EBNF, text=lark))[0] == "x"
    tools = 'start: <think> "a" %json {"type": "boolean"}'
    assert output_of(Grammar(kind=GrammarKind.LARK, text=tools)) in ("<think>atrue", "<think>afalse")


@pytest.mark.parametrize(
    ("pattern", "text", "accepts"),
    [
        (r"\d+", "12", True),
        (r"\d+", "१२", False),
        (r"\D", "१", True),
        ("a/b", "a/b", True),
        ("a\nb", "a\nb", True),
        (r"\\d", r"\d", True),
        ("(a|b)*", "", True),
        ("ab", "xab", False),
    ],
)
def test_regular_expressions_are_of_the_whole_output_and_their_digits_are_ascii(
    pattern: str, text: str, accepts: bool
) -> None:
    matcher = compiled(Grammar(kind=GrammarKind.REGEX, text=pattern))
    assert matcher is not None
    token_ids = tokenizer().encode(text).ids
    is_consumed = matcher.matcher.try_consume_tokens(token_ids) == len(token_ids)
    assert (is_consumed and matcher.matcher.is_accepting()) is accepts


def test_any_object_is_an_object() -> None:
    matcher = compiled(
        Grammar(kind=GrammarKind.JSON_OBJECT), tokenizer().encode('{"a": [1, {"b": null}]').ids
    )
    assert matcher is not None
    assert not matcher.matcher.is_accepting()
    assert matcher.matcher.consume_tokens(tokenizer().encode("}").ids)
    assert matcher.matcher.is_accepting()
    with pytest.raises(GrammarError, match="does not match"):
        compiled(Grammar(kind=GrammarKind.JSON_OBJECT), tokenizer().encode("[1").ids)


@pytest.mark.parametrize("is_compact", [True, False])
def test_compact_json_has_no_whitespace(is_compact: bool) -> None:
    grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"type": "object"}', is_compact=is_compact)
    spaced = tokenizer().encode('{ "a":').ids
    if is_compact:
        with pytest.raises(GrammarError):
            compiled(grammar, spaced)
    else:
        assert compiled(grammar, spaced) is not None


def test_a_grammar_is_compiled_once_and_its_matchers_are_apart() -> None:
    durations: list[float] = []
    own = GrammarCompiler(load_tiny_vocabulary)
    own.on_compiled = durations.append
    grammar = Grammar(kind=GrammarKind.REGEX, text="[ab]{3}")
    first, second = own.compile(grammar).result(10), own.compile(grammar).result(10)
    assert len(durations) == 1
    a, b = tokenizer().encode("a").ids, tokenizer().encode("b").ids
    assert first.matcher.consume_tokens(a * 3)
    assert not first.matcher.consume_tokens(b)
    assert second.matcher.consume_tokens(b * 3)
    own.close()


def test_compiling_leaves_the_size_of_other_stacks_alone() -> None:
    before = threading.stack_size()
    own = GrammarCompiler(load_tiny_vocabulary)
    own.compile(Grammar(kind=GrammarKind.REGEX, text="a")).result(10)
    assert threading.stack_size() == before
    own.close()


def test_the_vocabulary_comes_from_the_model_directory(tmp_path: Path) -> None:
    directory = write_model_dir(tmp_path / "model")
    own = compiler_for_model(directory, 400, frozenset({EOS_ID}))
    matcher = own.compile(Grammar(kind=GrammarKind.REGEX, text="a+")).result(10)
    assert matcher.num_mask_bytes == 52  # 400 bits in words of 32
    own.close()


@pytest.mark.parametrize(
    ("has_file", "vocab_size", "ends", "reason"),
    [
        (True, 400, (), "end-of-sequence"),
        (True, 100, (EOS_ID,), "vocab size"),
        (False, 400, (EOS_ID,), "tokenizer.json"),
    ],
)
def test_a_model_that_cannot_have_grammars_says_why(
    tmp_path: Path, has_file: bool, vocab_size: int, ends: tuple[int, ...], reason: str
) -> None:
    directory = write_model_dir(tmp_path / "model")
    if not has_file:
        (directory / "tokenizer.json").unlink()
    own = compiler_for_model(directory, vocab_size, frozenset(ends))
    with pytest.raises(GrammarError, match=reason):
        own.compile(Grammar(kind=GrammarKind.REGEX, text="a")).result(10)
    own.close()


def test_waiting_compilations_can_be_given_up() -> None:
    started, go_on = threading.Event(), threading.Event()

    def load():  # type: ignore[no-untyped-def]
        started.set()
        assert go_on.wait(20)
        return load_tiny_vocabulary()

    own = GrammarCompiler(load)
    grammar = Grammar(kind=GrammarKind.REGEX, text="a")
    running = [own.compile(grammar) for _ in range(2)]
    assert started.wait(20)
    waiting = own.compile(grammar)
    assert waiting.cancel()
    go_on.set()
    assert all(future.result(20) is not None for future in running)
    own.close()
