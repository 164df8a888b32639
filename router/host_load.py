"""Workers that compute on the processors of one host get in each other's way.

A prompt on an idle worker is not free there: beyond the processors that the host has, it takes from the
workers that are busy what it gains by not waiting in a queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from router.route_cost import Candidate


@dataclass(slots=True)
class _Host:
    share: float = 0.0  # of its processors, taken by workers that compute
    num_requests: int = 0  # at these


def with_neighbours(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The same workers, in order, with what their hosts are busy with. All workers of a fleet belong in one
    call."""
    hosts: dict[str, _Host] = {}
    for worker in candidates:
        if worker.cpu_share and worker.host_id:
            host = hosts.setdefault(worker.host_id, _Host())
            if worker.is_computing:
                host.share += worker.cpu_share
                host.num_requests += worker.num_requests
    return [_beside(worker, hosts.get(worker.host_id)) for worker in candidates]


def _beside(worker: Candidate, host: _Host | None) -> Candidate:
    if host is None or not worker.cpu_share:
        return worker
    own_share, own_requests = (worker.cpu_share, worker.num_requests) if worker.is_computing else (0.0, 0)
    before = max(1.0, host.share)
    slowdown = max(1.0, host.share - own_share + worker.cpu_share)
    if slowdown == 1.0:
        return worker
    return replace(
        worker, slowdown=slowdown, num_slowed=(slowdown / before - 1.0) * (host.num_requests - own_requests)
    )
