"""Whatever the grammar and the weights: the output is of it, and the road there does not change it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.outputs import FinishReason, TokenLogprobs
from tests.engine.core.engine_driver import CopyingListener
from tests.engine.grammar.grammar_driver import (
    Form,
    engine_of,
    finished_text,
    forms,
    run_all,
    sequence,
    text_of,
    tokens_of,
)

PROMPT = list(range(3, 17))
slow = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
temperatures = st.sampled_from([0.0, 1.0])


@slow
@given(st.lists(forms, min_size=1, max_size=4), temperatures, st.integers(0, 1000))
def test_outputs_are_of_their_grammars_and_rows_without_one_are_untouched(
    chosen: list[Form], temperature: float, start: int
) -> None:
    prompts = [[start % 300 + i, *PROMPT] for i in range(len(chosen) + 1)]
    seqs = [sequence(i, prompts[i], form.grammar, temperature=temperature) for i, form in enumerate(chosen)]
    free = sequence(99, prompts[-1], None, temperature=temperature, max_tokens=30)
    outputs = run_all(engine_of(), [*seqs, free])
    for form, seq in zip(chosen, seqs, strict=True):
        text = finished_text(outputs[seq.seq_id])
        assert form.accepts(text), text
    alone = run_all(engine_of(), [sequence(99, prompts[-1], None, temperature=temperature, max_tokens=30)])
    assert tokens_of(outputs[99]) == tokens_of(alone[99])


@slow
@given(forms, temperatures, st.integers(0, 1000), st.data())
def test_a_hand_off_and_a_migration_change_no_token(
    form: Form, temperature: float, seed: int, data: st.DataObject
) -> None:
    params = {"temperature": temperature, "seed": seed}
    expected = tokens_of(run_all(engine_of(), [sequence(1, PROMPT, form.grammar, **params)])[1])
    assert form.accepts(text_of(expected))
    num_emitted = data.draw(st.integers(0, len(expected) - 1))
    before = expected[:num_emitted]

    migrated = run_all(engine_of(), [sequence(1, PROMPT, form.grammar, output_ids=before, **params)])
    assert before + tokens_of(migrated[1]) == expected
    assert before + _hand_off(form, before, **params) == expected


def _hand_off(form: Form, before: list[int], **params: float) -> list[int]:
    """New tokens of a sequence that is prefilled on one engine and decoded on another."""
    sender, receiver = engine_of(), engine_of()
    num_held = receiver.reserve(sequence(1, PROMPT, form.grammar, output_ids=before, **params))
    listener = CopyingListener(sender, receiver, num_held)
    receiver.extend(1, listener.block_ids.extend)
    sent = sequence(
        1, PROMPT, form.grammar, output_ids=before, keeps_blocks=True, kv_listener=listener, **params
    )
    first = run_all(sender, [sent])[1]
    sender.release(1)
    (token_id,) = tokens_of(first)
    ended = receiver.commit(1, TokenLogprobs(token_id, 0.0))
    rest: list[int] = []
    while receiver.has_work:
        rest += tokens_of(receiver.step().outputs)
    assert ended is None or (ended.finish_reason is FinishReason.STOP and not rest)
    return [token_id, *rest]


@slow
@given(st.lists(forms, min_size=4, max_size=4), temperatures)
def test_preemption_changes_no_token(chosen: list[Form], temperature: float) -> None:
    prompts = [[i + 3, *PROMPT] for i in range(len(chosen))]

    def seqs() -> list[int]:
        return list(range(len(chosen)))

    def build(i: int):  # type: ignore[no-untyped-def]
        return sequence(i, prompts[i], chosen[i].grammar, temperature=temperature, max_tokens=60)

    # 16 tokens of prompt are 4 blocks; room for three sequences, and as good as none to grow
    crowded = engine_of(num_blocks=20, growth_tokens=1)
    together = run_all(crowded, [build(i) for i in seqs()])
    for i in seqs():
        alone = run_all(engine_of(), [build(i)])
        assert tokens_of(together[i]) == tokens_of(alone[i])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_crowded_engines_do_preempt(temperature: float) -> None:
    from tests.engine.grammar.grammar_driver import regex_form

    engine = engine_of(num_blocks=20, growth_tokens=1)
    form = regex_form("([a-z]{3} ){15}end")
    for i in range(4):
        engine.add(sequence(i, [i + 3, *PROMPT], form.grammar, temperature=temperature, max_tokens=60))
    num_preemptions, tokens = 0, {i: [] for i in range(4)}
    while engine.has_work:
        step = engine.step()
        num_preemptions += step.stats.num_preemptions
        for output in step.outputs:
            tokens[output.seq_id] += output.token_ids
    assert num_preemptions > 0
    for token_ids in tokens.values():
        assert len(token_ids) == 60 or form.accepts(text_of(token_ids))
