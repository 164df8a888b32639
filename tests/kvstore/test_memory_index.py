from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block_hash import BlockHash, BlockTier
from kvstore.memory_index import MemoryIndex
from kvstore.prefix_index import PrefixHit

DEVICE, HOST, DISK = BlockTier
WORKERS = ["a", "b", "c"]


def block(number: int) -> BlockHash:
    return BlockHash((number * 0x9E3779B1 % 2**32).to_bytes(4, "little") + number.to_bytes(12, "little"))


def blocks(*numbers: int) -> list[BlockHash]:
    return [block(number) for number in numbers]


def sweep_all(index: MemoryIndex) -> None:
    while index.sweep():
        pass


Held = dict[str, dict[BlockHash, BlockTier]]


def lookup_reference(held: Held, hashes: Sequence[BlockHash]) -> list[PrefixHit]:
    """Intersects the workers block by block, up to the first gap of each."""
    counts = {worker_id: [0, 0, 0] for worker_id in held}
    for position, block_hash in enumerate(hashes):
        for worker_id, known in held.items():
            if sum(counts[worker_id]) == position and block_hash in known:
                counts[worker_id][known[block_hash]] += 1
    hits = [PrefixHit(worker_id, sum(c), (c[0], c[1], c[2])) for worker_id, c in counts.items() if sum(c)]
    return sorted(hits, key=lambda hit: (-hit.num_blocks, hit.worker_id))


@dataclass
class Model:
    """An index beside the simplest thing that says what it should show."""

    index: MemoryIndex
    held: Held = field(default_factory=dict)

    def act(self, verb: str, worker_id: str, numbers: Sequence[int], tier: BlockTier) -> None:
        hashes = blocks(*numbers)
        match verb:
            case "publish":
                self.index.publish(worker_id, hashes, tier)
                self.held.setdefault(worker_id, {}).update(dict.fromkeys(hashes, tier))
            case "evict":
                self.index.evict(worker_id, hashes)
                self.held[worker_id] = {
                    block_hash: held_in
                    for block_hash, held_in in self.held.get(worker_id, {}).items()
                    if block_hash not in hashes
                }
            case "drop":
                self.index.drop(worker_id)
                self.held.pop(worker_id, None)
            case "replace" | "begin to replace":
                replacement = self.index.replace(worker_id)
                replacement.publish(hashes, tier)
                if verb == "replace":
                    replacement.show()
                    self.held[worker_id] = dict.fromkeys(hashes, tier)
                replacement.discard()
            case "sweep":
                for _ in range(100):
                    self.index.sweep()
            case "lookup":
                self.index.lookup(hashes)

    def shown(self) -> Held:
        return {worker_id: self.index.tiers(worker_id) for worker_id in self.index.workers()}


# Ranges make runs of blocks that prompts follow, lists break them.
NUMBERS = st.one_of(
    st.lists(st.integers(0, 40), max_size=8),
    st.builds(range, st.integers(0, 20), st.integers(20, 150)).map(list),
    st.lists(st.builds(range, st.integers(0, 120), st.integers(20, 150)), min_size=2, max_size=3).map(
        lambda parts: [number for part in parts for number in part]
    ),
)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(
            ["publish", "publish", "evict", "drop", "replace", "begin to replace", "sweep", "lookup"]
        ),
        st.sampled_from(WORKERS),
        NUMBERS,
        st.sampled_from(BlockTier),
    ),
    max_size=30,
)


@given(CHANGES, NUMBERS)
def test_lookup_equals_the_reference_after_any_changes(
    changes: list[tuple[str, str, list[int], BlockTier]], prompt: list[int]
) -> None:
    model = Model(MemoryIndex())
    for change in changes:
        model.act(*change)
        expected = lookup_reference(model.held, blocks(*prompt))
        assert model.index.lookup(blocks(*prompt)) == expected
        assert model.index.lookup(blocks(*prompt)) == expected  # over the runs that the first one made
        model.index.check_integrity()
    assert {w: held for w, held in model.shown().items() if held} == {
        w: held for w, held in model.held.items() if held
    }
    sweep_all(model.index)
    model.index.check_integrity()
    assert model.index.num_blocks == len(set().union(*model.held.values()))


@given(CHANGES, NUMBERS, st.integers(0, 60))
def test_memory_is_bounded_and_nothing_is_shown_that_is_not_held(
    changes: list[tuple[str, str, list[int], BlockTier]], prompt: list[int], max_blocks: int
) -> None:
    model = Model(MemoryIndex(max_blocks))
    for change in changes:
        model.act(*change)
        model.index.check_integrity()
        assert model.index.num_blocks <= max_blocks
        longest = {hit.worker_id: hit.num_blocks for hit in lookup_reference(model.held, blocks(*prompt))}
        for hit in model.index.lookup(blocks(*prompt)):
            assert hit.num_blocks <= longest[hit.worker_id]
        for worker_id, shown in model.shown().items():
            assert shown.items() <= model.held.get(worker_id, {}).items()


def test_refused_blocks_are_counted() -> None:
    index = MemoryIndex(max_blocks=2)
    index.publish("a", blocks(1, 2, 3, 4, 5))
    assert (index.num_blocks, index.num_refused) == (2, 3)


def test_a_block_counts_once_however_many_hold_it() -> None:
    index = MemoryIndex(max_blocks=2)
    index.publish("a", blocks(1, 2))
    index.publish("b", blocks(1, 2))
    assert (index.num_blocks, index.num_refused) == (2, 0)


def test_the_longest_run_comes_first_and_ties_go_by_worker_id() -> None:
    index = MemoryIndex()
    index.publish("short", blocks(1))
    index.publish("z", blocks(1, 2))
    index.publish("a", blocks(1, 2))
    index.publish("other", blocks(2))
    hits = index.lookup(blocks(1, 2, 3))
    assert hits == [
        PrefixHit("a", 2, (2, 0, 0)),
        PrefixHit("z", 2, (2, 0, 0)),
        PrefixHit("short", 1, (1, 0, 0)),
    ]


def test_a_hit_says_how_much_of_it_is_in_which_tier() -> None:
    index = MemoryIndex()
    index.publish("a", blocks(*range(100)), DISK)
    index.publish("a", blocks(*range(10, 30)), HOST)
    index.publish("a", blocks(*range(5), 29), DEVICE)
    assert index.lookup(blocks(*range(100))) == [PrefixHit("a", 100, (6, 19, 75))]


def test_a_block_that_moves_down_and_up_is_in_one_tier_only() -> None:
    index = MemoryIndex()
    index.publish("a", blocks(1))
    index.publish("a", blocks(1), HOST)
    assert index.lookup(blocks(1)) == [PrefixHit("a", 1, (0, 1, 0))]
    index.publish("a", blocks(1), DEVICE)
    assert index.tiers("a") == {block(1): DEVICE}
    index.evict("a", blocks(1))
    assert index.num_blocks == 0


class Prompt(Sequence[BlockHash]):
    """Notes how far it was read."""

    num_read = 0

    def __len__(self) -> int:
        return 6250

    def __iter__(self) -> Iterator[BlockHash]:
        raise AssertionError("would read all of it")

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        end = place.indices(len(self))[1] if isinstance(place, slice) else place + 1
        self.num_read = max(self.num_read, end)
        return blocks(*range(6250)[place]) if isinstance(place, slice) else block(place)


def test_lookup_stops_near_the_first_gap() -> None:
    index = MemoryIndex()
    index.publish("a", blocks(0, 1, 2, *range(4, 6250)))
    prompt = Prompt()
    assert index.lookup(prompt) == [PrefixHit("a", 3, (3, 0, 0))]
    assert prompt.num_read <= 64


def test_lookup_ends_where_the_last_holder_ends_though_others_know_the_rest() -> None:
    index = MemoryIndex()
    index.publish("a", blocks(*range(70)))
    index.publish("b", blocks(*range(1, 6250)))
    prompt = Prompt()
    assert index.lookup(prompt) == [PrefixHit("a", 70, (70, 0, 0))]
    assert prompt.num_read <= 70 + 64


def test_an_empty_prompt_hits_nobody() -> None:
    index = MemoryIndex()
    index.publish("a", blocks(1))
    assert index.lookup([]) == []


@pytest.mark.parametrize("others", [[], ["b"], ["b", "c"]])
def test_a_dropped_worker_is_hidden_before_anything_is_swept(others: list[str]) -> None:
    index = MemoryIndex()
    for worker_id in ["a", *others]:
        index.publish(worker_id, blocks(*range(100)))
    index.drop("a")
    assert [hit.worker_id for hit in index.lookup(blocks(*range(100)))] == others
    assert "a" not in index.workers()
    sweep_all(index)
    assert index.num_blocks == (100 if others else 0)


def test_a_dropped_worker_may_come_back_before_it_is_swept() -> None:
    index = MemoryIndex()
    index.publish("a", blocks(*range(100)))
    index.drop("a")
    index.sweep()
    index.publish("a", blocks(*range(50)), HOST)
    for _ in range(300):
        assert index.lookup(blocks(*range(100))) == [PrefixHit("a", 50, (0, 50, 0))]
        index.sweep()
    assert index.num_blocks == 50


def test_places_of_the_dead_are_used_again() -> None:
    index = MemoryIndex()
    for number in range(1000):
        index.publish(f"worker-{number}", blocks(*range(20)))
        index.publish("always", blocks(*range(20)))
        index.drop(f"worker-{number}")
        sweep_all(index)
    [hit] = index.lookup(blocks(*range(20)))
    assert hit.worker_id == "always"
    assert max(index._slots.values()) < 4


def test_a_replacement_shows_nothing_before_its_end() -> None:
    index = MemoryIndex()
    index.publish("a", blocks(1, 2))
    replacement = index.replace("a")
    replacement.publish(blocks(1, 2, 3), HOST)
    assert index.lookup(blocks(1, 2, 3)) == [PrefixHit("a", 2, (2, 0, 0))]
    replacement.show()
    assert index.lookup(blocks(1, 2, 3)) == [PrefixHit("a", 3, (0, 3, 0))]
    sweep_all(index)
    assert index.lookup(blocks(1, 2, 3)) == [PrefixHit("a", 3, (0, 3, 0))]
    assert index.workers() == {"a": 3}


def test_a_discarded_replacement_leaves_nothing() -> None:
    index = MemoryIndex()
    replacement = index.replace("a")
    replacement.publish(blocks(*range(100)), HOST)
    replacement.discard()
    sweep_all(index)
    assert (index.num_blocks, index.workers(), index.lookup(blocks(0))) == (0, {}, [])


def arrivals(order: str) -> Callable[[MemoryIndex], None]:
    def publish(index: MemoryIndex) -> None:
        match order:
            case "at once":
                index.publish("a", blocks(*range(640)))
            case "one by one":
                for number in range(640):
                    index.publish("a", blocks(number))
            case "as a snapshot":
                replacement = index.replace("a")
                replacement.publish(blocks(*sorted(range(640), key=block)), DEVICE)
                replacement.show()

    return publish


@pytest.mark.parametrize("order", ["at once", "one by one", "as a snapshot"])
def test_a_prompt_that_was_looked_up_is_followed_in_runs(order: str) -> None:
    index = MemoryIndex()
    arrivals(order)(index)
    prompt = blocks(*range(640))
    index.lookup(prompt)
    assert sum(map(len, index._runs.values())) == 640 * 16
    assert len(index._runs) == 10


def test_a_run_is_followed_from_any_block_for_as_long_as_the_prompt_does() -> None:
    """Steps with pieces of several prompts, as workers tell them."""
    index = MemoryIndex()
    first, second = range(64), range(64, 128)
    for start in range(0, 64, 16):
        index.publish("a", blocks(*first[start : start + 16], *second[start : start + 16]))
    runs = dict(index._runs)
    assert len(runs) == 4
    for prompt in (first, second, [*first[:40], 900, 901], first[:17], [*first[:9], *second[9:20]]):
        num_same = next((i for i, number in enumerate(prompt) if number not in range(128)), len(prompt))
        assert index.lookup(blocks(*prompt)) == [PrefixHit("a", num_same, (num_same, 0, 0))]
        assert index._runs == runs  # prompts that part do not undo each other's runs
    index.check_integrity()


def test_the_garbage_collector_does_not_visit_blocks() -> None:
    index = MemoryIndex()
    index.publish("a", blocks(*range(20_000)))
    index.publish("b", blocks(*range(0, 20_000, 3)), HOST)
    index.lookup(blocks(*range(20_000)))
    assert not any(map(gc.is_tracked, [*index._shards, index._runs, index._shared]))
