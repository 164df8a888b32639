"""A prefix that is loaded while it is computed: whatever the source does, the tokens are the same and every
block comes back."""

from __future__ import annotations

import random
import threading

import pytest

from engine.engine import Engine
from engine.outputs import LoadOutcome
from engine.sequence import Sequence
from tests.engine.core.engine_driver import CopyingListener, generate, greedy
from tests.engine.tiers.tier_driver import Driver, PeerOf, lower_tiers
from tests.fakes.fake_model import build_fake_engine, expected_tokens

NUM_BLOCKS = 12
PROMPT = [(7 * i + 3) % 200 + 1 for i in range(4 * NUM_BLOCKS + 3)]
EXPECTED = expected_tokens(PROMPT, 5)


@pytest.fixture(scope="module")
def holder() -> Engine:
    engine = build_fake_engine()
    generate(engine, [PROMPT], 1)
    return engine


def peer(holder: Engine, target: Engine, num_blocks: int = NUM_BLOCKS, **behaviour: object) -> PeerOf:
    block_ids = holder._pool.lookup(holder.hash_chain.hashes(PROMPT))[:num_blocks]
    assert len(block_ids) == num_blocks
    return PeerOf(holder.kv_cache, block_ids, **behaviour).into(target.kv_cache)  # type: ignore[arg-type]


def driver_of(num_compute_blocks: int | None, *, num_blocks: int = 32, token_budget: int = 20) -> Driver:
    engine = build_fake_engine(
        num_blocks=num_blocks, token_budget=token_budget, max_running=4, growth_tokens=4
    )
    return Driver(engine, num_compute_blocks)


def finish(driver: Driver, source: PeerOf) -> None:
    driver.until_done()
    assert source.thread is not None
    source.thread.join(10)
    driver.until_done()
    driver.engine.check_integrity()
    assert driver.engine.load().num_used_blocks == 0


@pytest.mark.parametrize("num_compute_blocks", [0, 1, 5])
@pytest.mark.parametrize("stride", [1, 5])
@pytest.mark.parametrize("fails_after", [None, *range(NUM_BLOCKS + 1)])
def test_source_that_fails_at_any_point_changes_no_token(
    holder: Engine, num_compute_blocks: int, stride: int, fails_after: int | None
) -> None:
    driver = driver_of(num_compute_blocks)
    source = peer(holder, driver.engine, stride=stride, fails_after=fails_after, block_s=0.0005)
    driver.engine.add(Sequence(1, PROMPT, greedy(5), kv_source=source))
    finish(driver, source)
    assert driver.tokens[1] == EXPECTED
    output = driver.outputs[1]
    assert output.num_hit_tokens == output.num_fetched_tokens == 4 * source.num_written
    assert output.num_loaded_tokens == 0 and (output.load_s > 0) == (source.num_written > 0)
    (load,) = driver.loads
    assert load.tier is None and load.num_blocks == source.num_written
    if fails_after is None and num_compute_blocks == 0:
        assert load.outcome is LoadOutcome.COMPLETE and source.num_written == NUM_BLOCKS
    if fails_after is not None and num_compute_blocks == 0 and stride == 1 and fails_after < NUM_BLOCKS:
        assert load.outcome is LoadOutcome.FAILED


@pytest.mark.parametrize("has_blocks", [1, 5, NUM_BLOCKS - 1])
@pytest.mark.parametrize("num_compute_blocks", [0, 2])
def test_source_that_has_less_than_it_said(holder: Engine, has_blocks: int, num_compute_blocks: int) -> None:
    driver = driver_of(num_compute_blocks)
    source = peer(holder, driver.engine, has_blocks=has_blocks)
    driver.engine.add(Sequence(1, PROMPT, greedy(5), kv_source=source))
    finish(driver, source)
    assert driver.tokens[1] == EXPECTED
    assert driver.outputs[1].num_fetched_tokens == 4 * source.num_written <= 4 * has_blocks


def test_prompt_of_whole_blocks_computes_its_last_one(holder: Engine) -> None:
    """The logits of the last token are needed."""
    driver = driver_of(0)
    source = peer(holder, driver.engine)
    prompt_ids = PROMPT[: 4 * NUM_BLOCKS]
    driver.engine.add(Sequence(1, prompt_ids, greedy(3), kv_source=source))
    finish(driver, source)
    assert driver.tokens[1] == expected_tokens(prompt_ids, 3)
    assert source.num_written == NUM_BLOCKS - 1


def test_slow_source_holds_nobody_and_is_overtaken(holder: Engine) -> None:
    driver = driver_of(None, token_budget=40)
    generate(driver.engine, [[5] * 30], 8, first_id=90)  # the planner knows how fast compute is
    source = peer(holder, driver.engine, block_s=0.2)
    driver.engine.add(Sequence(1, PROMPT, greedy(5), kv_source=source))
    driver.step()
    driver.engine.add(Sequence(2, [9] * 10, greedy(20)))
    driver.until(lambda: len(driver.tokens.get(2, [])) == 20)
    finish(driver, source)
    assert driver.tokens[1] == EXPECTED and driver.tokens[2] == expected_tokens([9] * 10, 20)
    assert source.num_written < NUM_BLOCKS


def test_source_that_hangs_is_given_less_and_less(holder: Engine) -> None:
    driver = driver_of(None, token_budget=40)
    generate(driver.engine, [[5] * 30], 8, first_id=90)
    starts = threading.Event()
    source = peer(holder, driver.engine, starts=starts)  # it promises to take no time
    driver.engine.add(Sequence(1, PROMPT, greedy(5), kv_source=source))
    driver.until(lambda: len(driver.tokens.get(1, [])) == 5)
    assert driver.tokens[1] == EXPECTED
    assert source.num_written == 0
    starts.set()
    finish(driver, source)


def test_blocks_that_a_source_still_writes_are_given_to_nobody(holder: Engine) -> None:
    driver = driver_of(0, num_blocks=16)
    engine = driver.engine
    source = peer(holder, engine, stride=3)
    entered, may_write = threading.Event(), threading.Event()
    write = engine.kv_cache.write_blocks

    def slow_write(*args: object) -> None:
        entered.set()
        assert may_write.wait(20)
        write(*args)  # type: ignore[arg-type]

    engine.kv_cache.write_blocks = slow_write  # type: ignore[method-assign, assignment]
    engine.add(Sequence(1, PROMPT, greedy(5), kv_source=source))
    driver.step()
    assert entered.wait(20)
    engine.abort(1)
    engine.check_integrity()
    assert engine.load().num_used_blocks == 3
    # Everything else is free at once.
    other = [11] * 49
    engine.add(Sequence(2, other, greedy(3)))
    driver.until(lambda: len(driver.tokens.get(2, [])) == 3)
    assert driver.tokens[2] == expected_tokens(other, 3)
    assert engine.load().num_used_blocks == 3
    # One that needs the held blocks too waits for them, and is woken.
    engine.add(Sequence(3, [12] * 60, greedy(3)))
    while engine.has_work:
        driver.step()
    assert 3 not in driver.tokens
    may_write.set()
    finish(driver, source)
    assert driver.tokens[3] == expected_tokens([12] * 60, 3)


def test_listener_hears_of_loaded_blocks_once_and_of_the_right_bytes(holder: Engine) -> None:
    """The sending side of a hand-off that loads its prefix."""
    for num_compute_blocks in (0, 2):
        driver = driver_of(num_compute_blocks)
        receiver = build_fake_engine()
        receiver.reserve(Sequence(1, PROMPT, greedy(5)))
        listener = CopyingListener(driver.engine, receiver, 0)
        receiver.extend(1, listener.block_ids.extend)
        source = peer(holder, driver.engine, stride=2)
        seq = Sequence(1, PROMPT, greedy(5), keeps_blocks=True, kv_listener=listener, kv_source=source)
        driver.engine.add(seq)
        driver.until(lambda driver=driver: 1 in driver.tokens)  # type: ignore[misc]
        announced = [
            (layer, block)
            for first_layer, num_layers, first, num in listener.announced
            for layer in range(first_layer, first_layer + num_layers)
            for block in range(first, first + num)
        ]
        assert sorted(announced) == [(layer, b) for layer in range(3) for b in range(NUM_BLOCKS + 1)]
        blocks = receiver.kv_cache.read_blocks(0, 3, listener.block_ids[:NUM_BLOCKS])
        found = holder._pool.lookup(holder.hash_chain.hashes(PROMPT))
        assert bytes(blocks) == bytes(holder.kv_cache.read_blocks(0, 3, found))
        driver.engine.release(1)
        finish(driver, source)


@pytest.mark.parametrize("seed", range(25))
def test_random_aborts_and_preemptions_end_in_a_balanced_pool(holder: Engine, seed: int) -> None:
    generator = random.Random(seed)
    tiers = lower_tiers(generator.choice([12, 40])) if seed % 2 else None
    engine = build_fake_engine(num_blocks=26, token_budget=24, max_running=4, growth_tokens=1, tiers=tiers)
    driver = Driver(engine, generator.choice([0, 1, 4, None]))
    prompts: dict[int, list[int]] = {}
    sources: list[PeerOf] = []
    for seq_id in range(14):
        cut = generator.randrange(4, len(PROMPT))
        prompts[seq_id] = PROMPT[:cut] + [generator.randrange(1, 200) for _ in range(generator.randrange(12))]
        source = None
        if generator.random() < 0.6 and cut >= 4:
            source = peer(
                holder,
                engine,
                num_blocks=cut // 4,
                stride=generator.randrange(1, 4),
                block_s=generator.choice([0.0, 0.001, 0.004]),
                fails_after=generator.choice([None, None, 0, 1, 3]),
            )
            sources.append(source)
        engine.add(Sequence(seq_id, prompts[seq_id], greedy(9), kv_source=source))
        for _ in range(generator.randrange(4)):
            driver.step()
        if generator.random() < 0.3:
            gone = generator.choice(list(prompts))
            if gone in engine._seqs:
                engine.abort(gone)
                engine.check_integrity()
                del prompts[gone]
                driver.tokens.pop(gone, None)
    driver.until_done()
    for source in sources:
        if source.thread is not None:
            source.thread.join(10)
    driver.until_done()
    assert {i: driver.tokens[i] for i in prompts} == {i: expected_tokens(p, 9) for i, p in prompts.items()}
    load = engine.load()
    assert load.num_used_blocks == 0 and load.num_free_blocks + load.num_cached_blocks == 26
    engine.check_integrity()
    engine.close()
