from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.block_runs import runs
from engine.cuda_ipc import MemoryHandle
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout

LAYOUT = KvLayout(model_fingerprint="m", num_layers=3, token_shape=(2, 1, 4), dtype="bfloat16", block_size=2)
NUM_BLOCKS = 10


def filled_cache(*, is_shared: bool = False) -> KvCache:
    cache = KvCache(LAYOUT, NUM_BLOCKS, is_shared=is_shared)
    cache.data.copy_(torch.randn(cache.data.shape, generator=torch.Generator().manual_seed(1)))
    return cache


@pytest.fixture
def shared() -> Iterator[KvCache]:
    if not hasattr(os, "memfd_create"):
        pytest.skip("no memfd on this system")
    cache = filled_cache(is_shared=True)
    yield cache
    cache.close()


def test_a_new_cache_holds_zeros_and_shares_nothing() -> None:
    cache = KvCache(LAYOUT, NUM_BLOCKS)
    assert cache.data.shape == (3, NUM_BLOCKS, 2, 2, 1, 4)
    assert not cache.data.any()
    assert cache.shared_name is None


def test_rows_are_written_to_their_slots() -> None:
    cache = KvCache(LAYOUT, NUM_BLOCKS)
    rows = torch.randn(2, 2, 1, 4).bfloat16()
    cache.write_rows(1, torch.tensor([7, 2]), rows)
    assert torch.equal(cache.layer(1)[3, 1], rows[0])
    assert torch.equal(cache.layer(1)[1, 0], rows[1])
    assert not cache.layer(0).any()


@pytest.mark.parametrize("block_ids", [[4], [2, 3, 4], [9, 0, 1, 5], [5, 4, 3], list(range(NUM_BLOCKS))])
def test_bytes_read_are_layer_by_layer_and_block_by_block(block_ids: list[int]) -> None:
    cache = filled_cache()
    payload = cache.read_blocks(1, 2, block_ids)
    expected = cache.data[1:3][:, block_ids].contiguous()
    assert bytes(payload) == expected.view(torch.uint8).numpy().tobytes()


def test_what_is_written_is_what_was_read_and_nothing_else_changes() -> None:
    source, target = filled_cache(), KvCache(LAYOUT, NUM_BLOCKS)
    target.write_blocks(0, 2, [7, 8, 1], source.read_blocks(0, 2, [0, 5, 6]))
    assert torch.equal(target.data[:2, [7, 8, 1]], source.data[:2, [0, 5, 6]])
    untouched = [0, 2, 3, 4, 5, 6, 9]
    assert not target.data[:, untouched].any()
    assert not target.data[2].any()


def test_a_payload_of_another_size_is_refused() -> None:
    cache = filled_cache()
    with pytest.raises(ValueError, match="2 layers of 1 blocks are 64 bytes, got 63"):
        cache.write_blocks(0, 2, [1], bytes(63))


@given(st.lists(st.integers(0, 50), unique=True))
def test_runs_cover_the_ids_in_order(block_ids: list[int]) -> None:
    parts = list(runs(block_ids))
    assert [i for start, _, length in parts for i in range(start, start + length)] == list(
        range(len(block_ids))
    )
    assert [b for _, first, length in parts for b in range(first, first + length)] == block_ids


def test_an_attached_cache_sees_later_writes_of_the_owner(shared: KvCache) -> None:
    assert shared.shared_name is not None
    attached = KvCache.attach(shared.shared_name, LAYOUT, NUM_BLOCKS)
    shared.data[2, 3] = 1.5
    assert attached.read_blocks(2, 1, [3, 4]) == shared.read_blocks(2, 1, [3, 4])
    attached.close()


def test_an_attached_cache_cannot_be_written(shared: KvCache) -> None:
    assert shared.shared_name is not None
    attached = KvCache.attach(shared.shared_name, LAYOUT, NUM_BLOCKS)
    assert attached._bytes_LBX is not None
    with pytest.raises(ValueError, match="read-only"):
        attached._bytes_LBX[0, 0, 0] = 1
    attached.close()


def test_another_process_reads_what_the_owner_wrote(shared: KvCache) -> None:
    code = (
        "import sys\n"
        "from engine.kv_cache import KvCache\n"
        "from engine.kv_layout import KvLayout\n"
        f"layout = {LAYOUT!r}\n"
        f"cache = KvCache.attach(sys.argv[1], layout, {NUM_BLOCKS})\n"
        "sys.stdout.buffer.write(cache.read_blocks(0, 3, [2, 7]))\n"
        "cache.close()\n"
    )
    assert shared.shared_name is not None
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", code, shared.shared_name],
        cwd=root,
        capture_output=True,
        check=True,
        timeout=50,
    )
    assert result.stdout == bytes(shared.read_blocks(0, 3, [2, 7]))
    assert not result.stderr


def test_a_cache_that_is_gone_cannot_be_attached() -> None:
    cache = filled_cache(is_shared=True)
    name = cache.shared_name
    assert name is not None
    cache.close()
    gc.collect()
    with pytest.raises(OSError, match=r"gone|No such file"):
        KvCache.attach(name, LAYOUT, NUM_BLOCKS)


@pytest.mark.parametrize("name", ["", "x.y.z", "/etc/passwd", "1.2"])
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(OSError, match="not the name"):
        KvCache.attach(name, LAYOUT, NUM_BLOCKS)


def test_another_size_is_refused(shared: KvCache) -> None:
    assert shared.shared_name is not None
    with pytest.raises(OSError, match="expected"):
        KvCache.attach(shared.shared_name, LAYOUT, NUM_BLOCKS + 1)


def test_an_attached_cache_outlives_its_owner(shared: KvCache) -> None:
    assert shared.shared_name is not None
    attached = KvCache.attach(shared.shared_name, LAYOUT, NUM_BLOCKS)
    expected = bytes(shared.read_blocks(0, 3, [6]))
    shared.close()
    assert bytes(attached.read_blocks(0, 3, [6])) == expected
    attached.close()


def test_float32_and_latent_shapes_are_bytes_like_any_other() -> None:
    layout = KvLayout(model_fingerprint="m", num_layers=1, token_shape=(5,), dtype="float32", block_size=4)
    cache = KvCache(layout, 3)
    cache.data.copy_(torch.arange(60).view(cache.data.shape))
    values = np.frombuffer(cache.read_blocks(0, 1, [2, 0]), dtype=np.float32)
    assert values.tolist() == [*range(40, 60), *range(20)]


@pytest.mark.parametrize("is_shared", [False, True])
def test_blocks_in_fp8_cross_as_the_bytes_that_they_are(is_shared: bool) -> None:
    layout = KvLayout(model_fingerprint="m", num_layers=2, token_shape=(80,), dtype="fp8", block_size=3)
    source = KvCache(layout, 5, is_shared=is_shared)
    generator = torch.Generator().manual_seed(1)
    source.data.copy_(torch.randint(256, source.data.shape, generator=generator, dtype=torch.uint8))
    target = KvCache(layout, 4)
    source.export()
    peer = source if source.exported is None else target.open_peer(source.exported)

    target.copy_blocks(peer, 0, 2, [4, 0], [1, 3])

    assert torch.equal(target.data[:, [1, 3]], source.data[:, [4, 0]])
    assert not target.data[:, [0, 2]].any()
    assert source.size_bytes == 5 * 2 * 3 * 80


def test_blocks_of_an_opened_cache_are_copied_into_others(shared: KvCache) -> None:
    shared.export()
    assert shared.exported is not None
    target = KvCache(LAYOUT, 6)
    peer = target.open_peer(shared.exported)
    target.copy_blocks(peer, 1, 2, [9, 2, 3], [5, 0, 1])
    assert bytes(target.read_blocks(1, 2, [5, 0, 1])) == bytes(shared.read_blocks(1, 2, [9, 2, 3]))
    assert not any(target.read_blocks(0, 3, [2, 3, 4]))
    assert not any(target.read_blocks(0, 1, [5, 0, 1]))
    peer.close()


def test_private_memory_is_not_exported_and_says_why() -> None:
    cache = KvCache(LAYOUT, NUM_BLOCKS)
    cache.export()
    assert cache.exported is None
    assert cache.export_refusal == "it is in private memory"


def test_a_cache_on_a_device_is_not_opened_from_one_that_is_not(shared: KvCache) -> None:
    shared.export()
    assert shared.exported is not None
    on_device = replace(shared.exported, memory=MemoryHandle(bytes(64), 0, "GPU-1"))
    with pytest.raises(OSError, match="one of the two caches is on a device"):
        KvCache(LAYOUT, 6).open_peer(on_device)
