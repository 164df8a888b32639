from __future__ import annotations

import random

from kvstore.block_hash import BlockHash, BlockTier
from kvstore.block_order import ScannedBlocks, place_bytes

DEVICE, HOST, DISK = BlockTier


def block(number: int) -> BlockHash:
    return BlockHash(random.Random(number).randbytes(16))


def value(tier: BlockTier, place: int) -> bytes:
    return b"%d" % tier + place_bytes(place)


def test_pieces_of_a_scan_come_out_by_place_in_runs_of_one_tier() -> None:
    draw = random.Random(1)
    places = draw.sample(range(1 << 40), 5000)
    tiers = {place: draw.choice(list(BlockTier)) for place in places}
    scanned = ScannedBlocks()
    for start in range(0, 5000, 700):
        piece = places[start : start + 700]
        scanned.add({block(place): value(tiers[place], place) for place in piece})
    batches = list(scanned.batches())
    told = [(tier, block_hash) for batch in batches for tier, hashes in batch for block_hash in hashes]
    assert told == [(tiers[place], block(place)) for place in sorted(places)]
    assert max(sum(len(hashes) for _, hashes in batch) for batch in batches) <= 512
    for batch in batches:
        assert all(tier is not after for (tier, _), (after, _) in zip(batch, batch[1:], strict=False))


def test_a_scan_of_nothing_has_no_batches() -> None:
    scanned = ScannedBlocks()
    scanned.add({})
    assert list(scanned.batches()) == []


def test_blocks_without_a_place_come_first_and_values_of_another_program_not_at_all() -> None:
    scanned = ScannedBlocks()
    scanned.add({block(1): value(HOST, 7), block(2): b"2", block(3): b"x" + place_bytes(1), block(4): b""})
    scanned.add({block(5): value(DEVICE, 3), block(6): value(DISK, 1) + b"more"})
    assert list(scanned.batches()) == [[(DISK, [block(2)]), (DEVICE, [block(5)]), (HOST, [block(1)])]]
