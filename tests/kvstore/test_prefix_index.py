from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvstore.block_hash import BlockHash
from kvstore.prefix_index import MemoryIndex, PrefixHit


def block(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "little"))


def blocks(*numbers: int) -> list[BlockHash]:
    return [block(number) for number in numbers]


def lookup_reference(held: dict[str, set[BlockHash]], hashes: Sequence[BlockHash]) -> dict[str, int]:
    """Intersects the workers block by block, up to the first gap of each."""
    runs = dict.fromkeys(held, 0)
    for position, block_hash in enumerate(hashes):
        for worker_id, known in held.items():
            if runs[worker_id] == position and block_hash in known:
                runs[worker_id] += 1
    return {worker_id: run for worker_id, run in runs.items() if run}


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["publish", "evict", "drop"]),
        st.sampled_from(["a", "b", "c"]),
        st.lists(st.integers(0, 12), max_size=8),
    ),
    max_size=30,
)


@given(CHANGES, st.lists(st.integers(0, 12), unique=True))
def test_lookup_equals_the_reference_after_any_changes(
    changes: list[tuple[str, str, list[int]]], prompt: list[int]
) -> None:
    index = MemoryIndex()
    held: dict[str, set[BlockHash]] = {}
    for verb, worker_id, numbers in changes:
        if verb == "publish":
            index.publish(worker_id, blocks(*numbers))
            held.setdefault(worker_id, set()).update(blocks(*numbers))
        elif verb == "evict":
            index.evict(worker_id, blocks(*numbers))
            held.get(worker_id, set()).difference_update(blocks(*numbers))
        else:
            index.drop(worker_id)
            held.pop(worker_id, None)
    hits = index.lookup(blocks(*prompt))
    assert {hit.worker_id: hit.num_blocks for hit in hits} == lookup_reference(held, blocks(*prompt))
    assert index.num_blocks == sum(map(len, held.values()))


@given(CHANGES, st.integers(0, 10))
def test_memory_is_bounded_and_nothing_is_shown_that_is_not_held(
    changes: list[tuple[str, str, list[int]]], max_blocks: int
) -> None:
    index = MemoryIndex(max_blocks)
    held: dict[str, set[BlockHash]] = {}
    for verb, worker_id, numbers in changes:
        if verb == "publish":
            held.setdefault(worker_id, set()).update(blocks(*numbers))
            index.publish(worker_id, blocks(*numbers))
        elif verb == "evict":
            held.get(worker_id, set()).difference_update(blocks(*numbers))
            index.evict(worker_id, blocks(*numbers))
        else:
            held.pop(worker_id, None)
            index.drop(worker_id)
        shown = {worker_id: index.blocks(worker_id) for worker_id in index.workers()}
        assert sum(map(len, shown.values())) == index.num_blocks <= max_blocks
        assert all(known <= held[worker_id] for worker_id, known in shown.items())


def test_refused_blocks_are_counted() -> None:
    index = MemoryIndex(max_blocks=2)
    index.publish("a", blocks(1, 2, 3, 4, 5))
    assert (index.num_blocks, index.num_refused) == (2, 3)


def test_the_longest_run_comes_first_and_ties_go_by_worker_id() -> None:
    index = MemoryIndex()
    index.publish("short", blocks(1))
    index.publish("z", blocks(1, 2))
    index.publish("a", blocks(1, 2))
    index.publish("other", blocks(2))
    hits = index.lookup(blocks(1, 2, 3))
    assert hits == [PrefixHit("a", 2), PrefixHit("z", 2), PrefixHit("short", 1)]


def test_lookup_stops_at_the_first_gap() -> None:
    class Prompt(Sequence[BlockHash]):
        num_read = 0

        def __len__(self) -> int:
            return 6250

        def __getitem__(self, position):  # type: ignore[no-untyped-def]
            raise AssertionError("reads in order")

        def __iter__(self) -> Iterator[BlockHash]:
            for number in range(len(self)):
                self.num_read += 1
                yield block(number)

    index = MemoryIndex()
    index.publish("a", blocks(0, 1, 2, *range(4, 6250)))
    prompt = Prompt()
    assert index.lookup(prompt) == [PrefixHit("a", 3)]
    assert prompt.num_read == 4


def test_an_empty_prompt_hits_nobody() -> None:
    index = MemoryIndex()
    index.publish("a", blocks(1))
    assert index.lookup([]) == []
