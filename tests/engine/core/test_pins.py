from __future__ import annotations

from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from kvstore.block_hash import BlockHash
from tests.engine.core.engine_driver import generate, run
from tests.fakes.fake_model import build_fake_engine, expected_tokens

PROMPT = list(range(1, 34))  # 8 full blocks of 4 and one token


def _hashes(engine, prompt_ids: list[int]) -> list[BlockHash]:  # type: ignore[no-untyped-def]
    return engine.hash_chain.hashes(prompt_ids, "")


def test_a_pin_holds_the_leading_blocks_that_are_there() -> None:
    engine = build_fake_engine()
    generate(engine, [PROMPT], 1)
    run_ = engine.pin([*_hashes(engine, PROMPT), BlockHash(bytes(16))])
    assert run_.num_blocks == 8
    assert engine.load().num_cached_blocks == 0
    engine.check_integrity()
    engine.unpin(run_.pin_id)
    engine.unpin(run_.pin_id)
    assert engine.load().num_cached_blocks == 8
    engine.check_integrity()


def test_pinned_blocks_keep_their_content_while_everything_else_is_evicted() -> None:
    engine = build_fake_engine(num_blocks=24)
    generate(engine, [PROMPT], 1)
    pinned = engine.pin(_hashes(engine, PROMPT))
    before = bytes(pinned.read_blocks(0, 8))
    for i in range(4):
        other = [(7 * j + i) % 200 + 1 for j in range(50)]
        assert generate(engine, [other], 2, first_id=10 + i) == [expected_tokens(other, 2)]
        engine.check_integrity()
    assert bytes(pinned.read_blocks(0, 8)) == before
    engine.unpin(pinned.pin_id)
    assert engine.load().num_free_blocks + engine.load().num_cached_blocks == 24


def test_a_sequence_that_waits_for_pinned_blocks_runs_when_they_come_back() -> None:
    engine = build_fake_engine(num_blocks=12)
    generate(engine, [PROMPT], 1)
    pinned = engine.pin(_hashes(engine, PROMPT))
    other = list(range(100, 130))
    engine.add(Sequence(5, other, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=2)))
    tokens, _ = run(engine)
    assert tokens == {} and not engine.has_work
    engine.unpin(pinned.pin_id)
    tokens, _ = run(engine)
    assert tokens[5] == expected_tokens(other, 2)


def test_the_pin_of_nothing_is_empty() -> None:
    engine = build_fake_engine()
    pinned = engine.pin(_hashes(engine, PROMPT))
    assert pinned.num_blocks == 0
    engine.unpin(pinned.pin_id)
    engine.check_integrity()
