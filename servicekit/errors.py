"""Whose fault it is. One table maps these to gRPC statuses (rpc.py) and one to HTTP (router/http_errors.py).

ServingError
  x InvalidRequest   the caller's: never retried
  x Overloaded       no room before the deadline: try elsewhere, or after retry_after_s
  x WorkerLost       a worker drained, died or was cut off: submit elsewhere
  x HandoffFailed    KV did not arrive whole: layout, checksum or counts
"""

from __future__ import annotations


class ServingError(Exception):
    """Base of expected failures. The message says what was expected and what was found, never prompt text."""


class InvalidRequest(ServingError):
    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param  # the request field at fault, in OpenAI's error body
        self.code = code


class Overloaded(ServingError):
    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WorkerLost(ServingError):
    pass


class HandoffFailed(ServingError):
    def __init__(self, message: str, *, state: str) -> None:
        super().__init__(message)
        self.state = state  # RESERVED or TRANSFERRING
