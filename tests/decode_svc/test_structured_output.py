"""Grammars on the wire: local prefill, hand-off, migration, and what cannot be used."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from engine.grammar.compiler import GrammarCompiler
from proto import common_pb2
from proto.common_pb2 import Grammar, SequenceSpec, TokenIds
from tests.engine.grammar.grammar_driver import VOCAB_SIZE, load_tiny_vocabulary, text_of, tokenizer
from tests.fakes.fake_model import EOS_TOKEN_ID, FakeModel, build_fake_engine
from tests.fakes.fake_workers import (
    FakeRouter,
    FakeWorker,
    Reply,
    decode_worker,
    greedy_spec,
    prefill_worker,
    router_link,
)
from worker import grammars

PROMPT = [(7 * i + 3) % 200 + 1 for i in range(21)]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def schema_grammar(schema: object = SCHEMA) -> Grammar:
    return Grammar(kind=common_pb2.GRAMMAR_KIND_JSON_SCHEMA, text=json.dumps(schema), is_compact=True)


def regex_grammar(pattern: str) -> Grammar:
    return Grammar(kind=common_pb2.GRAMMAR_KIND_REGEX, text=pattern)


def spec_with(
    grammar: Grammar | None, *, output_ids: list[int] | None = None, **sampling: Any
) -> SequenceSpec:
    params = {"temperature": 1.0, "seed": 3, "ignore_eos": False, "grammar": grammar, **sampling}
    max_tokens = params.pop("max_tokens", 200)
    return greedy_spec(PROMPT, max_tokens, sampling=params, output_ids=output_ids or [])


@dataclass
class Stack:
    prefill: FakeWorker
    decode: FakeWorker
    router: FakeRouter

    async def finish(self, spec: SequenceSpec, *, is_handed_off: bool) -> Reply:
        async with asyncio.timeout(20):
            reply = await self.router.finish(spec, self.prefill if is_handed_off else "")
        await self.decode.until_idle()
        await self.prefill.until_idle()
        return reply


@pytest.fixture
def load_vocabulary() -> Callable[[], Any]:
    return load_tiny_vocabulary


@pytest.fixture
async def stack(load_vocabulary: Callable[[], Any]) -> AsyncIterator[Stack]:
    def facts() -> tuple[Any, GrammarCompiler]:
        return build_fake_engine(num_blocks=128, model=FakeModel(VOCAB_SIZE)), GrammarCompiler(
            load_vocabulary
        )

    async with AsyncExitStack() as exits:
        engine, compiler = facts()
        prefill = await exits.enter_async_context(prefill_worker(engine, grammars=compiler))
        engine, compiler = facts()
        decode = await exits.enter_async_context(decode_worker(engine, grammars=compiler))
        router = await exits.enter_async_context(router_link(decode))
        yield Stack(prefill, decode, router)


both_ways = pytest.mark.parametrize("is_handed_off", [False, True], ids=["local", "handed_off"])


async def test_an_answer_is_of_its_schema_wherever_it_is_prefilled(stack: Stack) -> None:
    replies = [
        await stack.finish(spec_with(schema_grammar()), is_handed_off=is_handed_off)
        for is_handed_off in (False, True)
    ]
    assert replies[1].timings.prefill_worker_id == "prefill-a"
    assert replies[0].token_ids == replies[1].token_ids
    assert replies[0].last.finish_reason == common_pb2.FINISH_REASON_STOP
    value = json.loads(text_of(replies[0].token_ids))
    assert set(value) == {"name", "age"}
    assert isinstance(value["age"], int)


@both_ways
async def test_an_answer_goes_on_where_another_worker_left_it(stack: Stack, is_handed_off: bool) -> None:
    whole = (await stack.finish(spec_with(schema_grammar()), is_handed_off=is_handed_off)).token_ids
    for num_emitted in (1, len(whole) // 2, len(whole) - 1):
        spec = spec_with(schema_grammar(), output_ids=whole[:num_emitted])
        rest = await stack.finish(spec, is_handed_off=is_handed_off)
        assert whole[:num_emitted] + rest.token_ids == whole


@both_ways
async def test_one_token_is_of_the_grammar_and_tells_whether_it_was_the_end(
    stack: Stack, is_handed_off: bool
) -> None:
    first = await stack.finish(spec_with(regex_grammar("[xy]z"), max_tokens=1), is_handed_off=is_handed_off)
    assert tokenizer().decode(first.token_ids) in ("x", "y")
    assert first.last.finish_reason == common_pb2.FINISH_REASON_LENGTH
    empty = spec_with(
        regex_grammar("(abcdefgh)?"), max_tokens=1, ignore_eos=True, allowed_token_ids=[EOS_TOKEN_ID]
    )
    ended = await stack.finish(empty, is_handed_off=is_handed_off)
    assert ended.token_ids == [EOS_TOKEN_ID]
    assert ended.last.finish_reason == common_pb2.FINISH_REASON_STOP


@both_ways
async def test_token_constraints_reach_the_engine(stack: Stack, is_handed_off: bool) -> None:
    allowed = [40, 41, 42]
    bad = [TokenIds(token_ids=[40]), TokenIds(token_ids=[41, 41])]
    spec = spec_with(None, allowed_token_ids=allowed, bad_words=bad, max_tokens=30)
    tokens = (await stack.finish(spec, is_handed_off=is_handed_off)).token_ids
    assert len(tokens) == 30
    assert set(tokens) == {41, 42}
    assert (41, 41) not in set(zip(tokens, tokens[1:], strict=False))


@both_ways
@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (regex_grammar("("), "regex"),
        (Grammar(kind=common_pb2.GRAMMAR_KIND_JSON_SCHEMA, text="{"), "JSON"),
        (Grammar(), "kind"),
        (Grammar(kind=99), "kind"),  # type: ignore[arg-type]
    ],
    ids=["regex", "json", "no_kind", "unknown_kind"],
)
async def test_a_grammar_that_cannot_be_used_is_the_callers_mistake(
    stack: Stack, grammar: Grammar, reason: str, is_handed_off: bool
) -> None:
    reply = await stack.finish(spec_with(grammar), is_handed_off=is_handed_off)
    assert reply.last.error.kind == common_pb2.ERROR_KIND_INVALID_REQUEST
    assert reason in reply.last.error.message
    good = await stack.finish(spec_with(regex_grammar("ab")), is_handed_off=is_handed_off)
    assert text_of(good.token_ids) == "ab"


async def test_an_output_that_is_not_of_the_grammar_is_refused(stack: Stack) -> None:
    spec = spec_with(regex_grammar("ab"), output_ids=tokenizer().encode("q").ids)
    reply = await stack.finish(spec, is_handed_off=False)
    assert reply.last.error.kind == common_pb2.ERROR_KIND_INVALID_REQUEST


async def test_an_empty_bad_word_is_refused(stack: Stack) -> None:
    reply = await stack.finish(spec_with(None, bad_words=[TokenIds()]), is_handed_off=False)
    assert "bad_words" in reply.last.error.message


@pytest.mark.parametrize("side", ["decode", "prefill"])
async def test_a_grammar_that_gets_too_much_on_the_way_is_the_callers_mistake(
    stack: Stack, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library gives up on a step: here because the test says so."""
    from engine.grammar.matcher import GrammarMatcher

    original = GrammarMatcher.check
    num_checks = 0

    def check(matcher: GrammarMatcher) -> None:
        nonlocal num_checks
        num_checks += 1
        original(matcher)
        if side == "prefill" or num_checks > 3:
            matcher.error = "the grammar is too much to follow: LexerTooComplex"

    monkeypatch.setattr(GrammarMatcher, "check", check)
    reply = await stack.finish(spec_with(schema_grammar()), is_handed_off=True)
    assert reply.last.error.kind == common_pb2.ERROR_KIND_INVALID_REQUEST
    assert "too much" in reply.last.error.message
    assert len(reply.token_ids) == (0 if side == "prefill" else 3)
    monkeypatch.undo()
    again = await stack.finish(spec_with(regex_grammar("ab")), is_handed_off=True)
    assert text_of(again.token_ids) == "ab"


async def test_a_worker_without_grammars_says_so() -> None:
    async with decode_worker(build_fake_engine()) as decode, router_link(decode) as router:
        reply = await router.finish(spec_with(regex_grammar("ab")))
        assert "structured output" in reply.last.error.message
        await decode.until_idle()


class TestSlowCompilers:
    gate = threading.Event()

    @pytest.fixture
    def load_vocabulary(self) -> Callable[[], Any]:
        self.gate.clear()

        def load() -> Any:
            assert self.gate.wait(30)
            return load_tiny_vocabulary()

        return load

    async def test_a_request_can_be_cancelled_while_its_grammar_is_compiled(self, stack: Stack) -> None:
        key, reply = await stack.router.submit(spec_with(regex_grammar("ab")), stack.prefill)
        other = await stack.router.finish(spec_with(None, max_tokens=3), stack.prefill)
        assert len(other.token_ids) == 3  # nobody else waits
        await stack.router.cancel(key)
        await reply.ended.wait()
        assert reply.last.finish_reason == common_pb2.FINISH_REASON_ABORTED
        await stack.decode.until_idle()
        self.gate.set()

    async def test_compiling_has_a_time_limit(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(grammars, "COMPILE_TIMEOUT_S", 0.2)
        replies = [await stack.router.submit(spec_with(regex_grammar("ab"))) for _ in range(3)]
        for _, reply in replies:
            await reply.ended.wait()
        kinds = [reply.last.error.kind for _, reply in replies]
        # Two threads compile; the third had no chance.
        assert kinds[:2] == [common_pb2.ERROR_KIND_INVALID_REQUEST] * 2
        assert kinds[2] == common_pb2.ERROR_KIND_OVERLOADED
        await stack.decode.until_idle()
        self.gate.set()
