from __future__ import annotations

import pytest

from engine.block_pool import BlockPool
from kvstore.block_hash import BlockHash, BlockTier


def block_hash(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "little"))


def test_blocks_of_one_allocation_are_consecutive_and_leave_room_to_grow() -> None:
    pool = BlockPool(32)
    first = pool.allocate(4, room=2)
    second = pool.allocate(4, room=2)
    assert first == [0, 1, 2, 3]
    assert second == [6, 7, 8, 9]
    assert pool.allocate(1, after=first[-1]) == [4]


def test_a_block_that_cannot_follow_is_taken_from_the_far_end() -> None:
    pool = BlockPool(8)
    first = pool.allocate(2)
    pool.allocate(2)
    assert pool.allocate(1, after=first[-1]) == [7]


def test_scattered_free_blocks_are_used_when_no_run_is_left() -> None:
    pool = BlockPool(6)
    blocks = pool.allocate(6)
    pool.release([blocks[1], blocks[3], blocks[5]])
    assert pool.allocate(3) == [1, 3, 5]
    assert pool.num_available == 0


def test_a_released_registered_block_is_found_again_by_its_hash() -> None:
    pool = BlockPool(4)
    block = pool.allocate(1)
    pool.register(block[0], block_hash(1))
    pool.release(block)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (3, 1, 0)
    assert pool.lookup([block_hash(1), block_hash(2)]) == block
    pool.acquire(block)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (3, 0, 1)


def test_lookup_stops_at_the_first_gap() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.register(blocks[0], block_hash(0))
    pool.register(blocks[2], block_hash(2))
    assert pool.lookup([block_hash(0), block_hash(1), block_hash(2)]) == [blocks[0]]


def test_a_shared_block_stays_used_until_the_last_reference_is_released() -> None:
    pool = BlockPool(2)
    block = pool.allocate(1)
    pool.register(block[0], block_hash(1))
    pool.acquire(block)
    pool.release(block)
    assert pool.num_used == 1
    pool.release(block)
    assert (pool.num_used, pool.num_cached) == (0, 1)


def test_releasing_more_often_than_acquired_is_a_programmer_error() -> None:
    pool = BlockPool(2)
    block = pool.allocate(1)
    pool.release(block)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(block)


def test_the_end_of_the_prefix_that_was_unused_longest_is_evicted_first() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for block in (*old, *new):
        pool.register(block, block_hash(block))
    pool.release(old)
    pool.release(new)
    pool.take_events()
    pool.allocate(1)
    assert block_hash(old[1]) in pool.take_events().removed
    assert pool.lookup([block_hash(new[0]), block_hash(new[1])]) == new


def test_using_a_cached_block_makes_it_young_again() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.register(first[0], block_hash(1))
    pool.register(second[0], block_hash(2))
    pool.release(first)
    pool.release(second)
    pool.acquire(first)
    pool.release(first)
    pool.take_events()
    pool.allocate(1)
    assert pool.take_events().removed == (block_hash(2),)


def test_a_second_block_with_the_same_content_stays_private() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.register(first[0], block_hash(1))
    pool.register(second[0], block_hash(1))
    assert pool.take_events().placed == ((block_hash(1), BlockTier.DEVICE),)
    pool.release(second)
    assert (pool.num_free, pool.num_cached) == (3, 0)
    pool.check_integrity({first[0]: 1})


def test_what_was_stored_and_evicted_between_two_calls_is_no_event() -> None:
    pool = BlockPool(1)
    block = pool.allocate(1)
    pool.register(block[0], block_hash(1))
    pool.release(block)
    pool.allocate(1)
    events = pool.take_events()
    assert (events.placed, events.removed) == ((), ())


def test_what_left_and_came_back_between_two_calls_is_no_event() -> None:
    pool = BlockPool(1)
    block = pool.allocate(1)
    pool.register(block[0], block_hash(1))
    pool.release(block)
    assert pool.take_events().placed == ((block_hash(1), BlockTier.DEVICE),)
    block = pool.allocate(1)
    pool.register(block[0], block_hash(1))
    events = pool.take_events()
    assert (events.placed, events.removed) == ((), ())


def test_integrity_check_sees_a_reference_that_nobody_holds() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="references"):
        pool.check_integrity({})
