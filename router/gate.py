"""The first thing that every HTTP request meets: who is it, is it allowed here, is there room for it.

An ASGI application around the other one. Endpoints find the caller in `request.state.caller`.
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from kvstore.api_key_mirror import ApiKeyMirror
from router.caller import ANYBODY, Caller, authenticate
from router.endpoint import error_body_of
from router.http_errors import error_response
from router.metrics import RouterMetrics
from servicekit.errors import Overloaded, ServingError

# What load balancers ask; the rest needs a key as soon as keys are asked for.
_OPEN_PATHS = frozenset({"/health", "/ready"})
# These have a guard of their own (router/ui/access.py).
_ADMIN_PATHS = ("/ui", "/metrics")
_ROOM_RETRY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRules:
    keys: ApiKeyMirror | None  # None: everybody may ask
    max_concurrent_requests: int


class Gate:
    def __init__(self, app: ASGIApp, rules: GateRules, metrics: RouterMetrics) -> None:
        self._app = app
        self._rules = rules
        self._metrics = metrics
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            caller = await self._caller(scope)
            if self._num_open >= self._rules.max_concurrent_requests:
                raise Overloaded(
                    f"this router already serves {self._num_open} requests, its limit",
                    retry_after_s=_ROOM_RETRY_S,
                )
        except ServingError as error:
            self._metrics.refused(error)
            await error_response(error, error_body_of(scope["path"]))(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        self._num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_open -= 1

    async def _caller(self, scope: Scope) -> Caller:
        # A browser asks before it may send a key.
        if self._rules.keys is None or scope["method"] == "OPTIONS":
            return ANYBODY
        return await authenticate(self._rules.keys, scope["headers"])


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(_ADMIN_PATHS)
