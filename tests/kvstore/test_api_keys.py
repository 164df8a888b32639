from __future__ import annotations

import asyncio

import pytest

from kvstore import keys
from kvstore.api_key_mirror import ApiKeyMirror
from kvstore.api_keys import ApiKey, KeyNameTaken, RedisApiKeys, digest_of, new_secret
from kvstore.embedded import EmbeddedServer
from kvstore.store import Store, StoreUnavailable


def api_key(secret: str, name: str = "ada", **fields: object) -> ApiKey:
    return ApiKey(name=name, digest=digest_of(secret), tenant=name, **fields)  # type: ignore[arg-type]


class FakeListing:
    def __init__(self, *listed: ApiKey) -> None:
        self.listed = list(listed)
        self.is_away = False
        self.num_looks = 0
        self._version = 0

    def change(self, *listed: ApiKey) -> None:
        self.listed = list(listed)
        self._version += 1

    async def version(self) -> str:
        self.num_looks += 1
        if self.is_away:
            raise StoreUnavailable("away")
        return str(self._version)

    async def list(self) -> list[ApiKey]:
        return self.listed


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_secrets_are_long_and_never_the_same() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(len(secret.removeprefix("baton-")) == 43 for secret in secrets)  # 256 bits in base64


async def test_a_key_is_created_once_listed_and_revoked(store: Store) -> None:
    api_keys = RedisApiKeys(store)
    key = api_key(new_secret(), requests_per_minute=5, priority="high", expires_at=99.0)
    await api_keys.create(key)
    with pytest.raises(KeyNameTaken, match="ada"):
        await api_keys.create(api_key(new_secret()))
    assert await api_keys.list() == [key]
    assert await api_keys.revoke("ada")
    assert not await api_keys.revoke("ada")
    assert await api_keys.list() == []


async def test_the_secret_is_nowhere_in_redis(store: Store) -> None:
    secret = new_secret()
    await RedisApiKeys(store).create(api_key(secret))
    stored = await store.redis.hgetall(keys.API_KEYS)
    assert stored
    assert secret.removeprefix("baton-").encode() not in b"".join([*stored, *stored.values()])
    assert digest_of(secret).encode() in b"".join(stored.values())


async def test_the_version_changes_with_every_change(store: Store) -> None:
    api_keys = RedisApiKeys(store)
    versions = [await api_keys.version()]
    await api_keys.create(api_key(new_secret()))
    versions.append(await api_keys.version())
    await api_keys.revoke("ada")
    versions.append(await api_keys.version())
    assert versions[0] == "" and len(set(versions)) == 3


@pytest.mark.parametrize("fields", [{"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"priority": "x"}])
def test_a_key_that_makes_no_sense_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        api_key("secret", **fields)


async def test_a_known_key_is_found_without_a_look(store: Store) -> None:
    listing = FakeListing(api_key("good"))
    mirror = ApiKeyMirror(listing, grace_s=60, clock=Clock())
    found = await mirror.find("good")
    assert found is not None and found.name == "ada"
    for _ in range(10):
        await mirror.find("good")
    assert listing.num_looks == 1


async def test_a_new_key_works_at_once_and_strangers_cost_few_looks() -> None:
    clock = Clock()
    listing = FakeListing()
    mirror = ApiKeyMirror(listing, grace_s=60, clock=clock)
    assert await mirror.find("good") is None
    listing.change(api_key("good"))
    clock.now += 0.5
    assert await mirror.find("good") is not None
    num_looks = listing.num_looks
    clock.now += 0.5
    guesses = await asyncio.gather(*(mirror.find(f"guess {number}") for number in range(100)))
    assert guesses == [None] * 100
    assert listing.num_looks == num_looks + 1


async def test_without_redis_known_keys_go_on_for_a_while_and_unknown_ones_are_not_judged() -> None:
    clock = Clock()
    listing = FakeListing(api_key("good"))
    mirror = ApiKeyMirror(listing, grace_s=60, clock=clock)
    await mirror.find("good")
    listing.is_away = True
    clock.now += 59
    assert await mirror.find("good") is not None
    with pytest.raises(StoreUnavailable):
        await mirror.find("unknown")
    clock.now += 2
    with pytest.raises(StoreUnavailable):
        await mirror.find("good")


async def test_a_mirror_that_never_saw_redis_lets_nobody_in() -> None:
    listing = FakeListing(api_key("good"))
    listing.is_away = True
    with pytest.raises(StoreUnavailable):
        await ApiKeyMirror(listing, grace_s=60).find("good")


async def test_an_emptied_redis_ends_all_keys(
    mortal_redis: tuple[EmbeddedServer, str], mortal_store: Store
) -> None:
    secret, clock = new_secret(), Clock()
    await RedisApiKeys(mortal_store).create(api_key(secret))
    mirror = ApiKeyMirror(RedisApiKeys(mortal_store), grace_s=60, clock=clock)
    assert await mirror.find(secret) is not None
    await mortal_store.redis.flushall()
    clock.now += 1
    assert await mirror.find("another") is None  # looked, and saw that all are gone
    assert await mirror.find(secret) is None
