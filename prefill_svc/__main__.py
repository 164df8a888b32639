"""python -m prefill_svc"""

from __future__ import annotations

import sys

from prefill_svc.settings import PREFIX, PrefillSettings
from worker.launch import launch


def run(settings: PrefillSettings) -> int:
    # Here, not above: these import torch, which reads the environment that launch() prepares.
    from prefill_svc.build import build_service
    from worker.worker_process import WorkerProcess

    return WorkerProcess("prefill", settings, build_service).run()


if __name__ == "__main__":
    sys.exit(launch(PrefillSettings, PREFIX, run))
