from __future__ import annotations

import struct
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block_hash import HASH_SCHEME, HASH_SIZE_BYTES, HashChain

CHAIN = HashChain(model_fingerprint="model-a", block_size=4)
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=64)
WHOLE_BLOCKS = st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=64)


def reference_hashes(chain: HashChain, token_ids: list[int], cache_salt: str, tenant: str) -> list[bytes]:
    """The scheme from its description, without sharing code."""
    root = b""
    for part in (HASH_SCHEME, chain.model_fingerprint, str(chain.block_size), tenant, cache_salt):
        raw = part.encode()
        root += struct.pack("<I", len(raw)) + raw
    parent = blake2b(root, digest_size=16).digest()
    hashes = []
    for block in range(len(token_ids) // chain.block_size):
        tokens = token_ids[block * chain.block_size : (block + 1) * chain.block_size]
        parent = blake2b(parent + struct.pack(f"<{len(tokens)}I", *tokens), digest_size=16).digest()
        hashes.append(parent)
    return hashes


@pytest.mark.parametrize(
    ("token_ids", "cache_salt", "expected"),
    [
        ([1, 2, 3, 4], "", "d70a1ea52b0c4dffcd99bfc63d38bddf"),
        ([1, 2, 3, 4, 5, 6, 7, 8], "", "e95d2a4cf1c8773ef5af83a8b675278a"),
        ([1, 2, 3, 4], "tenant-b", "d0fbb263bf7c521fc63134ba6f2fb708"),
        ([0, 0, 0, 2**32 - 1], "", "71893bc08261122afdded8b0741a453c"),
    ],
)
def test_vectors_stay_what_other_versions_computed(
    token_ids: list[int], cache_salt: str, expected: str
) -> None:
    assert CHAIN.hashes(token_ids, cache_salt)[-1].hex() == expected


@given(TOKENS, st.text(max_size=8), st.text(max_size=8), st.integers(1, 9))
def test_hashes_follow_the_documented_scheme(
    token_ids: list[int], salt: str, tenant: str, block_size: int
) -> None:
    chain = HashChain(model_fingerprint="model-a", block_size=block_size)
    assert chain.hashes(token_ids, salt, tenant) == reference_hashes(chain, token_ids, salt, tenant)


@given(TOKENS)
def test_children_one_by_one_equal_hashes_at_once(token_ids: list[int]) -> None:
    parent = CHAIN.root("salt")
    one_by_one = []
    for start in range(0, len(token_ids) - CHAIN.block_size + 1, CHAIN.block_size):
        parent = CHAIN.child(parent, token_ids[start : start + CHAIN.block_size])
        one_by_one.append(parent)
    assert one_by_one == CHAIN.hashes(token_ids, "salt")


@given(WHOLE_BLOCKS, st.data())
def test_a_changed_token_changes_its_block_and_all_later_ones(
    token_ids: list[int], data: st.DataObject
) -> None:
    before = CHAIN.hashes(token_ids)
    position = data.draw(st.integers(0, len(before) * CHAIN.block_size - 1))
    token_ids[position] ^= 1
    after = CHAIN.hashes(token_ids)
    block = position // CHAIN.block_size
    assert before[:block] == after[:block]
    assert not set(before[block:]) & set(after[block:])


def test_model_salt_and_block_size_separate_equal_tokens() -> None:
    tokens = [1] * 8
    chains = [
        HashChain(model_fingerprint="ab", block_size=4).hashes(tokens, "c"),
        HashChain(model_fingerprint="a", block_size=4).hashes(tokens, "bc"),
        HashChain(model_fingerprint="ab", block_size=8).hashes(tokens, "c"),
        HashChain(model_fingerprint="ab", block_size=4).hashes(tokens, ""),
    ]
    firsts = {hashes[0] for hashes in chains}
    assert len(firsts) == len(chains)
    assert {len(first) for first in firsts} == {HASH_SIZE_BYTES}


def test_tenant_and_salt_separate_equal_tokens_and_do_not_run_together() -> None:
    pairs = [("", ""), ("a", ""), ("", "a"), ("ab", "c"), ("a", "bc")]
    assert len({CHAIN.hashes([1] * 4, salt, tenant)[0] for salt, tenant in pairs}) == len(pairs)


def test_a_partial_last_block_has_no_hash() -> None:
    assert len(CHAIN.hashes(list(range(7)))) == 1


def test_token_ids_beyond_32_bits_are_refused() -> None:
    with pytest.raises(OverflowError):
        CHAIN.hashes([2**32, 0, 0, 0])
