"""A key's quota around one request: reserved by estimate, corrected by what was used."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kvstore.api_keys import ApiKey
from kvstore.quota_window import Reservation
from kvstore.quotas import Quotas
from router.caller import Caller
from router.refusals import QuotaExceeded
from servicekit.errors import InvalidRequest, Overloaded

# Output tokens reserved for one sequence, at most. Clients ask for far more than they get, or for all there
# is: what a longer answer really used is charged when it ends.
MAX_RESERVED_OUTPUT_TOKENS = 1024

Headers = dict[str, str]
UsedTokens = Callable[[], int]


class Grant:
    """One request's part of a quota, until it is settled."""

    def __init__(self, headers: Headers) -> None:
        self.headers = headers  # x-ratelimit-*

    async def settle(self, *, was_served: bool = True) -> None:
        """Charges what was used. Idempotent. Before the last byte of an answer: a client that then asks again
        finds its quota in order."""


class _ReservedGrant(Grant):
    def __init__(
        self, quotas: Quotas, key: ApiKey, reservation: Reservation, num_reserved: int, used: UsedTokens
    ) -> None:
        super().__init__(_headers(key, reservation))
        self._quotas = quotas
        self._key = key
        self._reservation = reservation
        self._num_reserved = num_reserved
        self._num_used_tokens = used
        self._is_settled = False

    async def settle(self, *, was_served: bool = True) -> None:
        if self._is_settled:
            return
        self._is_settled = True
        more_requests = 0 if was_served else -1
        more_tokens = self._num_used_tokens() - self._num_reserved
        if more_requests or more_tokens:
            await self._quotas.settle(
                self._key, self._reservation, more_requests=more_requests, more_tokens=more_tokens
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    num_prompt_tokens: int
    num_output_tokens: int  # reserved for the answer

    @classmethod
    def of(cls, num_prompt_tokens: int, max_tokens: list[int]) -> Demand:
        """`max_tokens` of each sequence."""
        return cls(
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=sum(min(most, MAX_RESERVED_OUTPUT_TOKENS) for most in max_tokens),
        )


class QuotaGate:
    def __init__(self, quotas: Quotas | None) -> None:
        self._quotas = quotas

    @asynccontextmanager
    async def admit(
        self, caller: Caller, demand: Demand, num_used_tokens: UsedTokens
    ) -> AsyncIterator[Grant]:
        """`num_used_tokens` is asked when the request ends, in whatever way.

        Raises QuotaExceeded, and InvalidRequest for a prompt that no wait makes fit.
        """
        key = caller.key
        if self._quotas is None or key is None or not key.has_quota:
            yield Grant({})
            return
        num_reserved = _reserved_tokens(key, demand)
        reservation = await self._quotas.reserve(key, num_reserved)
        if not reservation.is_granted:
            raise QuotaExceeded(
                f"the API key {key.name!r} has used up {_limits(key)}; "
                f"try again in {reservation.retry_after_s} s",
                retry_after_s=reservation.retry_after_s,
                headers=_headers(key, reservation),
            )
        grant = _ReservedGrant(self._quotas, key, reservation, num_reserved, num_used_tokens)
        try:
            yield grant
        except Overloaded:
            await grant.settle(was_served=num_used_tokens() > 0)
            raise
        finally:
            await grant.settle()


def _reserved_tokens(key: ApiKey, demand: Demand) -> int:
    """No more than the limit, so that a long answer is served when nothing else is."""
    limit = key.tokens_per_minute
    wanted = demand.num_prompt_tokens + demand.num_output_tokens
    if limit is None:
        return wanted
    if demand.num_prompt_tokens > limit:
        raise InvalidRequest(
            f"the prompt has {demand.num_prompt_tokens} tokens and the API key allows {limit} a minute",
            code="request_exceeds_quota",
        )
    return min(wanted, limit)


def _limits(key: ApiKey) -> str:
    parts = []
    if key.requests_per_minute is not None:
        parts.append(f"{key.requests_per_minute} requests")
    if key.tokens_per_minute is not None:
        parts.append(f"{key.tokens_per_minute} tokens")
    return f"its {' or '.join(parts)} a minute"


def _headers(key: ApiKey, reservation: Reservation) -> Headers:
    """OpenAI's. A limit that the key does not have is left out."""
    headers: Headers = {}
    for name, limit, left, reset_s in (
        ("requests", key.requests_per_minute, reservation.requests_left, reservation.requests_reset_s),
        ("tokens", key.tokens_per_minute, reservation.tokens_left, reservation.tokens_reset_s),
    ):
        if limit is not None:
            headers[f"x-ratelimit-limit-{name}"] = str(limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(left)
            headers[f"x-ratelimit-reset-{name}"] = f"{reset_s}s"
    return headers
