"""Until when a request must be answered: the server's limit, or less if the client says so."""

from __future__ import annotations

import math

from starlette.datastructures import Headers

from servicekit.errors import InvalidRequest

TIMEOUT_HEADER = "x-request-timeout"  # seconds


def request_deadline(headers: Headers, timeout_s: float, accepted_at: float) -> float | None:
    """time.monotonic() of the deadline; None: none. `timeout_s`: of the server, 0 for no limit."""
    given = headers.get(TIMEOUT_HEADER)
    limits = [timeout_s] if timeout_s else []
    if given is not None:
        limits.append(_seconds(given))
    return accepted_at + min(limits) if limits else None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"{TIMEOUT_HEADER} must be a number of seconds above 0", param=TIMEOUT_HEADER)
    return seconds
