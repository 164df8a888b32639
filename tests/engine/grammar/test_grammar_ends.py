"""Where a grammar meets the other parameters: ends, bans and lists."""

from __future__ import annotations

from typing import Any

import pytest

from engine.grammar.grammar import Grammar, GrammarKind
from engine.outputs import FinishReason, SequenceOutput
from tests.engine.grammar.grammar_driver import (
    engine_of,
    finished_text,
    run_all,
    sequence,
    text_of,
    tokenizer,
    tokens_of,
)
from tests.fakes.fake_model import EOS_TOKEN_ID

PROMPT = [7, 8, 9]
BAN = -100.0


def outputs_of(grammar: Grammar | None, **params: Any) -> list[SequenceOutput]:
    return run_all(engine_of(), [sequence(1, PROMPT, grammar, **{"temperature": 0.0, **params})])[1]


def regex(pattern: str, **fields: Any) -> Grammar:
    return Grammar(kind=GrammarKind.REGEX, text=pattern, **fields)


def token(text: str) -> int:
    (token_id,) = tokenizer().encode(text, add_special_tokens=False).ids
    return token_id


def test_a_finished_grammar_ends_the_output_whatever_else_was_asked() -> None:
    for params in (
        {"ignore_eos": True},
        {"min_tokens": 50},
        {"logit_bias": {EOS_TOKEN_ID: BAN}},
        {"allowed_token_ids": (token("b"),)},
        {"bad_words": ((EOS_TOKEN_ID,),)},
    ):
        assert finished_text(outputs_of(regex("abc"), **params)) == "abc"


def test_the_end_is_drawn_only_where_the_grammar_accepts_it() -> None:
    outputs = outputs_of(regex("(ab){4,}"), logit_bias={EOS_TOKEN_ID: 100.0})
    assert finished_text(outputs) == "abababab"


def test_an_ignored_end_and_min_tokens_let_the_output_go_on_while_it_can() -> None:
    eager = {"logit_bias": {EOS_TOKEN_ID: 100.0}}
    assert len(finished_text(outputs_of(regex("[ab]{1,20}"), ignore_eos=True, **eager))) == 20
    late = outputs_of(regex("[ab]{1,20}"), min_tokens=7, **eager)
    assert late[-1].finish_reason is FinishReason.STOP
    # the end itself is the first token that min_tokens does not count
    assert len(tokens_of(late)) == 8


def test_max_tokens_cuts_the_output_off() -> None:
    outputs = outputs_of(regex("[ab]{20}"), max_tokens=5)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert len(tokens_of(outputs)) == 5


def test_a_stop_token_ends_the_output_where_the_grammar_is_satisfied_and_not_before() -> None:
    stop = 2  # "</s>" is no end of this engine
    likely = {"stop_token_ids": frozenset({stop}), "logit_bias": {stop: 100.0}}
    tokens = tokens_of(outputs_of(regex("[ab]{6,20}"), **likely))
    assert tokens[-1] == stop
    assert len(tokenizer().decode(tokens[:-1])) == 6
    assert len(tokens_of(outputs_of(regex("[ab]{6,20}"), min_tokens=12, **likely))) == 13


def test_allowed_ids_and_bad_words_choose_within_the_grammar() -> None:
    letters = tuple(map(token, "bcxy"))
    text = finished_text(outputs_of(regex("[a-f]{12}"), allowed_token_ids=letters, temperature=1.0))
    assert set(text) == {"b", "c"}
    bad = tuple((token(a), token(b)) for a in "ab" for b in "ab" if a == b)
    allowed = (token("a"), token("b"))
    text = finished_text(outputs_of(regex("[ab]{12}"), allowed_token_ids=allowed, bad_words=bad))
    assert text in ("ab" * 6, "ba" * 6)


def test_penalties_and_bias_choose_within_the_grammar() -> None:
    text = finished_text(outputs_of(regex("[a-f]{12}"), logit_bias={token("d"): 90.0}))
    assert text == "d" * 12
    text = finished_text(outputs_of(regex("[a-f]{6}"), logit_bias={token("d"): 1.9}, presence_penalty=2.0))
    assert text.count("d") < 6


def test_special_tokens_are_no_text() -> None:
    """ "<think>" would be text of the expression; the token is not."""
    think = tokenizer().token_to_id("<think>")
    text = finished_text(
        outputs_of(regex("(a|<think>)b"), logit_bias={2: 100.0, think: 50.0, token("<"): 40.0})
    )
    assert text == "<think>b"


def test_the_grammar_begins_after_the_tokens_it_waits_for() -> None:
    begin = tuple(tokenizer().encode("go on", add_special_tokens=False).ids)
    assert len(begin) > 1
    grammar = regex("xyz", begin_after=begin)
    # The prompt does not begin it, even where it runs into the output.
    prompt, output_ids = [7, *begin[:1]], [*begin[1:], 50, *begin[:-1]]
    seq = sequence(1, prompt, grammar, output_ids=output_ids, temperature=0.0, logit_bias={begin[-1]: 100.0})
    tokens = tokens_of(run_all(engine_of(), [seq])[1])
    assert tokens[0] == begin[-1]
    assert text_of(tokens[1:]) == "xyz"
    moved = sequence(1, prompt, grammar, output_ids=[*output_ids, *tokens[:2]], temperature=0.0)
    assert text_of(tokens_of(run_all(engine_of(), [moved])[1])) == "yz"


def test_the_end_before_the_beginning_ends_the_output() -> None:
    grammar = regex("xyz", begin_after=(5, 6))
    outputs = outputs_of(grammar, logit_bias={EOS_TOKEN_ID: 100.0})
    assert tokens_of(outputs) == [EOS_TOKEN_ID]
    assert outputs[-1].finish_reason is FinishReason.STOP
    ignored = outputs_of(grammar, logit_bias={EOS_TOKEN_ID: 100.0}, ignore_eos=True, max_tokens=4)
    assert tokens_of(ignored) == [EOS_TOKEN_ID] * 4


def test_an_output_that_the_grammar_cannot_follow_ends_with_an_error_and_harms_nobody() -> None:
    engine = engine_of()
    broken = sequence(1, PROMPT, regex("[ab]{30}"), temperature=0.0)
    other = sequence(2, PROMPT, regex("[ab]{30}"), temperature=0.0)
    engine.add(broken)
    engine.add(other)
    engine.step()
    broken.token_ids[-1] = token("z")  # as after a hand-off from a worker that knows another grammar
    outputs = [output for _ in range(2) for output in engine.step().outputs]
    (failed,) = [output for output in outputs if output.seq_id == 1]
    assert failed.finish_reason is FinishReason.ABORTED
    assert failed.error == "the output so far does not match the grammar"
    assert failed.token_ids == ()
    engine.check_integrity()
    rest = []
    while engine.has_work:
        rest += engine.step().outputs
    assert rest[-1].finish_reason is FinishReason.STOP


def test_a_grammar_without_its_matcher_is_refused() -> None:
    seq = sequence(1, PROMPT, regex("a"))
    seq.matcher = None
    with pytest.raises(ValueError, match="matcher"):
        engine_of().add(seq)


@pytest.mark.parametrize("field", ["allowed_token_ids", "bad_words"])
def test_ids_outside_the_vocabulary_are_refused(field: str) -> None:
    value = (5, 320) if field == "allowed_token_ids" else ((5,), (6, 320))
    with pytest.raises(ValueError, match="320 is not in the vocabulary"):
        engine_of().add(sequence(1, PROMPT, None, **{field: value}))


def test_steps_tell_what_masks_cost() -> None:
    engine = engine_of()
    engine.add(sequence(1, PROMPT, regex("[ab]{5}")))
    engine.add(sequence(2, PROMPT, None, ignore_eos=True, max_tokens=9))
    times = []
    while engine.has_work:
        times.append(engine.step().stats.grammar)
    with_mask = [each for each in times if each.num_masks]
    assert 2 <= len(with_mask) <= 6 < len(times)
    assert all(each.num_masks == 1 and each.mask_s > 0 and each.wait_s >= 0 for each in with_mask)
