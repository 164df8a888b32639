"""Whose request it is."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.requests import Request

from kvstore.api_key_mirror import ApiKeyMirror
from kvstore.api_keys import ApiKey, Priority
from kvstore.store import StoreUnavailable
from router.refusals import NotAuthenticated
from servicekit.errors import Overloaded

_KEY_CHECK_RETRY_S = 2.0
# The smallest number that each may ask for, and has when it asks for none.
_BEST_PRIORITY: dict[Priority, int] = {"high": -100, "normal": 0, "low": 100}


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    key: ApiKey | None = None  # None: API keys are not asked for

    @property
    def tenant(self) -> str:
        return self.key.tenant if self.key else ""

    def priority(self, asked: int | None) -> int:
        """Of a request that asks for `asked`: the smaller, the earlier. Asking gets nobody before others."""
        best = _BEST_PRIORITY[self.key.priority if self.key else "normal"]
        return best if asked is None else max(asked, best)

    def may_use(self, model: str) -> bool:
        return self.key is None or not self.key.models or model in self.key.models


ANYBODY = Caller()


def caller_of(request: Request) -> Caller:
    """As the gate found out."""
    caller: Caller = getattr(request.state, "caller", ANYBODY)
    return caller


async def authenticate(keys: ApiKeyMirror, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
    """Raises NotAuthenticated, or Overloaded while keys cannot be checked."""
    secret = secret_of(headers)
    if not secret:
        raise NotAuthenticated("an API key is needed: Authorization: Bearer KEY, or x-api-key: KEY")
    try:
        key = await keys.find(secret)
    except StoreUnavailable as error:
        raise Overloaded(
            "API keys cannot be checked at the moment", retry_after_s=_KEY_CHECK_RETRY_S
        ) from error
    if key is None:
        raise NotAuthenticated("the API key is not known")
    if key.expires_at is not None and key.expires_at <= time.time():
        raise NotAuthenticated("the API key has expired")
    return Caller(key=key)


def secret_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The API key that a request names, as OpenAI's or Anthropic's clients do; "" without one."""
    other = ""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, secret = value.partition(b" ")
            if scheme.lower() == b"bearer" and secret.strip():
                return secret.strip().decode("latin-1")
        elif name == b"x-api-key":
            other = value.strip().decode("latin-1")
    return other
