"""A cache on a device that another process copies from: on CUDA only, between two GPUs if there are two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cuda_ipc import MemoryHandle
from engine.kv_cache import KvCache, OpenedKvCache
from engine.kv_export import KvExport
from engine.kv_layout import KvLayout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAYERS, BLOCKS = 27, 640
LAYOUT = KvLayout(
    model_fingerprint="m", num_layers=LAYERS, token_shape=(576,), dtype="bfloat16", block_size=16
)
FP8_LAYOUT = replace(LAYOUT, token_shape=(656,), dtype="fp8")
NUM_BYTES = BLOCKS * LAYOUT.block_bytes  # 318 MB
RUN = (list(range(100, 356)), list(range(7, 263)))  # 4,096 tokens
SCATTERED = ([(37 * i) % BLOCKS for i in range(256)], [(101 * i + 5) % BLOCKS for i in range(256)])

# Block b of layer l holds l + b % 97 + <the number it was told>, which bfloat16 can tell apart.
OWNER = """
import dataclasses, json, sys
import torch
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout

device, num_blocks = sys.argv[1], int(sys.argv[2])
layout = KvLayout(**json.loads(sys.argv[3]))
before = torch.zeros(3 << 20, dtype=torch.uint8, device=device)  # so a small cache starts in an allocation
cache = KvCache(layout, num_blocks, device=device)

def fill(number):
    layers = torch.arange(layout.num_layers, device=device)[:, None]
    values = layers + torch.arange(num_blocks, device=device) % 97 + number
    cache.data.copy_(values[:, :, None, None].bfloat16().expand(cache.data.shape))
    torch.cuda.synchronize(device)

fill(0)
cache.export()
told = None
if cache.exported is not None:
    memory = dataclasses.asdict(cache.exported.memory)
    memory["handle"] = memory["handle"].hex()
    told = dict(dataclasses.asdict(cache.exported), memory=memory)
print(json.dumps({"exported": told, "refusal": cache.export_refusal}), flush=True)
for line in sys.stdin:
    fill(int(line))
    print("filled", flush=True)
"""


class Owner:
    def __init__(self, device: str, num_blocks: int, environment: dict[str, str], layout: KvLayout) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, device, str(num_blocks), json.dumps(asdict(layout))],
            cwd=Path(__file__).parents[3],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self._told: dict[str, Any] = json.loads(self.process.stdout.readline())
        self.refusal: str = self._told["refusal"]

    @property
    def exported(self) -> KvExport:
        told = self._told["exported"]
        assert told is not None, self.refusal
        handle = bytes.fromhex(told["memory"]["handle"])
        return KvExport(**(told | {"memory": MemoryHandle(**(told["memory"] | {"handle": handle}))}))

    def fill(self, number: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(number, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "filled\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def an_owner(
    device: str = "cuda:0",
    num_blocks: int = BLOCKS,
    environment: dict[str, str] | None = None,
    layout: KvLayout = LAYOUT,
) -> Iterator[Owner]:
    owner = Owner(device, num_blocks, environment or {}, layout)
    try:
        yield owner
    finally:
        owner.process.kill()
        owner.process.communicate()


def has_two_devices() -> bool:
    return torch.cuda.device_count() > 1 and torch.cuda.can_device_access_peer(0, 1)


def second_device_alone() -> dict[str, str]:
    """The owner sees no other one, and this process may see none of the owner's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[1]}


@pytest.fixture(scope="module", params=["same device", "other device", "other device, the only visible one"])
def owner(request: pytest.FixtureRequest) -> Iterator[Owner]:
    if request.param != "same device" and not has_two_devices():
        pytest.skip("needs two devices that reach each other")
    device = "cuda:1" if request.param == "other device" else "cuda:0"
    environment = second_device_alone() if request.param.endswith("visible one") else {}
    with an_owner(device, environment=environment) as made:
        yield made


@pytest.fixture
def cache() -> Iterator[KvCache]:
    made = KvCache(LAYOUT, BLOCKS, device="cuda:0")
    yield made
    made.close()


@contextmanager
def opened(cache: KvCache, owner: Owner) -> Iterator[OpenedKvCache]:
    peer = cache.open_peer(owner.exported)
    assert isinstance(peer, OpenedKvCache)
    try:
        yield peer
    finally:
        peer.close()


def expected(layers: range, source_ids: list[int], number: int) -> torch.Tensor:
    """[layers, blocks]"""
    ids = torch.tensor(source_ids) % 97
    return (torch.tensor(layers)[:, None] + ids + number).bfloat16()


def assert_copied(cache: KvCache, ids: tuple[list[int], list[int]], number: int) -> None:
    found = cache.data[:, ids[1]].cpu()
    values = expected(range(LAYERS), ids[0], number).to(found.dtype)
    assert torch.equal(found, values[:, :, None, None].expand(found.shape))


@pytest.mark.parametrize("ids", [RUN, SCATTERED], ids=["run", "scattered"])
def test_blocks_are_copied_from_the_owner_as_they_are_now(
    cache: KvCache, owner: Owner, ids: tuple[list[int], list[int]]
) -> None:
    others = [i for i in range(BLOCKS) if i not in ids[1]]
    with opened(cache, owner) as peer:
        for number in (1, 2):
            owner.fill(number)
            cache.data.fill_(9.0)
            for first in range(0, LAYERS, 4):  # each to its blocks, in groups of layers
                cache.copy_blocks(peer, first, min(4, LAYERS - first), *ids, cache.fence())
            assert_copied(cache, ids, number)
            assert bool((cache.data[:, others] == 9.0).all())


def test_a_copy_goes_behind_its_fence(cache: KvCache, owner: Owner) -> None:
    """A step that was launched before the blocks were given may still write into them."""
    owner.fill(3)
    matrix = torch.randn(4096, 4096, device="cuda:0")
    with opened(cache, owner) as peer:
        for _ in range(5):
            for _ in range(20):
                matrix = torch.tanh(matrix @ matrix)
            cache.data[:, RUN[1]] = 5.0
            cache.copy_blocks(peer, 0, LAYERS, *RUN, cache.fence())
            assert_copied(cache, RUN, 3)


def test_how_fast_it_is(cache: KvCache, owner: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.perf_counter()
    with opened(cache, owner) as peer:
        opened_s = time.perf_counter() - began
        rows = []
        for name, ids in (("run", RUN), ("scattered", SCATTERED)):
            for layers_per_copy in (1, LAYERS):
                times = []
                for _ in range(6):
                    began = time.perf_counter()
                    for first in range(0, LAYERS, layers_per_copy):
                        cache.copy_blocks(peer, first, layers_per_copy, *ids, cache.fence())
                    times.append(time.perf_counter() - began)
                ms = 1e3 * sorted(times)[2]
                rows.append(f"{name}, {layers_per_copy} layers a copy: {ms:.2f} ms")
        began = time.perf_counter()
    closed_s = time.perf_counter() - began
    with capsys.disabled():
        print(f"\n4,096 tokens, 127 MB, opened in {1e3 * opened_s:.1f} ms, closed in {1e3 * closed_s:.1f} ms")
        print("\n".join(rows))


def test_the_memory_of_a_killed_owner_is_readable_until_it_is_closed(cache: KvCache) -> None:
    torch.cuda.synchronize()
    free_before, _ = torch.cuda.mem_get_info(0)
    with an_owner() as owner:
        with opened(cache, owner) as peer:
            owner.kill()
            cache.copy_blocks(peer, 0, LAYERS, *RUN)
            assert_copied(cache, RUN, 0)
    deadline = time.monotonic() + 20
    while free_before - torch.cuda.mem_get_info(0)[0] > NUM_BYTES // 2:
        assert time.monotonic() < deadline, "the dead owner's memory is still taken"
        time.sleep(0.1)


def test_an_owner_may_be_killed_while_its_blocks_are_copied(cache: KvCache) -> None:
    with an_owner() as owner, opened(cache, owner) as peer:
        has_begun, is_over = threading.Event(), threading.Event()
        num_copies = 0

        def copy() -> None:
            nonlocal num_copies
            while not is_over.is_set():
                cache.copy_blocks(peer, 0, LAYERS, *SCATTERED)
                num_copies += 1
                has_begun.set()

        copying = threading.Thread(target=copy)
        copying.start()
        assert has_begun.wait(20)
        owner.kill()
        before = num_copies
        time.sleep(0.5)
        is_over.set()
        copying.join(20)
        assert num_copies > before
        assert_copied(cache, SCATTERED, 0)


def test_a_cache_may_lie_anywhere_in_its_allocation(cache: KvCache) -> None:
    with an_owner(num_blocks=8) as owner:
        assert owner.exported.memory.offset_bytes > 0
        with opened(cache, owner) as peer:
            cache.copy_blocks(peer, 0, LAYERS, [3, 7, 0], [1, 2, 3])
            assert_copied(cache, ([3, 7, 0], [1, 2, 3]), 0)


def test_blocks_in_fp8_are_copied_as_bytes() -> None:
    cache = KvCache(FP8_LAYOUT, BLOCKS, device="cuda:0")
    with an_owner(layout=FP8_LAYOUT) as owner, opened(cache, owner) as peer:
        for ids in (RUN, SCATTERED):
            cache.copy_blocks(peer, 0, LAYERS, *ids, cache.fence())
            assert_copied(cache, ids, 0)
    cache.close()


def test_what_is_not_that_cache_is_refused(cache: KvCache) -> None:
    with an_owner() as owner:
        exported = owner.exported
        with pytest.raises(OSError, match="not that cache"):
            cache.open_peer(replace(exported, name="00" * 16))
        with pytest.raises(OSError, match="an allocation of"):
            cache.open_peer(replace(exported, num_blocks=8 * BLOCKS))
        with opened(cache, owner) as peer:  # and nothing is left of the failed ones
            cache.copy_blocks(peer, 0, LAYERS, *RUN)
    with pytest.raises(OSError, match="CUDA_ERROR"):
        cache.open_peer(exported)  # its owner is dead
    assert bool((cache.data == cache.data).all())  # the device is as well as before


def test_memory_that_the_driver_does_not_export_is_named() -> None:
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with an_owner(environment=environment) as owner:
        assert "CUDA_ERROR" in owner.refusal
