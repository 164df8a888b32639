"""Who may look: with an admin key whoever knows it, without one only this machine."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress

from fastapi import Request
from starlette.datastructures import Headers

from kvstore.api_key_mirror import ApiKeyMirror
from router.caller import authenticate
from router.refusals import NotAllowed, NotAuthenticated
from servicekit.errors import ServingError


class UiAccess:
    def __init__(self, admin_key: str | None, keys: ApiKeyMirror | None = None) -> None:
        """`keys`: the API keys, none of which opens anything here."""
        self._admin_key = admin_key.encode() if admin_key else None
        self._keys = keys

    def check_page(self, request: Request) -> None:
        """For the static files, which hold no data. Raises NotAllowed."""
        if self._admin_key is None and not _is_local(request):
            raise NotAllowed(
                f"{request.url.path} answers this machine only, unless the router's setting admin_key is set"
            )

    async def check_data(self, request: Request) -> None:
        """Raises NotAllowed, also for a caller who shows an API key instead, or NotAuthenticated."""
        self.check_page(request)
        if self._admin_key is None or hmac.compare_digest(_bearer(request.headers), self._admin_key):
            return
        if await self._is_api_key(request):
            raise NotAllowed("an API key is not enough here: it takes the admin key")
        raise NotAuthenticated("the admin key is missing or wrong")

    async def _is_api_key(self, request: Request) -> bool:
        if self._keys is not None:
            with contextlib.suppress(ServingError):
                await authenticate(self._keys, request.headers.raw)
                return True
        return False


def _is_local(request: Request) -> bool:
    """Asked by this machine, and under its own name: a page elsewhere whose name points here has another."""
    host, _, port = request.headers.get("host", "").rpartition(":")
    if not port.isdigit():
        host = request.headers.get("host", "")
    is_own_name = host == "localhost" or _is_loopback(host.strip("[]"))
    return is_own_name and request.client is not None and _is_loopback(request.client.host)


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _bearer(headers: Headers) -> bytes:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip().encode() if scheme.lower() == "bearer" else b""
