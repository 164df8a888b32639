"""KV that leaves through host memory. The device is a CPU here; what CUDA adds is order between streams."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.block_runs import common_runs
from engine.device_reads import copy_out
from engine.device_writes import PinnedBuffers, copy_across, copy_in
from engine.engine import Engine
from engine.kv_cache import KvCache
from engine.kv_outbox import KvOutbox, OutboxCopy
from engine.outputs import TokenLogprobs
from engine.sequence import Sequence
from tests.engine.core.engine_driver import CopyingListener, greedy, hand_off, run
from tests.fakes.fake_model import build_fake_engine, expected_tokens, fake_kv_layout

PROMPT = list(range(1, 31))  # eight blocks
WAIT_S = 20.0


@pytest.fixture
def outbox() -> Iterator[KvOutbox]:
    cache = KvCache(fake_kv_layout(), 12)
    cache.data.copy_(torch.arange(cache.data.numel()).view(cache.data.shape))
    made = KvOutbox(cache, 10)
    yield made
    made.close()


def settle(outbox: KvOutbox) -> None:
    """Waits for all copies asked for so far."""
    is_done = threading.Event()
    outbox.send(OutboxCopy(0, 1, [0], [9]), is_done.set)
    assert is_done.wait(WAIT_S)
    outbox.poll()


@pytest.fixture
def engine_with_outbox() -> Iterator[Callable[..., Engine]]:
    """From a number of slots; closed in the end."""
    made: list[Engine] = []

    def make(num_slots: int, **facts: int) -> Engine:
        made.append(build_fake_engine(outbox_slots=num_slots, **facts))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


class DirectListener(CopyingListener):
    """Its reader copies from the sender's own cache."""

    reads_device = True


class WaitingListener(CopyingListener):
    """Holds up the first copy that is announced."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.may_go_on = threading.Event()

    def kv_ready(self, *arguments: object) -> None:
        assert self.may_go_on.wait(WAIT_S)
        super().kv_ready(*arguments)  # type: ignore[arg-type]


def test_slots_hold_what_the_blocks_held(outbox: KvOutbox) -> None:
    done = threading.Event()
    outbox.send(OutboxCopy(1, 2, [7, 2, 3], [4, 5, 6]), done.set)
    assert done.wait(WAIT_S)
    expected = outbox._device.read_blocks(1, 2, [7, 2, 3])
    assert bytes(outbox.cache.read_blocks(1, 2, [4, 5, 6])) == bytes(expected)
    assert not any(outbox.cache.read_blocks(0, 1, list(range(9))))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_slots_are_runs_that_nobody_else_has_and_come_back(sizes: list[int], random: object) -> None:
    with closing(KvOutbox(KvCache(fake_kv_layout(), 1), 10)) as outbox:  # hypothesis may leave from any draw
        taken: list[range] = []
        for size in sizes:
            run_of_slots = outbox.take(size)
            if run_of_slots is None:
                assert size > 1 or outbox.num_free_slots == 0
                if taken:
                    outbox.give_back(taken.pop(random.randrange(len(taken))))  # type: ignore[attr-defined]
            else:
                assert len(run_of_slots) == size
                taken.append(run_of_slots)
            outbox.check_integrity(list(taken))
        for slots in taken:
            outbox.give_back(slots)
        assert outbox.take(10) == range(10)


def test_a_hand_off_through_the_outbox_gives_the_same_tokens(
    engine_with_outbox: Callable[..., Engine],
) -> None:
    sender, receiver = engine_with_outbox(20, token_budget=20), build_fake_engine()
    for seq_id in (1, 2):  # the second one finds its prefix in the sender's cache
        prompt = [*PROMPT[:20], seq_id]
        num_held = receiver.reserve(Sequence(seq_id, prompt, greedy(6)))
        listener = CopyingListener(sender, receiver, num_held)
        receiver.extend(seq_id, listener.block_ids.extend)
        sender.add(Sequence(seq_id, prompt, greedy(6), keeps_blocks=True, kv_listener=listener))
        outputs = run(sender)[0][seq_id]
        settle(sender._outbox)  # type: ignore[arg-type]
        assert listener.origin is sender._outbox.cache  # type: ignore[union-attr]
        receiver.commit(seq_id, TokenLogprobs(outputs[0], 0.0))
        sender.release(seq_id)
        assert [*outputs, *run(receiver)[0][seq_id]] == expected_tokens(prompt, 6)
    sender.check_integrity()
    assert sender._outbox is not None
    assert sender._outbox.num_free_slots == 20
    sender.close()


def test_without_room_in_the_outbox_blocks_of_the_cache_are_announced(
    engine_with_outbox: Callable[..., Engine],
) -> None:
    sender, receiver = engine_with_outbox(7), build_fake_engine()
    listener, first = hand_off(sender, receiver, 1, PROMPT, 8)
    assert listener.origin is sender.kv_cache
    assert [*first.token_ids, *run(receiver)[0][1]] == expected_tokens(PROMPT, 8)
    sender.close()


def test_a_reader_of_the_device_takes_no_slots_and_hears_of_blocks_behind_what_is_copied(
    engine_with_outbox: Callable[..., Engine],
) -> None:
    sender, receiver = engine_with_outbox(20, token_budget=20), build_fake_engine()
    outbox = sender._outbox
    assert outbox is not None
    copying, may_go_on = threading.Event(), threading.Event()

    def first_copied() -> None:
        copying.set()
        assert may_go_on.wait(WAIT_S)

    outbox.send(OutboxCopy(0, 1, [0], [19]), first_copied)
    assert copying.wait(WAIT_S)
    for seq_id in (1, 2):  # the second one finds its prefix in the sender's cache
        prompt = [*PROMPT[:20], seq_id]
        num_held = receiver.reserve(Sequence(seq_id, prompt, greedy(6)))
        listener = DirectListener(sender, receiver, num_held)
        receiver.extend(seq_id, listener.block_ids.extend)
        sender.add(Sequence(seq_id, prompt, greedy(6), keeps_blocks=True, kv_listener=listener))
        outputs = run(sender)[0][seq_id]
        assert outbox.num_free_slots == 20
        assert not listener.announced or may_go_on.is_set()
        may_go_on.set()
        settle(outbox)
        assert listener.origin is sender.kv_cache
        receiver.commit(seq_id, TokenLogprobs(outputs[0], 0.0))
        sender.release(seq_id)
        assert [*outputs, *run(receiver)[0][seq_id]] == expected_tokens(prompt, 6)
    sender.check_integrity()


def test_slots_come_back_when_a_sequence_is_aborted_while_its_copies_wait(
    engine_with_outbox: Callable[..., Engine],
) -> None:
    sender, receiver = engine_with_outbox(16), build_fake_engine()
    listener = WaitingListener(sender, receiver, 8)
    sender.add(Sequence(1, PROMPT, greedy(4), keeps_blocks=True, kv_listener=listener))
    sender.step()
    sender.check_integrity()
    sender.abort(1)
    sender.check_integrity()
    assert sender._outbox is not None
    assert sender._outbox.num_free_slots == 16
    listener.may_go_on.set()
    settle(sender._outbox)
    sender.close()


def test_a_copy_that_fails_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch, engine_with_outbox: Callable[..., Engine]
) -> None:
    sender, receiver = engine_with_outbox(16), build_fake_engine()
    heard = threading.Event()
    sender.subscribe(heard.set)

    def broken(*arguments: object) -> None:
        raise OSError("the device has left")

    monkeypatch.setattr(sender.kv_cache, "read_blocks", broken)
    listener = CopyingListener(sender, receiver, 8)
    sender.add(Sequence(1, PROMPT, greedy(4), keeps_blocks=True, kv_listener=listener))
    sender.step()
    assert heard.wait(WAIT_S)
    assert sender.has_work
    with pytest.raises(RuntimeError, match="copy of KV off the device failed"):
        sender.step()
    sender.close()


def test_close_drops_what_was_not_copied_and_ends_the_thread(outbox: KvOutbox) -> None:
    copying, may_go_on = threading.Event(), threading.Event()
    copied: list[int] = []

    def first_copied() -> None:
        copying.set()
        assert may_go_on.wait(WAIT_S)
        copied.append(1)

    outbox.send(OutboxCopy(0, 1, [1], [1]), first_copied)
    outbox.send(OutboxCopy(0, 1, [2], [2]), lambda: copied.append(2))
    assert copying.wait(WAIT_S)
    closing = threading.Thread(target=outbox.close)
    closing.start()
    while not outbox._is_closing:
        pass
    may_go_on.set()
    closing.join(WAIT_S)
    assert copied == [1]
    outbox.close()


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 3), (torch.uint8, 2), (torch.uint8, 3)])
@pytest.mark.parametrize("block_ids", [[3, 4, 5, 6], [9, 1, 2, 7], list(range(199, 99, -1))])
def test_copies_out_and_in_hit_their_blocks_in_runs_and_gathered(
    block_ids: list[int], dtype: torch.dtype, width: int
) -> None:
    """48, 8 and 12 bytes of a block: whole words, and not."""
    source = torch.randint(1, 255, (2, 200, 4, width)).to(dtype)
    middle = torch.zeros(2, 150, 4, width, dtype=dtype)
    back = torch.zeros(2, 200, 4, width, dtype=dtype)
    copy_out(source, block_ids, middle, 20)
    copied = middle[:, 20 : 20 + len(block_ids)]
    assert torch.equal(copied, source[:, block_ids])
    assert int(middle.count_nonzero()) == int(copied.count_nonzero())
    copy_in(copied, back, block_ids)
    assert torch.equal(back[:, block_ids], source[:, block_ids])
    assert int(back.count_nonzero()) == int(copied.count_nonzero())


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_common_runs_are_consecutive_on_both_sides_and_as_long_as_they_can_be(
    pairs: list[tuple[int, int]],
) -> None:
    found = list(common_runs([a for a, _ in pairs], [b for _, b in pairs]))
    assert [(a + i, b + i) for a, b, length in found for i in range(length)] == pairs
    for (a, b, length), (next_a, next_b, _) in zip(found, found[1:], strict=False):
        assert (next_a, next_b) != (a + length, b + length)


@pytest.mark.parametrize("width", [2, 3])  # 32 and 12 bytes of a block: whole words, and not
@pytest.mark.parametrize(
    ("source_ids", "target_ids"),
    [([3, 4, 5, 6], [7, 8, 1, 2]), (list(range(199, 99, -1)), list(range(100)))],
)
def test_a_copy_across_hits_its_blocks_directly_and_gathered(
    source_ids: list[int], target_ids: list[int], width: int
) -> None:
    source = torch.randint(0, 255, (2, 200, 4, width), dtype=torch.uint8)
    target = torch.full((2, 150, 4, width), 7, dtype=torch.uint8)
    copy_across(source, source_ids, target, target_ids)
    assert torch.equal(target[:, target_ids], source[:, source_ids])
    others = [i for i in range(150) if i not in target_ids]
    assert bool((target[:, others] == 7).all())


def test_bytes_that_lie_in_a_buffer_are_copied_no_more_and_others_once() -> None:
    buffers = PinnedBuffers(is_pinned=False)
    with buffers.buffer(8) as landing:
        landing.numpy()[:] = range(8)
        with buffers.holding(landing.numpy().data[:6]) as held:
            assert held.data_ptr() == landing.data_ptr()
            assert held.tolist() == list(range(6))
        with buffers.holding(b"abc") as other:
            assert other.data_ptr() != landing.data_ptr()
            assert bytes(other.numpy()) == b"abc"
    with buffers.buffer(4) as first, buffers.buffer(4) as second:
        assert first.data_ptr() != second.data_ptr()


def test_a_copy_lands_where_it_is_asked_to_if_it_fits() -> None:
    cache = KvCache(fake_kv_layout(), 4)
    cache.data.copy_(torch.arange(cache.data.numel()).view(cache.data.shape))
    expected = bytes(cache.read_blocks(1, 2, [3, 0]))
    landing = memoryview(bytearray(len(expected)))
    cache.read_blocks(1, 2, [3, 0], landing)
    assert bytes(landing) == expected
    too_small = memoryview(bytearray(len(expected) - 1))
    assert bytes(cache.read_blocks(1, 2, [3, 0], too_small)) == expected
    assert not any(too_small)
