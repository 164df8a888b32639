"""From the text of a grammar to a matcher, on threads of its own.

Compiling is bounded three times: by the size of the text (grammar.py), by the fuel that the library gives its
lexer, and by the time that a caller waits. The library also bounds each mask; beyond that the matcher fails.
The threads have deep stacks because the library descends into rules that name each other.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from engine.grammar.grammar import Grammar, GrammarError, GrammarKind
from engine.grammar.matcher import GrammarMatcher
from engine.grammar.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

NUM_THREADS = 2
MAX_CACHED = 256  # grammars; a small one takes some ten kilobytes
MAX_LEXER_STATES = 50_000  # of one sequence, up to 2 KB each; real schemas have hundreds
_STACK_BYTES = 512 << 20  # of address space: pages that nobody touches cost nothing
_MAX_ERROR_CHARS = 300

OnCompiled = Callable[[float], None]


class GrammarCompiler:
    def __init__(self, load: Callable[[], LLTokenizer]) -> None:
        """`load` is called once, on a thread of the compiler, when the first grammar comes. It may raise
        GrammarError."""
        self.on_compiled: OnCompiled = lambda seconds: None  # on a thread of the compiler
        self._load = load
        self._vocabulary: LLTokenizer | None = None
        self._lock = threading.Lock()  # of the vocabulary and the cache
        self._loading = threading.Lock()
        self._cache: OrderedDict[tuple[GrammarKind, str, bool], LLMatcher] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None

    def compile(self, grammar: Grammar, output_ids: Sequence[int] = ()) -> Future[GrammarMatcher]:
        """A matcher that has read output_ids. The future's GrammarError: the grammar cannot be used, or
        output_ids are not of it. To be called on one thread."""
        if self._pool is None:
            self._pool = _deep_threads()
        return self._pool.submit(self._build, grammar, array("q", output_ids))

    def close(self) -> None:
        """Without waiting for a compilation under way."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _build(self, grammar: Grammar, output_ids: array[int]) -> GrammarMatcher:
        key = (grammar.kind, grammar.text, grammar.is_compact)
        with self._lock:
            known = self._cache.get(key)
            if known is not None:
                self._cache.move_to_end(key)
        if known is None:
            known = self._compile(grammar)
            with self._lock:
                self._cache[key] = known
                if len(self._cache) > MAX_CACHED:
                    self._cache.popitem(last=False)
        num_mask_bytes = (self._loaded().vocab_size + 31) // 32 * 4
        matcher = GrammarMatcher(
            known.deep_copy(), num_mask_bytes=num_mask_bytes, begin_after=grammar.begin_after
        )
        matcher.follow(output_ids, 0)
        if matcher.error is not None:
            raise GrammarError(matcher.error)
        return matcher

    def _compile(self, grammar: Grammar) -> LLMatcher:
        vocabulary = self._loaded()
        began = time.monotonic()
        grammar.check()
        from llguidance import LLMatcher, LLParserLimits

        # Verbose errors quote the output.
        limits = LLParserLimits(verbose_errors=False, max_lexer_states=MAX_LEXER_STATES)
        matcher = LLMatcher(vocabulary, _source(grammar), log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(_one_line(matcher.get_error()))
        self.on_compiled(time.monotonic() - began)
        return matcher

    def _loaded(self) -> LLTokenizer:
        with self._loading:
            if self._vocabulary is None:
                self._vocabulary = self._load()
            return self._vocabulary


def compiler_for_model(model_dir: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> GrammarCompiler:
    return GrammarCompiler(lambda: load_vocabulary(model_dir, vocab_size, eos_token_ids))


def _source(grammar: Grammar) -> str:
    """In the library's own notation."""
    from llguidance import LLMatcher, grammar_from, regex_to_lark

    if grammar.kind in (GrammarKind.JSON_SCHEMA, GrammarKind.JSON_OBJECT):
        text = grammar.text if grammar.kind is GrammarKind.JSON_SCHEMA else '{"type": "object"}'
        try:
            return LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_flexible": False} if grammar.is_compact else None
            )
        except ValueError as error:
            raise GrammarError(_one_line(str(error))) from error
    if grammar.kind is GrammarKind.REGEX:
        # Digits of all the world's scripts are not what somebody means who asks for a date.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(grammar.text, use_ascii='d')}/")
    try:
        return grammar_from(grammar.kind.value, grammar.text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(_one_line(str(error))) from error


def _one_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip() and "non-verbose" not in line]
    return "; ".join(lines)[:_MAX_ERROR_CHARS]


def _deep_threads() -> ThreadPoolExecutor:
    """All threads are started here, because the size of a stack is a setting of the whole process."""
    pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
    before = threading.stack_size(_STACK_BYTES)
    try:
        meeting = threading.Barrier(NUM_THREADS)
        for done in [pool.submit(meeting.wait) for _ in range(NUM_THREADS)]:
            done.result()
    finally:
        threading.stack_size(before)
    return pool
