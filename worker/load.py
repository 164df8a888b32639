"""How busy a worker is and what its work takes, in the words of the registry and of the link."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from engine.outputs import StepOutput, StepStats
from engine.step_stats import EngineLoad
from kvstore.registry import WorkerLoad
from kvstore.worker_record import KvPath, KvRate
from worker.admission import Admission
from worker.linear_fit import LinearFit

_DECAY = 0.9  # of older steps in the prefill rate
_STEP_DECAY = 0.99  # of older steps in what steps are made of
_ASSUMED_TOKENS_PER_S = 1000.0  # before anything was prefilled
_LEAST_SHARE = 0.1  # of the mean time of a prompt token; a fit that says less has learnt from noise


class LoadMeter:
    """What the engine last said, and how fast it is."""

    def __init__(self, admission: Admission, num_blocks: int) -> None:
        self._admission = admission
        self.num_blocks = num_blocks
        self.num_running = 0
        self.num_waiting_tokens = 0
        self.num_free_blocks = num_blocks  # free or only cached
        self._prefill_tokens = 0.0
        self._prefill_s = 0.0
        self._steps = LinearFit(3, decay=_STEP_DECAY)  # the step itself, prompt tokens, decoding sequences
        self._kv_rates: list[Callable[[], Mapping[KvPath, KvRate]]] = []

    def add_kv_rates(self, measured: Callable[[], Mapping[KvPath, KvRate]]) -> None:
        """One more that knows how fast KV comes some way."""
        self._kv_rates.append(measured)

    def observe(self, step: StepOutput) -> None:
        stats = step.stats
        self.observe_load(stats)
        if stats.num_prefill_tokens:
            self._prefill_tokens = self._prefill_tokens * _DECAY + stats.num_prefill_tokens
            self._prefill_s = self._prefill_s * _DECAY + stats.step_s
        if stats.num_prefill_tokens or stats.num_decode_tokens:
            self._steps.observe((1.0, stats.num_prefill_tokens, stats.num_decode_tokens), stats.step_s)

    def observe_load(self, load: EngineLoad | StepStats) -> None:
        self.num_running = load.num_running
        self.num_waiting_tokens = load.num_waiting_tokens
        self.num_free_blocks = load.num_free_blocks + load.num_cached_blocks

    @property
    def num_waiting(self) -> int:
        """Also those that the engine does not know yet."""
        return max(0, self._admission.num_requests - self.num_running)

    @property
    def prefill_tokens_per_s(self) -> float:
        """0: nothing was prefilled yet."""
        return self._prefill_tokens / self._prefill_s if self._prefill_s else 0.0

    def retry_after_s(self) -> float:
        """Until what waits now will have been computed."""
        tokens_per_s = self.prefill_tokens_per_s or _ASSUMED_TOKENS_PER_S
        return min(60.0, max(0.1, self.num_waiting_tokens / tokens_per_s))

    def load(self) -> WorkerLoad:
        """With the rates, which take a while to work out: not for every step."""
        step_s, prefill_token_s, decode_seq_s = self._steps.solve()
        if prefill_token_s is not None and self._prefill_tokens:
            prefill_token_s = max(prefill_token_s, _LEAST_SHARE * self._prefill_s / self._prefill_tokens)
        return WorkerLoad(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_waiting_tokens=self.num_waiting_tokens,
            num_free_blocks=self.num_free_blocks,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            step_s=step_s,
            prefill_token_s=prefill_token_s,
            decode_seq_s=decode_seq_s,
            kv_rates={path: rate for measured in self._kv_rates for path, rate in measured().items()},
        )
