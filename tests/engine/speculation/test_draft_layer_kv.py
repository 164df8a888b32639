"""Wrong KV of the layer of multi-token prediction would change no token, only drafts: whatever happens to a
sequence, its drafts stay those of a sequence to which nothing happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mtp_driver import Recorder, build, random_prompts

from engine.engine import Engine
from engine.sequence import Sequence
from tests.engine.core.engine_driver import greedy, hand_off
from tests.engine.tiers.tier_driver import PeerOf

LENGTHS = (1, 5, 16, 17, 40, 100)
PROMPTS = random_prompts(LENGTHS)
NUM_TOKENS = 24


@pytest.fixture(scope="module", params=["agreeing", "disagreeing"])
def model_dir(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> Recorder:
    """One after another, each prompt in one step."""
    recorder = Recorder(build(model_dir, 1))
    for seq_id, prompt_ids in enumerate(PROMPTS):
        recorder.add(Sequence(seq_id, prompt_ids, greedy(NUM_TOKENS)))
        recorder.run()
    assert len(set(recorder.drafts.values())) > 20
    return recorder


def check(found: Recorder, expected: Recorder, min_common: float = 0.9) -> None:
    assert found.tokens == expected.tokens
    common = found.drafts.keys() & expected.drafts.keys()
    assert len(common) >= min_common * len(expected.drafts)
    assert {key: found.drafts[key] for key in common} == {key: expected.drafts[key] for key in common}


def run(engine: Engine, seqs: list[Sequence] | None = None) -> Recorder:
    recorder = Recorder(engine)
    for seq in seqs or [Sequence(i, prompt_ids, greedy(NUM_TOKENS)) for i, prompt_ids in enumerate(PROMPTS)]:
        recorder.add(seq)
    return recorder.run()


@pytest.mark.parametrize("token_budget", [512, 33, 24])
def test_a_mixed_batch_in_chunks(model_dir: Path, expected: Recorder, token_budget: int) -> None:
    """Where the budget is short drafts wait, so fewer are made."""
    found = run(build(model_dir, 1, token_budget=token_budget))
    check(found, expected)


def test_prefix_hits(model_dir: Path, expected: Recorder) -> None:
    engine = build(model_dir, 1)
    run(engine)
    for _ in range(2):  # what the second finds may have been made by the first
        found = run(engine)
        assert found.engine._pool.num_cached > 10
        check(found, expected)


def test_an_answer_that_became_part_of_a_prompt(model_dir: Path, expected: Recorder) -> None:
    """Blocks that decodes with drafts filled."""
    engine = build(model_dir, 1)
    run(engine)
    prompt_ids, tokens = PROMPTS[4], expected.tokens[4]
    found = run(engine, [Sequence(4, prompt_ids + tokens[:10], greedy(14))])
    assert found.tokens[4] == tokens[10:]
    common = found.drafts.keys() & expected.drafts.keys()
    assert common
    assert all(found.drafts[key] == expected.drafts[key] for key in common)


def test_preemption(model_dir: Path, expected: Recorder) -> None:
    found = run(build(model_dir, 1, num_blocks=10, growth_tokens=1))
    assert found.num_preemptions > 0
    check(found, expected, min_common=0.6)


@pytest.mark.parametrize("has_draft", [True, False])
def test_hand_offs(model_dir: Path, expected: Recorder, *, has_draft: bool) -> None:
    sender, receiver = build(model_dir, 1, token_budget=48), build(model_dir, 1)
    recorder = Recorder(receiver)
    for seq_id, prompt_ids in enumerate(PROMPTS):
        _, first = hand_off(sender, receiver, seq_id, prompt_ids, NUM_TOKENS, has_draft=has_draft)
        assert first.draft is not None
        if has_draft and len(prompt_ids) % 16:
            assert first.draft.token_ids == (expected.drafts[seq_id, len(prompt_ids) + 1],)
        recorder.watch(receiver._seqs[seq_id], first.token_ids)
        recorder.step()
    recorder.run()
    # A sequence that is busy with its first token when its draft should be made has one less.
    check(recorder, expected, min_common=0.8)


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_blocks_from_lower_tiers(model_dir: Path, expected: Recorder, tmp_path: Path, kind: str) -> None:
    tiers: dict[str, Any] = {"host_kv_bytes": 64 << 20}
    if kind == "disk":
        tiers = {"disk_kv_dir": tmp_path, "disk_kv_bytes": 64 << 20}
    engine = build(model_dir, 1, num_blocks=13, max_model_len=200, **tiers)
    recorder = Recorder(engine)
    for _ in range(3):
        recorder.tokens.clear()
        for seq_id, prompt_ids in enumerate(PROMPTS):
            recorder.add(Sequence(seq_id, prompt_ids, greedy(NUM_TOKENS)))
            recorder.run_until_ended(seq_id)
        check(recorder, expected)
    assert recorder.num_loads > 0
    engine.close()


@pytest.mark.parametrize("fails_after", [None, 2])
def test_blocks_from_a_peer(model_dir: Path, expected: Recorder, fails_after: int | None) -> None:
    holder, engine = build(model_dir, 1), build(model_dir, 1)
    run(holder)
    block_ids = holder._pool.lookup(holder.hash_chain.hashes(PROMPTS[5]))
    assert len(block_ids) == 6
    source = PeerOf(holder.kv_cache, block_ids, block_s=0.003, fails_after=fails_after).into(engine.kv_cache)
    recorder = Recorder(engine)
    recorder.add(Sequence(5, PROMPTS[5], greedy(NUM_TOKENS), kv_source=source))
    recorder.run_until_ended(5)
    assert recorder.tokens[5] == expected.tokens[5]
    wanted = {key: draft for key, draft in expected.drafts.items() if key[0] == 5}
    assert {key: recorder.drafts.get(key) for key in wanted} == wanted
    assert source.num_written
    assert source.thread is not None
    source.thread.join(10)
