"""How busy a worker is, in the words of the registry and of the link."""

from __future__ import annotations

from engine.outputs import StepOutput
from kvstore.registry import WorkerLoad
from worker.admission import Admission

_DECAY = 0.9  # of older steps in the prefill rate
_ASSUMED_TOKENS_PER_S = 1000.0  # before anything was prefilled


class LoadMeter:
    """Adds the steps up. A worker that holds no request is idle, whatever its last step saw."""

    def __init__(self, admission: Admission, num_blocks: int) -> None:
        self._admission = admission
        self.num_blocks = num_blocks
        self._num_running = 0
        self._num_waiting_tokens = 0
        self._num_free_blocks = num_blocks
        self._prefill_tokens = 0.0
        self._prefill_s = 0.0

    def observe(self, step: StepOutput) -> None:
        stats = step.stats
        self._num_running = stats.num_running
        self._num_waiting_tokens = stats.num_waiting_tokens
        self._num_free_blocks = stats.num_free_blocks + stats.num_cached_blocks
        if stats.num_prefill_tokens:
            self._prefill_tokens = self._prefill_tokens * _DECAY + stats.num_prefill_tokens
            self._prefill_s = self._prefill_s * _DECAY + stats.step_s

    @property
    def prefill_tokens_per_s(self) -> float:
        """0: nothing was prefilled yet."""
        return self._prefill_tokens / self._prefill_s if self._prefill_s else 0.0

    def retry_after_s(self) -> float:
        """Until what waits now will have been computed."""
        tokens_per_s = self.prefill_tokens_per_s or _ASSUMED_TOKENS_PER_S
        return min(60.0, max(0.1, self._num_waiting_tokens / tokens_per_s))

    def load(self) -> WorkerLoad:
        num_requests = self._admission.num_requests
        num_running = min(self._num_running, num_requests)
        return WorkerLoad(
            num_running=num_running,
            num_waiting=num_requests - num_running,
            num_waiting_tokens=self._num_waiting_tokens if num_requests else 0,
            num_free_blocks=self._num_free_blocks if num_requests else self.num_blocks,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
        )
