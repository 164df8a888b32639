"""The response header x-baton-route: why an answer came from where it came.

name=value pairs with "; " between them, in this order. decode, prefill ("local": the decode worker itself)
and peer (only if blocks may be fetched from it) are worker ids; predicted_hit_tokens; reason is that of the
decode worker and that of the prefill worker; cost_s and its terms in seconds, as predicted (route_cost.py).
"""

from __future__ import annotations

from router.policy import Decision

ROUTE_HEADER = b"x-baton-route"


def route_header(decision: Decision) -> bytes:
    pairs = {"decode": decision.decode_id, "prefill": decision.prefill_id or "local"}
    if decision.peer_id is not None:
        pairs["peer"] = decision.peer_id
    pairs["predicted_hit_tokens"] = str(decision.num_hit_tokens)
    pairs["reason"] = f"{decision.decode_reason},{decision.prefill_reason}"
    seconds = {"cost_s": decision.terms.total_s, **decision.terms._asdict()}
    pairs |= {name: f"{value:.4g}" for name, value in seconds.items()}
    return "; ".join(f"{name}={value}" for name, value in pairs.items()).encode()
