"""Says so when strangers can reach this router and nothing asks them who they are."""

from __future__ import annotations

import ipaddress

from router.settings import RouterSettings
from servicekit.logging import get_logger

log = get_logger(__name__)


def warn_if_open(settings: RouterSettings) -> None:
    """A warning, not a refusal: in a container the router must listen everywhere; the network guards it."""
    if _is_loopback(settings.host):
        return
    if not settings.require_api_key:
        log.warning(
            "open_to_everybody",
            host=settings.host,
            advice="set BATON_ROUTER_REQUIRE_API_KEY=true and make a key with `baton key create`",
        )
    elif settings.http_tls_cert is None:
        log.warning(
            "api_keys_travel_in_the_clear",
            host=settings.host,
            advice="set BATON_ROUTER_HTTP_TLS_CERT and _KEY, or end TLS in front of this router",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
