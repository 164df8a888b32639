"""python -m decode_svc"""

from __future__ import annotations

import sys

from decode_svc.settings import PREFIX, DecodeSettings
from worker.launch import launch


def run(settings: DecodeSettings) -> int:
    # Here, not above: these import torch, which reads the environment that launch() prepares.
    from decode_svc.build import build_service
    from worker.worker_process import EpMembership, WorkerProcess

    membership = EpMembership(
        group_id=settings.group_id,
        rank=settings.ep_rank,
        size=settings.ep_size,
        address=settings.ep_address,
    )
    return WorkerProcess("decode", settings, build_service, membership).run()


if __name__ == "__main__":
    sys.exit(launch(DecodeSettings, PREFIX, run))
