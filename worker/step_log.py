"""Every step in the log, at level DEBUG: what a gap between two tokens was spent on."""

from __future__ import annotations

import time

from engine.outputs import StepOutput
from servicekit.logging import get_logger

log = get_logger(__name__)


def log_step(step: StepOutput) -> None:
    """In the event loop, behind the sinks. ended_at is of the monotonic clock, which processes of one machine
    share; delivered_s later its tokens were on their way."""
    stats = step.stats
    log.debug(
        "step",
        ended_at=stats.ended_at,
        step_s=stats.step_s,
        delivered_s=time.monotonic() - stats.ended_at,
        num_decodes=stats.num_decode_tokens,
        num_prefill_tokens=stats.num_prefill_tokens,
        listened_s=stats.listened_s,
        kept_device_waiting=stats.kept_device_waiting,
    )
