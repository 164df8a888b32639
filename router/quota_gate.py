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
        self, caller: Caller, demand: Demand, num_used_tokens: Callable[[], int]
    ) -> AsyncIterator[Headers]:
        """Gives the x-ratelimit-* headers. `num_used_tokens` is asked when the request has ended, in any way.

        Raises QuotaExceeded, and InvalidRequest for a prompt that no wait makes fit.
        """
        key = caller.key
        if self._quotas is None or key is None or not key.has_quota:
            yield {}
            return
        num_reserved = _reserved_tokens(key, demand)
        reservation = await self._quotas.reserve(key, num_reserved)
        headers = _headers(key, reservation)
        if not reservation.is_granted:
            raise QuotaExceeded(
                f"the API key {key.name!r} has used up {_limits(key)}; "
                f"try again in {reservation.retry_after_s} s",
                retry_after_s=reservation.retry_after_s,
                headers=headers,
            )
        more_requests = 0
        try:
            yield headers
        except Overloaded:
            more_requests = 0 if num_used_tokens() else -1  # it was turned away, not served
            raise
        finally:
            more_tokens = num_used_tokens() - num_reserved
            if more_requests or more_tokens:
                await self._quotas.settle(
                    key, reservation, more_requests=more_requests, more_tokens=more_tokens
                )


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
