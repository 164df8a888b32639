"""Blocks that left the device come back from host memory and disk, and change no token."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.outputs import LoadOutcome
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.tiers import block_source
from kvstore.block_hash import BlockTier
from tests.engine.core.engine_driver import greedy
from tests.engine.tiers.tier_driver import Driver, lower_tiers
from tests.fakes.fake_model import build_fake_engine, expected_tokens, fake_kv_layout

NUM_BLOCKS = 20  # full ones of a prompt


def prompt(seed: int, num_tokens: int = 4 * NUM_BLOCKS + 3) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1, 200) for _ in range(num_tokens)]


def ask(driver: Driver, seq_id: int, prompt_ids: list[int], num_tokens: int = 4) -> list[int]:
    driver.engine.add(Sequence(seq_id, prompt_ids, greedy(num_tokens)))
    driver.until_done()
    return driver.tokens[seq_id]


@contextmanager
def driven(
    directory: Path | None, num_slots: int, *, num_blocks: int = 24, num_compute_blocks: int | None = 0
) -> Iterator[Driver]:
    tiers = lower_tiers(num_slots, directory)
    engine = build_fake_engine(num_blocks=num_blocks, token_budget=20, max_running=4, tiers=tiers)
    try:
        yield Driver(engine, num_compute_blocks)
    finally:
        engine.close()


TIERS = {"host": (None, 64), "disk": ("kv", 0), "both": ("kv", 64)}


@pytest.fixture(params=TIERS)
def tiers(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path | None, int]:
    name, num_slots = TIERS[request.param]
    return (tmp_path / name if name else None), num_slots


@pytest.mark.parametrize("num_compute_blocks", [0, 1, 3, None], ids=["load", "one", "three", "planned"])
def test_prompts_that_evict_each_other_come_back(
    tiers: tuple[Path | None, int], num_compute_blocks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_bytes = dict.fromkeys(BlockTier, 2 * fake_kv_layout().block_bytes)
    monkeypatch.setattr(block_source, "CLAIM_BYTES", claim_bytes)
    with driven(*tiers, num_compute_blocks=num_compute_blocks) as driver:
        prompts = [prompt(seed) for seed in range(3)]
        for i, prompt_ids in enumerate(prompts):
            assert ask(driver, i, prompt_ids) == expected_tokens(prompt_ids, 4)
        num_prefilled = driver.num_prefilled
        for i, prompt_ids in enumerate(prompts):
            assert ask(driver, 10 + i, prompt_ids) == expected_tokens(prompt_ids, 4)
            output = driver.outputs[10 + i]
            if num_compute_blocks == 0:
                assert output.num_hit_tokens == 4 * NUM_BLOCKS
                assert output.num_loaded_tokens > 0 and output.load_s > 0
            assert output.num_loaded_tokens <= output.num_hit_tokens <= 4 * NUM_BLOCKS
            assert output.num_fetched_tokens == 0
        hits = sum(step.stats.num_hit_tokens for step in driver.steps)
        assert hits == sum(output.num_hit_tokens for output in driver.outputs.values())
        assert driver.num_prefilled - num_prefilled == 3 * (4 * NUM_BLOCKS + 3) - hits
        if num_compute_blocks is not None:
            slowest = BlockTier.DISK if tiers[1] == 0 else BlockTier.HOST
            assert max(load.tier for load in driver.loads if load.tier is not None) == slowest


def test_next_turn_loads_prompt_and_answer() -> None:
    with driven(None, 128, num_blocks=32) as driver:
        first = prompt(1)
        answer = ask(driver, 1, first, 10)
        for seed in (2, 3):
            ask(driver, seed, prompt(seed, 100))
        second = [*first, *answer, *prompt(3, 7)]
        assert ask(driver, 4, second) == expected_tokens(second, 4)
        # The KV of the last token of an answer is never computed.
        assert driver.outputs[4].num_loaded_tokens > 0
        assert driver.outputs[4].num_hit_tokens == (len(first) + len(answer) - 1) // 4 * 4


def test_blocks_that_a_killed_process_left_are_found(tmp_path: Path) -> None:
    prompt_ids = prompt(1)
    with driven(tmp_path, 0) as driver:
        ask(driver, 1, prompt_ids)
        known = set(driver.tier_of)
    with driven(tmp_path, 0) as driver:
        driver.until_done()
        assert driver.tier_of == dict.fromkeys(known, BlockTier.DISK)
        assert set(driver.engine.cached_hashes()) == known
        assert ask(driver, 2, prompt_ids) == expected_tokens(prompt_ids, 4)
        assert driver.outputs[2].num_loaded_tokens == 4 * NUM_BLOCKS
        assert all(driver.tier_of[block_hash] is BlockTier.DEVICE for block_hash in known)


@pytest.mark.parametrize("which", [0, 7, NUM_BLOCKS - 1])
@pytest.mark.parametrize("how", ["flipped", "short", "gone"])
def test_damaged_file_is_a_miss_and_is_removed(
    tmp_path: Path, which: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_source, "CLAIM_BYTES", dict.fromkeys(BlockTier, 1))
    prompt_ids = prompt(1)
    with driven(tmp_path, 0) as driver:
        ask(driver, 1, prompt_ids)
    with driven(tmp_path, 0) as driver:
        damaged = driver.engine.hash_chain.hashes(prompt_ids)[which]
        (path,) = tmp_path.glob(f"{damaged.hex()}-*.kv")
        contents = bytearray(path.read_bytes())
        contents[5] ^= 1
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(contents[:-1] if how == "short" else contents)
        assert ask(driver, 2, prompt_ids) == expected_tokens(prompt_ids, 4)
        assert driver.outputs[2].num_loaded_tokens == 4 * (NUM_BLOCKS - 1 - which)
        assert driver.loads[-1].outcome is LoadOutcome.FAILED
        # It was computed again, so it is written again.
        driver.until_done()
        assert ask(driver, 3, prompt(2)) and ask(driver, 4, prompt_ids) == expected_tokens(prompt_ids, 4)
        assert driver.outputs[4].num_loaded_tokens == 4 * NUM_BLOCKS - driver_hits(driver, 4)


def driver_hits(driver: Driver, seq_id: int) -> int:
    """Tokens that were on the device still."""
    output = driver.outputs[seq_id]
    return output.num_hit_tokens - output.num_loaded_tokens


def test_events_name_the_fastest_tier(tmp_path: Path) -> None:
    with driven(tmp_path, 24) as driver:
        for seed in range(4):
            ask(driver, seed, prompt(seed))
        engine = driver.engine
        places = engine._tiers.places
        assert set(driver.tier_of) == set(engine.cached_hashes())
        for block_hash, tier in driver.tier_of.items():
            expected = BlockTier.DEVICE
            if places.pool.block_of(block_hash) is None:
                assert places.lower_tier(block_hash) is not None
                expected = places.lower_tier(block_hash)
            assert tier is expected
        assert set(driver.tier_of.values()) == set(BlockTier)


def test_full_disk_loses_only_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with driven(tmp_path, 64) as driver:

        def no_room(*_: object) -> None:
            raise OSError(28, "No space left on device")

        assert driver.engine._tiers.places.disk is not None
        monkeypatch.setattr(type(driver.engine._tiers.places.disk.directory), "write", no_room)
        prompts = [prompt(seed) for seed in range(3)]
        for i in range(6):
            assert ask(driver, i, prompts[i % 3]) == expected_tokens(prompts[i % 3], 4)
        assert driver.outputs[5].num_loaded_tokens > 0
        assert driver.steps[-1].stats.tiers[1].num_lost_blocks >= 3 * NUM_BLOCKS
        assert not list(tmp_path.glob("*.kv"))


def test_what_was_lost_is_saved_when_it_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with driven(None, 64, num_blocks=48) as driver:
        write_behind = driver.engine._tiers._write_behind
        assert write_behind is not None
        monkeypatch.setattr(write_behind, "_max_pending", 0)
        ask(driver, 1, prompt(1))
        assert write_behind.num_lost >= NUM_BLOCKS and not driver.engine._tiers.places.host.hashes()  # type: ignore[union-attr]
        monkeypatch.undo()
        ask(driver, 2, prompt(1))
        hashes = driver.engine.hash_chain.hashes(prompt(1))
        assert driver.engine._tiers.places.num_leading(hashes) == NUM_BLOCKS


def test_pins_are_of_every_tier_and_bounded(tmp_path: Path) -> None:
    with driven(tmp_path, 24) as driver:
        engine = driver.engine
        for seed in range(4):
            ask(driver, seed, prompt(seed))
        runs = []
        for seed in range(4):
            hashes = engine.hash_chain.hashes(prompt(seed))
            places = engine._tiers.places
            run = engine.pin(hashes)
            runs.append(run)
            assert [place.block_hash for place in run.places] == hashes[: run.num_blocks]
            engine.check_integrity()
            assert run.num_blocks == len(run.places) and places.pool.num_used <= 18
        assert sum(run.num_blocks for run in runs) == 18  # three quarters of 24
        before = [bytes(run.read_blocks(0, run.num_blocks)) for run in runs if run.num_blocks]
        for seed in range(4, 9):
            ask(driver, seed, prompt(seed, 20))
        assert before == [bytes(run.read_blocks(0, run.num_blocks)) for run in runs if run.num_blocks]
        for run in runs:
            engine.unpin(run.pin_id)
            engine.unpin(run.pin_id)
        engine.check_integrity()
        assert engine.load().num_used_blocks == 0
        assert all(tier.num_used_blocks == 0 for tier in engine._tiers.stats())


def test_damaged_block_that_a_peer_wants_is_removed(tmp_path: Path) -> None:
    with driven(tmp_path, 0) as driver:
        ask(driver, 1, prompt(1))
    with driven(tmp_path, 0) as driver:
        engine = driver.engine
        hashes = engine.hash_chain.hashes(prompt(1))[:5]
        (path,) = tmp_path.glob(f"{hashes[3].hex()}-*.kv")
        path.write_bytes(bytes(path.stat().st_size))
        run = engine.pin(hashes)
        assert run.num_blocks == 5 and run.is_on_device(0, 5) is None
        run.read_blocks(0, 3)
        with pytest.raises(ValueError, match="cannot be read: .*checksum"):
            run.read_blocks(3, 5)
        engine.unpin(run.pin_id)
        assert engine.pin(hashes).num_blocks == 3


def test_preempted_sequences_come_back_from_host_memory() -> None:
    """Never computed again while it is the slower way."""
    engine = build_fake_engine(
        num_blocks=16, token_budget=40, growth_tokens=1, max_running=4, tiers=lower_tiers(64)
    )
    driver = Driver(engine, 0)
    prompts = [prompt(seed, 17) for seed in range(3)]
    for i, prompt_ids in enumerate(prompts):
        engine.add(Sequence(i, prompt_ids, greedy(20)))
    while engine._seqs:
        driver.until(lambda: engine.has_work)
        driver.step()
        while not engine._tiers.is_idle:
            engine._tiers.poll()  # copies are as fast as steps
    driver.until_done()
    assert [driver.tokens[i] for i in range(3)] == [expected_tokens(p, 20) for p in prompts]
    assert sum(step.stats.num_preemptions for step in driver.steps) > 0
    assert sum(load.num_blocks for load in driver.loads) > 0
    engine.close()


@pytest.mark.parametrize("seed", range(8))
def test_memory_on_the_way_to_the_disk_is_empty_once_all_is_there(tmp_path: Path, seed: int) -> None:
    """Whatever is copied or read while a block reaches the disk; else saving would end some day."""
    rng = random.Random(seed)
    with driven(tmp_path, 0) as driver:
        engine = driver.engine
        tiers = engine._tiers
        for i in range(6):
            engine.add(Sequence(i, prompt(rng.randrange(3)), greedy(rng.randrange(1, 9))))
            pinned = None
            while engine.has_work:
                driver.step()
                if pinned is None and rng.random() < 0.3:
                    pinned = engine.pin(engine.hash_chain.hashes(prompt(rng.randrange(3))))
                for threads in (tiers._write_behind._copying, tiers._write_behind._writing):
                    if rng.random() < 0.5:  # one of them is done before the other
                        threads._executor.submit(lambda: None).result()
                tiers.poll()
            if pinned is not None:
                engine.unpin(pinned.pin_id)
        driver.until(lambda: tiers.is_idle)
        host = tiers.places.host
        assert (host.num_free, host.num_cached, host.num_used) == (16, 0, 0)
        assert len(list(tmp_path.glob("*.kv"))) > 10


def test_a_block_that_is_used_again_on_its_way_to_the_disk_is_saved_once(tmp_path: Path) -> None:
    with driven(tmp_path, 0) as driver:
        engine = driver.engine
        saving, may_save = engine._tiers._write_behind, threading.Event()
        saving._copying._executor.submit(may_save.wait)
        for i in range(2):  # the second one finds the first one's blocks, none of them saved yet
            engine.add(Sequence(i, prompt(1), greedy(4)))
            driver.until(lambda: not engine._seqs)
        assert driver.outputs[1].num_hit_tokens == 4 * NUM_BLOCKS
        may_save.set()
        driver.until(lambda: engine._tiers.is_idle)
        assert engine._tiers.places.host.num_free == 16
        assert len(list(tmp_path.glob("*.kv"))) == NUM_BLOCKS + 1


def test_prompt_logprobs_load_nothing() -> None:
    with driven(None, 64) as driver:
        ask(driver, 1, prompt(1))
        ask(driver, 2, prompt(2))
        sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=2, num_prompt_logprobs=0)
        driver.engine.add(Sequence(3, prompt(1), sampling))
        driver.until_done()
        assert driver.outputs[3].num_hit_tokens == 0
        assert len(driver.outputs[3].prompt_logprobs) == 4 * NUM_BLOCKS + 2


def test_tiers_are_bounded_over_many_prompts(tmp_path: Path) -> None:
    with driven(tmp_path, 24) as driver:
        for seed in range(12):
            ask(driver, seed, prompt(seed, 30 + seed))
        for stats in driver.steps[-1].stats.tiers:
            total = stats.num_free_blocks + stats.num_cached_blocks + stats.num_used_blocks
            assert total == (24 if stats.tier is BlockTier.HOST else 64)
            assert stats.num_used_blocks == 0
        assert len(list(tmp_path.glob("*.kv"))) <= 64
        engine: Engine = driver.engine
        assert set(driver.tier_of) == set(engine.cached_hashes())
