"""Who may look: with an admin key whoever knows it, without one only this machine."""

from __future__ import annotations

import hmac
import ipaddress

from fastapi import Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException


class UiAccess:
    def __init__(self, admin_key: str | None) -> None:
        self._admin_key = admin_key.encode() if admin_key else None

    def check_page(self, request: Request) -> None:
        """For the static files, which hold no data. Raises HTTPException."""
        if self._admin_key is None and not _is_local(request):
            raise HTTPException(
                403, "/ui answers this machine only, unless the router's setting admin_key is set"
            )

    def check_data(self, request: Request) -> None:
        """Raises HTTPException."""
        self.check_page(request)
        if self._admin_key is not None and not hmac.compare_digest(_bearer(request.headers), self._admin_key):
            raise HTTPException(401, "the admin key is missing or wrong", {"www-authenticate": "Bearer"})


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
