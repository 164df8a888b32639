"""Why the router itself turns a request away. They never cross the wire to a worker."""

from __future__ import annotations

from collections.abc import Mapping

from servicekit.errors import ServingError


class NotAuthenticated(ServingError):
    """No API key, or nobody's."""


class NotAllowed(ServingError):
    """The caller is known and may not."""


class RequestTimeout(ServingError):
    """The client took too long to send its request."""


class QuotaExceeded(ServingError):
    """The caller's own limit, not the server's."""

    def __init__(self, message: str, *, retry_after_s: float, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.headers = dict(headers)  # the x-ratelimit-* ones
