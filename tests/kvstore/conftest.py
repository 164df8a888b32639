from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from kvstore.embedded import EmbeddedServer
from kvstore.store import Store
from tests.fakes.redis_server import flush_all, redis_server


@pytest.fixture(scope="session")
def shared_redis_url() -> Iterator[str]:
    with redis_server() as (_, url):
        yield url


@pytest.fixture
def redis_url(shared_redis_url: str) -> str:
    flush_all(shared_redis_url)
    return shared_redis_url


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[Store]:
    store = Store(redis_url)
    yield store
    await store.close()


@pytest.fixture
def mortal_redis() -> Iterator[tuple[EmbeddedServer, str]]:
    """A server that the test may kill."""
    with redis_server() as pair:
        yield pair


@pytest.fixture
async def mortal_store(mortal_redis: tuple[EmbeddedServer, str]) -> AsyncIterator[Store]:
    store = Store(mortal_redis[1])
    yield store
    await store.close()
