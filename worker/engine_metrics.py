"""baton_engine_*: what the engine does, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from engine.grammar.step_masks import GrammarTimes
from engine.outputs import SpeculationStats, StepOutput, StepStats
from engine.step_stats import EngineLoad
from servicekit.metrics import SECONDS_BUCKETS, TokenHistogram
from worker.tier_metrics import TierMetrics

Load = EngineLoad | StepStats  # what both of them say

_EXPERT_WINDOW_S = 2.0  # of steps, added up before expert load is judged


class EngineMetrics:
    def __init__(self, registry: CollectorRegistry, num_blocks: int) -> None:
        def gauge(name: str, text: str, value: Callable[[Load], float]) -> None:
            """Asked for when the page is read, not set in every step."""
            Gauge(f"baton_engine_{name}", text, registry=registry).set_function(lambda: value(self._load))

        def counter(name: str, text: str) -> Counter:
            return Counter(f"baton_engine_{name}", text, registry=registry)

        self._num_blocks = num_blocks
        self._load: Load = EngineLoad(0, 0, 0, num_blocks, 0, 0, num_blocks)
        self._num_batch_tokens = 0
        gauge("total_blocks", "KV blocks of this worker", lambda _: num_blocks)
        gauge("free_blocks", "KV blocks that hold nothing", lambda load: load.num_free_blocks)
        gauge("cached_blocks", "unused KV blocks kept for prefix hits", lambda load: load.num_cached_blocks)
        gauge(
            "used_blocks", "KV blocks owned by sequences or reservations", lambda load: load.num_used_blocks
        )
        gauge("kv_usage_ratio", "used KV blocks / all", lambda load: load.num_used_blocks / num_blocks)
        gauge("running_sequences", "sequences in the batch", lambda load: load.num_running)
        waiting = "sequences not scheduled yet, or preempted"
        gauge("waiting_sequences", waiting, lambda load: load.num_waiting)
        gauge("batch_tokens", "tokens computed in the last step", lambda _: self._num_batch_tokens)
        self._prefill_tokens = counter("prefill_tokens", "prompt tokens computed")
        self._decode_tokens = counter("decode_tokens", "tokens computed for decoding sequences")
        self._hit_tokens = counter("prefix_hit_tokens", "prompt tokens found in the prefix cache")
        self._queried_tokens = counter("prefix_queried_tokens", "prompt tokens looked up in the prefix cache")
        self._preemptions = counter("preemptions", "sequences that lost their blocks to another")
        self._idle_steps = counter("idle_steps", "steps without tokens, for the expert-parallel group")
        self._step_seconds = TokenHistogram(
            "baton_engine_step_seconds", "one engine step", SECONDS_BUCKETS, registry
        )
        self._itl_seconds = TokenHistogram(
            "baton_engine_itl_seconds", "step time, once for each token decoded", SECONDS_BUCKETS, registry
        )
        self.experts = ExpertLoadMetrics(registry)
        self.grammars = GrammarMetrics(registry)
        self.tiers = TierMetrics(registry)
        self._speculation = SpeculationMetrics(registry)

    def observe(self, step: StepOutput) -> None:
        stats = step.stats
        self._load = stats
        self._num_batch_tokens = stats.num_prefill_tokens + stats.num_decode_tokens
        for counter, number in (
            (self._prefill_tokens, stats.num_prefill_tokens),
            (self._decode_tokens, stats.num_decode_tokens),
            (self._hit_tokens, stats.num_hit_tokens),
            (self._queried_tokens, stats.num_queried_tokens),
            (self._preemptions, stats.num_preemptions),
            (self._idle_steps, stats.is_idle_step),
        ):
            if number:
                counter.inc(number)
        self._step_seconds.observe(stats.step_s)
        if stats.num_decode_tokens:
            self._itl_seconds.observe(stats.step_s, stats.num_decode_tokens)
        if stats.speculation.num_drafts:
            num_accepted = stats.speculation.num_accepted_tokens
            self._itl_seconds.observe(0.0, num_accepted)  # they come with another token: no gap
            self._speculation.observe(stats.speculation)
        self.experts.observe(stats)
        if stats.grammar.num_masks:
            self.grammars.observe(stats.grammar)
        if stats.tiers or stats.loads:
            self.tiers.observe(stats.tiers, stats.loads)

    @property
    def device_blocks(self) -> dict[str, int]:
        return {
            "total": self._num_blocks,
            "used": self._load.num_used_blocks,
            "cached": self._load.num_cached_blocks,
        }

    def observe_load(self, load: EngineLoad) -> None:
        self._load = load


class GrammarMetrics:
    """Compiling, and the masks of the steps: wait / mask seconds is what the forward pass did not hide."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"baton_engine_grammar_{name}", text, registry=registry)

        self._compile_seconds = Histogram(
            "baton_engine_grammar_compile_seconds",
            "compiling one grammar that was not in the cache",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._masks = counter("masks", "token masks of sequences with a grammar")
        self._mask_seconds = counter("mask_seconds", "computing them, beside the forward pass")
        self._wait_seconds = counter("wait_seconds", "sampling that waited for them")

    def observe_compile(self, seconds: float) -> None:
        """On any thread."""
        self._compile_seconds.observe(seconds)

    def observe(self, times: GrammarTimes) -> None:
        self._masks.inc(times.num_masks)
        self._mask_seconds.inc(times.mask_s)
        self._wait_seconds.inc(times.wait_s)


class SpeculationMetrics:
    """Accepted / draft tokens is the acceptance; 1 + accepted tokens / drafts the tokens of a step."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"baton_engine_spec_{name}", text, labels, registry=registry)

        self._drafts = counter("drafts", "times that a sequence had drafts to check")
        self._draft_tokens = counter("draft_tokens", "drafts checked")
        self._accepted_tokens = counter("accepted_tokens", "drafts that were right")
        self._accepted_at = counter(
            "accepted_tokens_per_pos", "drafts that were right, by place in their draft, from 0", "position"
        )
        self._accepted_at.labels("0")  # 0 is a number, no series is none

    def observe(self, stats: SpeculationStats) -> None:
        self._drafts.inc(stats.num_drafts)
        self._draft_tokens.inc(stats.num_draft_tokens)
        self._accepted_tokens.inc(stats.num_accepted_tokens)
        for position, num_tokens in enumerate(stats.num_accepted_at):
            self._accepted_at.labels(str(position)).inc(num_tokens)


class ExpertLoadMetrics:
    """A label for each expert would be thousands of series; the skew of each layer says what matters.

    Who wants them all asks for recent_loads().
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._balancedness = Gauge(
            "baton_engine_expert_balancedness",
            "mean / highest tokens of an expert, averaged over layers; 1 is even",
            registry=registry,
        )
        self._skew = Gauge(
            "baton_engine_expert_skew_ratio",
            "tokens of the busiest expert / mean",
            ["moe_layer"],
            registry=registry,
        )
        self._last_loads: list[list[int]] = []  # of the window before, no longer changed
        self._loads: list[list[int]] = []  # [moe layer][logical expert], tokens of this window
        self._window_s = 0.0

    def observe(self, stats: StepStats) -> None:
        if not stats.expert_load:
            return
        if not self._loads:
            self._loads = [[0] * len(layer) for layer in stats.expert_load]
        for totals, loads in zip(self._loads, stats.expert_load, strict=True):
            for expert, num_tokens in enumerate(loads):
                totals[expert] += num_tokens
        self._window_s += stats.step_s
        if self._window_s >= _EXPERT_WINDOW_S:
            self._publish()

    def recent_loads(self) -> list[list[int]]:
        """[moe layer][logical expert] tokens of the last two windows, this one included; [] before any.

        Safe on any thread, perhaps with half of a step that is just being counted.
        """
        last, now = self._last_loads, self._loads
        if not last or not now:
            return [list(layer) for layer in last or now]
        return [[a + b for a, b in zip(*layers, strict=True)] for layers in zip(last, now, strict=True)]

    def _publish(self) -> None:
        skews = [skew(loads) for loads in self._loads]
        for layer, value in enumerate(skews):
            self._skew.labels(str(layer)).set(value)
        self._balancedness.set(sum(1 / value for value in skews) / len(skews))
        self._last_loads = self._loads
        self._loads = []
        self._window_s = 0.0


def skew(loads: Sequence[int]) -> float:
    """Highest / mean load; 1 for no load at all."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0
