"""The API keys of a deployment: who may ask, and how much.

A key is 256 random bits, shown once. Redis holds its SHA-256: with that much randomness there is nothing to
guess, so a slow password hash would protect nothing. Routers hold all keys and ask for them again when the
version changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import secrets
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, get_args

from kvstore import keys
from kvstore.store import Store

log = logging.getLogger(__name__)

Priority = Literal["low", "normal", "high"]

_PREFIX = "baton-"
_RANDOM_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    name: str  # unique in the deployment
    digest: str  # SHA-256 of the key, hex
    tenant: str  # tenants never share cached blocks
    requests_per_minute: int | None = None  # None: no limit
    tokens_per_minute: int | None = None
    priority: Priority = "normal"
    models: tuple[str, ...] = ()  # that it may use; none: all
    created_at: float = 0.0  # Unix time, seconds
    expires_at: float | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.priority not in get_args(Priority):
            raise ValueError(f"priority must be one of {', '.join(get_args(Priority))}, got {self.priority}")
        if not all(isinstance(model, str) and model for model in self.models):
            raise ValueError("models must be names")

    @property
    def has_quota(self) -> bool:
        return self.requests_per_minute is not None or self.tokens_per_minute is not None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> ApiKey:
        """ValueError when it is not a key. Fields of a newer version are ignored."""
        values = json.loads(text)
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            named = {name: value for name, value in values.items() if name in known}
            return cls(**{**named, "models": tuple(named.get("models", ()))})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not an API key: {error}") from error


class KeyNameTaken(Exception):
    pass


def new_secret() -> str:
    """What the client sends. Shown once, stored nowhere."""
    return _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


class ApiKeyListing(Protocol):
    """What a router follows. Both methods raise StoreUnavailable."""

    async def version(self) -> str:
        """Changes whenever a key does."""
        ...

    async def list(self) -> list[ApiKey]: ...


class RedisApiKeys:
    """Every method raises StoreUnavailable when Redis is away."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def create(self, key: ApiKey) -> None:
        """KeyNameTaken when the name is in use."""
        async with self._store.exchange():
            is_new = await cast(Any, self._store.redis.hsetnx(keys.API_KEYS, key.name, key.to_json()))
        if not is_new:
            raise KeyNameTaken(f"there is a key named {key.name!r} already")
        await self._changed()

    async def revoke(self, name: str) -> bool:
        """False when there is no such key."""
        async with self._store.exchange():
            was_there = await cast(Any, self._store.redis.hdel(keys.API_KEYS, name))
        await self._changed()
        return bool(was_there)

    async def version(self) -> str:
        async with self._store.exchange():
            version: bytes | None = await cast(Any, self._store.redis.get(keys.API_KEYS_VERSION))
        return version.decode() if version else ""

    async def list(self) -> list[ApiKey]:
        """By name. One that cannot be read opens nothing, and keeps no other from being read."""
        async with self._store.exchange():
            stored = await cast(Any, self._store.redis.hgetall(keys.API_KEYS))
        found = []
        for name, text in sorted(stored.items()):
            try:
                found.append(ApiKey.from_json(text))
            except ValueError:
                log.warning(
                    "api_key_unreadable", extra={"fields": {"key_name": name.decode(errors="replace")}}
                )
        return found

    async def _changed(self) -> None:
        async with self._store.exchange():
            await self._store.redis.set(keys.API_KEYS_VERSION, secrets.token_hex(8))
