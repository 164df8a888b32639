"""A real model in float32: tokens with loads from host memory, disk and a peer are those without."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from engine.build import build_engine
from engine.checkpoint.random_checkpoint import make_random_checkpoint
from engine.engine import Engine
from engine.engine_config import EngineConfig, EngineConfigError
from engine.sequence import Sequence
from engine.tiers import block_source
from kvstore.block_hash import BlockTier
from tests.engine.core.engine_driver import generate, greedy
from tests.engine.tiers.tier_driver import Driver, PeerOf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_TOKENS = 8
_GENERATOR = random.Random(3)
SHARED = [_GENERATOR.randrange(3, 4096) for _ in range(130)]
PROMPTS = [
    [*SHARED[: 40 * i], *(_GENERATOR.randrange(3, 4096) for _ in range(161 - 40 * i))] for i in range(4)
]


@pytest.fixture(scope="module", params=["deepseek_v3", "llama"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param) / "model"
    make_random_checkpoint(directory, request.param)
    return directory


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[list[int]]:
    return [generate(engine_of(model_dir, 64), [prompt_ids], NUM_TOKENS)[0] for prompt_ids in PROMPTS]


def engine_of(model_dir: Path, num_blocks: int = 12, **tiers: object) -> Engine:
    return build_engine(
        EngineConfig(
            model_dir=model_dir,
            device=DEVICE,
            dtype="float32",
            num_blocks=num_blocks,
            max_model_len=190,
            token_budget=48,
            max_running=4,
            **tiers,  # type: ignore[arg-type]
        )
    )


@pytest.mark.parametrize("num_compute_blocks", [0, 1, 2, None])
@pytest.mark.parametrize("kind", ["host", "disk", "both"])
def test_prompts_that_evict_each_other(
    model_dir: Path,
    expected: list[list[int]],
    tmp_path: Path,
    kind: str,
    num_compute_blocks: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_source, "CLAIM_BYTES", dict.fromkeys(BlockTier, 1))
    tiers: dict[str, object] = {"host_kv_bytes": 64 << 20} if kind != "disk" else {}
    if kind != "host":
        tiers |= {"disk_kv_dir": tmp_path, "disk_kv_bytes": 64 << 20}
    engine = engine_of(model_dir, **tiers)
    driver = Driver(engine, num_compute_blocks)
    for seq_id in range(3 * len(PROMPTS)):
        which = seq_id % len(PROMPTS)
        engine.add(Sequence(seq_id, PROMPTS[which], greedy(NUM_TOKENS)))
        if seq_id % 3 == 2:  # else beside the next ones
            driver.until_done()
    driver.until_done()
    assert [driver.tokens[i] for i in range(len(driver.tokens))] == expected * 3
    if num_compute_blocks is not None:
        assert sum(output.num_loaded_tokens for output in driver.outputs.values()) > 0
    engine.close()


@pytest.mark.parametrize("fails_after", [None, 0, 1, 4, 9])
@pytest.mark.parametrize("num_compute_blocks", [0, 1, 3])
def test_peer_that_is_slow_or_fails(
    model_dir: Path, expected: list[list[int]], fails_after: int | None, num_compute_blocks: int
) -> None:
    holder, engine = engine_of(model_dir), engine_of(model_dir)
    generate(holder, [PROMPTS[1]], 1)
    block_ids = holder._pool.lookup(holder.hash_chain.hashes(PROMPTS[1]))
    source = PeerOf(holder.kv_cache, block_ids, block_s=0.003, fails_after=fails_after).into(engine.kv_cache)
    driver = Driver(engine, num_compute_blocks)
    engine.add(Sequence(1, PROMPTS[1], greedy(NUM_TOKENS), kv_source=source))
    driver.until_done()
    assert driver.tokens[1] == expected[1]
    assert driver.outputs[1].num_fetched_tokens == 16 * source.num_written
    assert source.thread is not None
    source.thread.join(10)


def test_restart_with_another_dtype_uses_nothing_of_the_first(model_dir: Path, tmp_path: Path) -> None:
    tiers = {"disk_kv_dir": tmp_path, "disk_kv_bytes": 64 << 20}
    driver = Driver(engine_of(model_dir, **tiers))
    driver.engine.add(Sequence(1, PROMPTS[0], greedy(2)))
    driver.until_done()
    with pytest.raises(EngineConfigError, match="another process keeps its KV blocks"):
        engine_of(model_dir, **tiers)
    driver.engine.close()
    other = build_engine(
        EngineConfig(model_dir=model_dir, dtype="bfloat16", num_blocks=12, max_model_len=190, **tiers)  # type: ignore[arg-type]
    )
    assert other.cached_hashes() == [] and not other.has_work
    other.close()
    again = engine_of(model_dir, **tiers)
    assert len(again.cached_hashes()) == 10 and again.has_work
    again.close()


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ({"host_kv_bytes": 1000}, "one KV block takes"),
        ({"host_kv_bytes": 1 << 60}, "memory are free"),
        ({"disk_kv_dir": Path("/proc/nowhere")}, "cannot keep KV blocks"),
        ({"disk_kv_bytes": 1000}, "1000 are allowed"),
    ],
)
def test_tiers_that_cannot_be(
    model_dir: Path, tmp_path: Path, tiers: dict[str, object], message: str
) -> None:
    if "disk_kv_bytes" in tiers:
        tiers = {**tiers, "disk_kv_dir": tmp_path}
    with pytest.raises(EngineConfigError, match=message):
        engine_of(model_dir, **tiers)
