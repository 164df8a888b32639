"""How busy a worker is, in the words of the registry and of the link."""

from __future__ import annotations

from engine.outputs import StepOutput, StepStats
from engine.step_stats import EngineLoad
from kvstore.registry import WorkerLoad
from worker.admission import Admission

_DECAY = 0.9  # of older steps in the prefill rate
_ASSUMED_TOKENS_PER_S = 1000.0  # before anything was prefilled


class LoadMeter:
    """What the engine last said, and how fast it prefills."""

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
        self.observe_load(stats)
        if stats.num_prefill_tokens:
            self._prefill_tokens = self._prefill_tokens * _DECAY + stats.num_prefill_tokens
            self._prefill_s = self._prefill_s * _DECAY + stats.step_s

    def observe_load(self, load: EngineLoad | StepStats) -> None:
        self._num_running = load.num_running
        self._num_waiting_tokens = load.num_waiting_tokens
        self._num_free_blocks = load.num_free_blocks + load.num_cached_blocks

    @property
    def prefill_tokens_per_s(self) -> float:
        """0: nothing was prefilled yet."""
        return self._prefill_tokens / self._prefill_s if self._prefill_s else 0.0

    def retry_after_s(self) -> float:
        """Until what waits now will have been computed."""
        tokens_per_s = self.prefill_tokens_per_s or _ASSUMED_TOKENS_PER_S
        return min(60.0, max(0.1, self._num_waiting_tokens / tokens_per_s))

    def load(self) -> WorkerLoad:
        return WorkerLoad(
            num_running=self._num_running,
            # Also those that the engine does not know yet.
            num_waiting=max(0, self._admission.num_requests - self._num_running),
            num_waiting_tokens=self._num_waiting_tokens,
            num_free_blocks=self._num_free_blocks,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
        )
