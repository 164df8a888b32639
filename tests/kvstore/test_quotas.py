from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import keys
from kvstore.api_keys import ApiKey
from kvstore.embedded import EmbeddedServer
from kvstore.quota_window import QuotaWindow
from kvstore.quotas import LocalQuotas, RedisQuotas
from kvstore.store import Store


def quota_key(requests: int | None = None, tokens: int | None = None) -> ApiKey:
    return ApiKey(
        name="ada", digest="d1", tenant="ada", requests_per_minute=requests, tokens_per_minute=tokens
    )


async def test_two_routers_count_as_one(store: Store) -> None:
    first, second, key = RedisQuotas(store), RedisQuotas(store), quota_key(requests=3)
    granted = [(await quotas.reserve(key, 1)).is_granted for quotas in (first, second, first, second, first)]
    assert granted == [True, True, True, False, False]


async def test_a_refusal_says_what_is_left_and_when_it_fits(store: Store) -> None:
    quotas, key = RedisQuotas(store), quota_key(requests=10, tokens=100)
    first = await quotas.reserve(key, 60)
    assert (first.is_granted, first.requests_left, first.tokens_left) == (True, 9, 40)
    refused = await quotas.reserve(key, 41)
    assert not refused.is_granted
    assert 59 <= refused.retry_after_s <= 60
    assert (refused.requests_left, refused.tokens_left) == (9, 40)  # nothing was taken
    assert 59 <= refused.tokens_reset_s <= 60
    assert (await quotas.reserve(key, 40)).is_granted


async def test_what_was_not_used_is_given_back_and_what_was_is_charged(store: Store) -> None:
    quotas, key = RedisQuotas(store), quota_key(tokens=100)
    reservation = await quotas.reserve(key, 90)
    await quotas.settle(key, reservation, more_requests=0, more_tokens=-70)
    reservation = await quotas.reserve(key, 50)
    assert reservation.is_granted and reservation.tokens_left == 30
    await quotas.settle(key, reservation, more_requests=0, more_tokens=40)
    assert not (await quotas.reserve(key, 1)).is_granted


async def test_a_reservation_that_left_the_window_gives_nothing_back(store: Store) -> None:
    quotas, key = RedisQuotas(store), quota_key(tokens=100)
    reservation = await quotas.reserve(key, 90)
    old = replace(reservation, second=reservation.second - 61)
    await quotas.settle(key, old, more_requests=0, more_tokens=-90)
    assert not (await quotas.reserve(key, 20)).is_granted


async def test_a_window_leaves_nothing_behind(store: Store) -> None:
    await RedisQuotas(store).reserve(quota_key(requests=3), 1)
    assert 0 < await store.redis.ttl(keys.quota("d1")) <= 61


async def test_the_script_and_the_local_window_agree(store: Store) -> None:
    """Random windows, seeded in both; the same reservation must get the same answer."""
    rng = random.Random(7)
    num_compared = 0
    for _ in range(60):
        key = quota_key(requests=rng.choice([None, 4, 9]), tokens=rng.choice([None, 50, 200]))
        now = int((await store.redis.time())[0])
        await store.redis.delete(keys.quota("d1"))
        window = QuotaWindow()
        for _ in range(rng.randrange(6)):
            second, tokens = now - rng.randrange(70), rng.randrange(60)
            for kind, count in (("r", 1), ("t", tokens)):
                await store.redis.hincrby(keys.quota("d1"), f"{kind}{second}", count)
            window._requests[second] += 1
            window._tokens[second] += tokens
        wanted = rng.randrange(60)
        answer = await RedisQuotas(store).reserve(key, wanted)
        if answer.second != now:
            continue  # the server's second turned meanwhile
        num_compared += 1
        expected = window.reserve(now, wanted, key.requests_per_minute, key.tokens_per_minute)
        assert answer == replace(expected, is_local=False)
    assert num_compared > 30


async def test_without_redis_this_process_counts_alone(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store
) -> None:
    quotas, key = RedisQuotas(mortal_store), quota_key(requests=2)
    assert not (await quotas.reserve(key, 1)).is_local
    mortal_redis[0].stop()
    answers = [await quotas.reserve(key, 1) for _ in range(3)]
    assert [answer.is_granted for answer in answers] == [True, True, False]
    assert all(answer.is_local for answer in answers)
    await quotas.settle(key, answers[0], more_requests=-1, more_tokens=0)
    assert (await quotas.reserve(key, 1)).is_granted


@given(
    limit=st.integers(1, 20),
    requests=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=60),
)
def test_no_minute_ever_holds_more_than_the_limit(limit: int, requests: list[tuple[int, int]]) -> None:
    window, now, granted = QuotaWindow(), 1000, []
    for pause_s, num_tokens in requests:
        now += pause_s
        answer = window.reserve(now, num_tokens, None, limit)
        if answer.is_granted:
            granted.append((now, num_tokens))
        elif num_tokens <= limit:
            later = QuotaWindow(window._requests.copy(), window._tokens.copy())
            assert later.reserve(now + answer.retry_after_s, num_tokens, None, limit).is_granted
            early = QuotaWindow(window._requests.copy(), window._tokens.copy())
            assert not early.reserve(now + answer.retry_after_s - 1, num_tokens, None, limit).is_granted
    for end, _ in granted:
        assert sum(tokens for at, tokens in granted if end - 60 < at <= end) <= limit


async def test_windows_of_keys_that_ask_no_more_are_forgotten() -> None:
    now = 1000.0
    quotas = LocalQuotas(lambda: now)
    await quotas.reserve(quota_key(requests=1), 1)
    now += 61
    await quotas.reserve(replace(quota_key(requests=1), digest="other"), 1)
    assert list(quotas._windows) == ["other"]


@pytest.mark.parametrize("is_early", [True, False])
async def test_the_wait_of_a_refusal_is_enough_and_not_too_much(is_early: bool) -> None:
    now = 1000.0
    quotas, key = LocalQuotas(lambda: now), quota_key(tokens=10)
    await quotas.reserve(key, 10)
    now += 20
    wait_s = (await quotas.reserve(key, 1)).retry_after_s
    assert wait_s == 40
    now += wait_s - is_early
    assert (await quotas.reserve(key, 1)).is_granted is not is_early
