"""Order between streams when KV leaves and enters a device: on CUDA only."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.chunk_graphs import LayerEvents, has_graph_events
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.kv_outbox import KvOutbox, OutboxCopy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAYERS, BLOCKS = 10, 64
LAYOUT = KvLayout(
    model_fingerprint="m", num_layers=LAYERS, token_shape=(576,), dtype="bfloat16", block_size=16
)
FP8_LAYOUT = replace(LAYOUT, token_shape=(656,), dtype="fp8")
WAIT_S = 20.0


@pytest.fixture(params=[LAYOUT, FP8_LAYOUT], ids=["bfloat16", "fp8"])
def cache(request: pytest.FixtureRequest) -> Iterator[KvCache]:
    made = KvCache(request.param, BLOCKS, device="cuda")
    yield made
    made.close()


@pytest.fixture
def outbox(cache: KvCache) -> Iterator[KvOutbox]:
    made = KvOutbox(cache, 40)
    yield made
    made.close()


class SlowWork:
    """Keeps the default stream busy for a while."""

    def __init__(self) -> None:
        self._matrix = torch.randn(4096, 4096, device="cuda")

    def launch(self) -> None:
        for _ in range(20):
            self._matrix = torch.tanh(self._matrix @ self._matrix)


@pytest.mark.parametrize("block_ids", [list(range(3, 23)), [9, 1, 60, 33, 2, 17, 44, 5, 8, 30, 21, 12]])
def test_a_copy_out_sees_what_was_launched_before_it(
    cache: KvCache, outbox: KvOutbox, block_ids: list[int]
) -> None:
    assert outbox.is_pinned
    slots = outbox.take(len(block_ids))
    assert slots is not None
    slow, done = SlowWork(), queue.SimpleQueue[int]()
    for round_number in range(5):
        slow.launch()
        cache.data.fill_(round_number + 1)
        outbox.send(OutboxCopy(0, LAYERS, block_ids, list(slots)), lambda: done.put(1))
        done.get(timeout=WAIT_S)
        outbox.poll()
        found = outbox.cache.data[:, slots.start : slots.stop]
        assert torch.equal(found, torch.full_like(found, round_number + 1))


def test_layers_leave_at_the_events_of_a_graph(cache: KvCache, outbox: KvOutbox) -> None:
    assert has_graph_events()
    events = LayerEvents(LAYERS)
    value = torch.zeros(1, device="cuda", dtype=torch.bfloat16)
    work = torch.randn(2048, 2048, device="cuda")

    def step(layer_done: LayerEvents | None) -> None:
        for layer in range(LAYERS):
            torch.tanh(work @ work)
            cache.layer(layer)[:8] = value * (layer + 1)
            if layer_done is not None:
                layer_done(layer)

    step(None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(events)
    slots = outbox.take(8)
    assert slots is not None
    done = queue.SimpleQueue[int]()
    for number in range(1, 9):
        value.fill_(number)
        graph.replay()
        for layer in range(LAYERS):
            copy = OutboxCopy(layer, 1, list(range(8)), list(slots))
            outbox.send(copy, lambda: done.put(1), events.of(layer))
        for _ in range(LAYERS):
            done.get(timeout=WAIT_S)
        outbox.poll()
        found = outbox.cache.data[:, slots.start : slots.stop].float().amax(dim=(1, 2, 3))
        assert found.tolist() == [number * (layer + 1) for layer in range(LAYERS)]


@pytest.mark.parametrize("block_ids", [list(range(40)), list(range(39, -1, -1))])
def test_blocks_written_from_outside_are_there_for_the_next_launch(
    cache: KvCache, block_ids: list[int]
) -> None:
    source = torch.randint(100, (LAYERS, len(block_ids), *cache.data.shape[2:])).to(cache.data.dtype)
    payload = source.view(torch.uint8).numpy().data
    slow = SlowWork()
    slow.launch()
    cache.data[:, 40:] = 7.0
    fence = cache.fence()
    for first in range(0, LAYERS, 5):
        part = source[first : first + 5].contiguous().view(torch.uint8).numpy().reshape(-1).data
        with cache.landing(part.nbytes) as landing:
            assert landing is not None
            landing[:] = part
            cache.write_blocks(first, 5, block_ids, landing, fence)
    assert torch.equal(cache.data[:, block_ids].cpu(), source)
    assert bool((cache.data[:, 40:] == 7.0).all())
    cache.write_blocks(0, LAYERS, block_ids, payload)
    assert bytes(cache.read_blocks(0, LAYERS, block_ids)) == bytes(payload)


def test_a_write_goes_behind_its_fence(cache: KvCache) -> None:
    """A step that was launched before the blocks were given may still write into them."""
    slow = SlowWork()
    blocks = torch.ones(LAYERS, 4, *cache.data.shape[2:], dtype=cache.data.dtype)
    ones = blocks.view(torch.uint8).numpy().reshape(-1).data
    for _ in range(5):
        slow.launch()
        cache.data[:, :4] = 5.0
        cache.write_blocks(0, LAYERS, [0, 1, 2, 3], ones, cache.fence())
        assert bool((cache.data[:, :4] == 1.0).all())


@pytest.mark.parametrize("block_ids", [list(range(3, 23)), [9, 1, 60, 33, 2, 17, 44, 5, 8, 30, 21, 12]])
def test_blocks_read_off_the_device_are_those_launched_before(cache: KvCache, block_ids: list[int]) -> None:
    slow = SlowWork()
    for number in range(1, 6):
        slow.launch()
        cache.data.fill_(number)
        found = torch.frombuffer(cache.read_blocks(2, 3, block_ids), dtype=cache.data.dtype)
        assert torch.equal(found, torch.full_like(cache.data[2:5, block_ids].cpu().flatten(), number))
