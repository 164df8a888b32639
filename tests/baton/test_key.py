from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from baton.__main__ import main
from kvstore.api_keys import ApiKey, RedisApiKeys, digest_of
from kvstore.store import Store
from tests.fakes.redis_server import redis_server


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with redis_server() as (_, url):
        monkeypatch.setenv("REDIS_URL", url)
        yield url


def stored(url: str) -> list[ApiKey]:
    async def read() -> list[ApiKey]:
        store = Store(url)
        try:
            return await RedisApiKeys(store).list()
        finally:
            await store.close()

    return asyncio.run(read())


def test_create_shows_the_key_alone_on_stdout(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tenant", "engines", "--requests-per-minute", "5", "--tokens-per-minute", "70"]
    assert main(["key", "create", "ada", *options, "--priority", "low", "--expires", "12h"]) == 0
    secret = capsys.readouterr().out.strip()
    [key] = stored(url)
    assert key.digest == digest_of(secret)
    assert (key.name, key.tenant, key.priority) == ("ada", "engines", "low")
    assert (key.requests_per_minute, key.tokens_per_minute) == (5, 70)
    assert key.expires_at == pytest.approx(time.time() + 12 * 3600, abs=60)


def test_list_and_revoke(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["key", "list"])
    assert capsys.readouterr().out == "no keys\n"
    main(["key", "create", "ada"])
    secret = capsys.readouterr().out.strip()
    main(["key", "list"])
    page = capsys.readouterr().out
    assert "ada" in page and "never" in page
    assert secret not in page and digest_of(secret) not in page
    assert main(["key", "revoke", "ada"]) == 0
    assert stored(url) == []


def test_a_key_for_some_of_the_models_is_listed_with_them(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a-long-name-of-a-team@example.org"
    main(["key", "create", name, "--models", "llama-3.1-8b-instruct, deepseek-v3", "--priority", "high"])
    [key] = stored(url)
    assert key.models == ("llama-3.1-8b-instruct", "deepseek-v3")
    capsys.readouterr()
    main(["key", "list"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if "llama" in line]
    assert name in line and "high" in line and "llama-3.1-8b-instruct, deepseek-v3" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "ada", "--expires", "soon"], "--expires soon"),
        (["create", "ada", "--expires", "0d"], "--expires 0d"),
        (["create", "a b"], "1 to 64 letters"),
        (["create", "ada", "--requests-per-minute", "0"], "requests_per_minute must be 1 or more"),
        (["create", "taken"], "'taken'"),
        (["revoke", "nobody"], "no key is named 'nobody'"),
        (["create", "ada", "--priority", "urgent"], "urgent"),
        ([], "create"),
    ],
)
def test_mistakes_are_one_line(
    url: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    main(["key", "create", "taken"])
    capsys.readouterr()
    assert main(["key", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert [key.name for key in stored(url)] == ["taken"]


def test_without_redis_it_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    assert main(["key", "list"]) == 2
    assert "REDIS_URL" in capsys.readouterr().err
    assert main(["key", "--redis-url", "redis://:hunter2@127.0.0.1:1", "list"]) == 1
    assert "hunter2" not in capsys.readouterr().err
