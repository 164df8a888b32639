from __future__ import annotations

import pytest

from engine.tiers.block_key import BlockKey
from engine.tiers.host_tier import HostTier
from kvstore.block_hash import BlockHash
from tests.fakes.fake_model import fake_kv_layout

ROOT = BlockHash(bytes(16))


def key(i: int, parent: BlockHash = ROOT, depth: int = 0) -> BlockKey:
    return BlockKey(BlockHash(i.to_bytes(16, "big")), parent, depth)


@pytest.fixture
def tier() -> HostTier:
    return HostTier(fake_kv_layout(), 4)


def fill(tier: HostTier, block: BlockKey) -> int | None:
    slot = tier.reserve(block)
    tier.check_integrity()
    if slot is not None:
        tier.commit(slot)
        tier.check_integrity()
    return slot


def test_slots_run_out_and_the_coldest_block_goes(tier: HostTier) -> None:
    gone: list[BlockHash] = []
    tier.on_evict = gone.append
    slots = [fill(tier, key(i)) for i in range(1, 5)]
    assert sorted(slots) == [0, 1, 2, 3] and (tier.num_free, tier.num_cached, tier.num_used) == (0, 4, 0)
    tier.use(key(1).block_hash)
    assert fill(tier, key(5)) == slots[1]
    assert gone == [key(2).block_hash] and key(2).block_hash not in tier


def test_all_slots_in_use_is_no_room(tier: HostTier) -> None:
    for i in range(1, 4):
        fill(tier, key(i))
        tier.pin(key(i).block_hash)
    filling = tier.reserve(key(4))
    assert filling is not None and tier.num_used == 4
    assert tier.reserve(key(5)) is None
    tier.cancel(filling)
    assert tier.num_free == 1
    assert fill(tier, key(5)) == filling
    tier.unpin(key(1).block_hash)
    assert fill(tier, key(6)) is not None and key(1).block_hash not in tier
    tier.check_integrity()


def test_chain_longer_than_the_tier_keeps_its_beginning(tier: HostTier) -> None:
    chain = [key(1)]
    for i in range(2, 9):
        chain.append(key(i, chain[-1].block_hash, i - 1))
    slots = [fill(tier, block) for block in chain]
    assert slots[4:] == [None] * 4
    assert [block.block_hash in tier for block in chain] == [True] * 4 + [False] * 4


def test_a_discarded_block_frees_its_slot_when_nobody_pins_it(tier: HostTier) -> None:
    gone: list[BlockHash] = []
    tier.on_evict = gone.append
    for _ in range(2):
        fill(tier, key(1))
        tier.pin(key(1).block_hash)
        tier.pin(key(1).block_hash)
        tier.discard(key(1).block_hash)
        tier.discard(key(1).block_hash)
        tier.unpin(key(1).block_hash)
        assert key(1).block_hash in tier and not gone
        tier.unpin(key(1).block_hash)
        tier.discard(key(1).block_hash)
        assert key(1).block_hash not in tier and tier.num_free == 4
        tier.check_integrity()
        assert gone == [key(1).block_hash]
        gone.clear()


@pytest.mark.parametrize("arrives", [True, False])
def test_a_discarded_block_stays_while_the_one_behind_it_is_on_the_way(tier: HostTier, arrives: bool) -> None:
    fill(tier, key(1))
    child = key(2, key(1).block_hash, 1)
    slot = tier.reserve(child)
    assert slot is not None
    tier.discard(key(1).block_hash)
    assert key(1).block_hash in tier
    if arrives:
        tier.commit(slot)
    else:
        tier.cancel(slot)
    assert key(1).block_hash not in tier and tier.num_free == 4 - arrives
    tier.check_integrity()


def test_a_block_that_came_again_is_as_wanted_as_any(tier: HostTier) -> None:
    """The wish to be rid of it went with the one before."""
    for i in range(1, 5):
        fill(tier, key(i))
    tier.pin(key(1).block_hash)
    tier.discard(key(1).block_hash)
    tier.unpin(key(1).block_hash)
    fill(tier, key(1))
    tier.pin(key(1).block_hash)
    tier.unpin(key(1).block_hash)
    assert key(1).block_hash in tier


def test_slots_hold_bytes(tier: HostTier) -> None:
    layout = tier.blocks.layout
    slot = fill(tier, key(1))
    assert slot is not None
    payload = bytes(range(96)) * (layout.block_bytes // 96)
    tier.blocks.write_blocks(0, layout.num_layers, [slot], payload)
    assert bytes(tier.blocks.read_blocks(0, layout.num_layers, [slot])) == payload
    tier.close()
    tier.close()
