from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.tiers.block_key import BlockKey
from engine.tiers.eviction_order import EvictionOrder
from kvstore.block_hash import BlockHash

ROOT = BlockHash(b"root")


def name(*path: int) -> BlockHash:
    return BlockHash(bytes(path)) if path else ROOT


def key(*path: int) -> BlockKey:
    return BlockKey(name(*path), name(*path[:-1]), len(path) - 1)


def popped(order: EvictionOrder) -> list[BlockHash]:
    found = []
    while (next_key := order.pop()) is not None:
        found.append(next_key.block_hash)
    return found


def test_least_recently_used_goes_first() -> None:
    order = EvictionOrder()
    for i in range(1, 4):
        order.add(key(i))
    order.use(name(1))
    assert popped(order) == [name(2), name(3), name(1)]


def test_nothing_goes_before_what_follows_it() -> None:
    order = EvictionOrder()
    order.add(key(1))
    order.add(key(1, 1))
    order.add(key(1, 1, 1))
    order.add(key(1, 2))
    order.use(name(1, 2))
    order.use(name(1, 1, 1))
    assert popped(order) == [name(1, 2), name(1, 1, 1), name(1, 1), name(1)]


def test_deep_block_outlives_a_shallow_one_that_was_used_a_little_later() -> None:
    order = EvictionOrder()
    deep = BlockKey(name(1), name(9), 512)
    order.add(deep)
    order.add(key(2))
    assert order.pop() == key(2)
    # But not for ever: the clock goes on.
    for i in range(10, 14):
        order.add(key(i))
        order.pop()
    assert name(1) not in order


def test_pinned_block_stays_until_the_last_unpin() -> None:
    order = EvictionOrder()
    order.add(key(1))
    order.pin(name(1))
    order.pin(name(1))
    assert order.pop() is None and order.num_pinned == 1
    order.unpin(name(1))
    assert order.pop() is None
    order.unpin(name(1))
    assert order.pop() == key(1) and order.num_pinned == 0


def test_parent_stays_while_its_child_is_on_the_way() -> None:
    order = EvictionOrder()
    order.add(key(1))
    order.pin_parent(key(1, 1))
    assert order.pop() is None
    order.unpin_parent(key(1, 1))
    order.unpin_parent(key(1, 1))
    assert order.pop() == key(1)


paths = st.lists(st.integers(0, 2), min_size=1, max_size=4)
actions = st.lists(
    st.tuples(st.sampled_from(["add", "use", "pin", "unpin", "remove", "pop"]), paths), max_size=80
)


@given(actions)
def test_any_sequence_of_uses_keeps_children_behind_parents_and_pins_in_place(
    todo: list[tuple[str, list[int]]],
) -> None:
    order = EvictionOrder()
    pins: dict[BlockHash, int] = {}
    here: dict[BlockHash, BlockKey] = {}
    for action, path in todo:
        block = key(*path)
        block_hash = block.block_hash
        if action == "pop":
            gone = order.pop()
            leaves = [k for k in here.values() if not pins.get(k.block_hash) and name_has_no_child(k, here)]
            assert (gone is None) == (not leaves)
            if gone is not None:
                assert gone in leaves
                del here[gone.block_hash]
        elif action == "add" and block_hash not in here:
            order.add(block)
            here[block_hash] = block
        elif block_hash in here:
            if action == "use":
                order.use(block_hash)
            elif action == "pin":
                order.pin(block_hash)
                pins[block_hash] = pins.get(block_hash, 0) + 1
            elif action == "unpin" and pins.get(block_hash):
                order.unpin(block_hash)
                pins[block_hash] -= 1
            elif action == "remove" and not pins.get(block_hash):
                order.remove(block_hash)
                del here[block_hash]
        assert len(order) == len(here)
        assert order.num_pinned == sum(count > 0 for count in pins.values())


def name_has_no_child(parent: BlockKey, here: dict[BlockHash, BlockKey]) -> bool:
    return all(other.parent != parent.block_hash for other in here.values())
