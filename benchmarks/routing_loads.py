"""The loads of benchmarks.prefix_routing: deterministic by seed, sized against the caches of the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.bench.trace import Replay, TraceShape, make_trace, replay
from baton.bench.workload import Conversations, Session, Workload, poisson_arrivals

LOAD_NAMES = ("shared prefix", "no sharing", "chat", "trace")
OUTPUT_LEN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Everything that decides how hard the loads are."""

    block_size: int = 16
    num_groups: int = 24  # of shared prefixes
    shared_blocks: int = 32
    share: float = 0.8  # shared tokens of a prompt
    cache_ratio: float = 0.58  # blocks of one worker's cache / blocks of all shared prefixes
    num_shared: int = 90  # requests
    shared_load: float = 1.4  # requests a second over `capacity_per_s`
    num_unshared: int = 40
    unshared_load: float = 0.6
    capacity_per_s: float = 1.0  # prompts, nothing cached, that the workers of this machine can serve
    num_sessions: int = 8
    sessions_per_s: float = 0.8
    num_turns: int = 4
    num_traced: int = 24
    vocab_size: int = 4_000

    def quick(self) -> Sizes:
        """Too few requests for a result; every step of the benchmark all the same."""
        return replace(self, num_groups=8, num_shared=12, num_unshared=6, num_sessions=3, num_traced=6)

    @property
    def shared_per_s(self) -> float:
        return self.shared_load * self.capacity_per_s

    @property
    def unshared_per_s(self) -> float:
        return self.unshared_load * self.capacity_per_s

    @property
    def prefix_len(self) -> int:
        return self.shared_blocks * self.block_size

    @property
    def prompt_len(self) -> int:
        return round(self.prefix_len / self.share)

    @property
    def working_set_blocks(self) -> int:
        """Of all shared prefixes."""
        return self.num_groups * self.shared_blocks

    @property
    def worker_blocks(self) -> int:
        return round(self.working_set_blocks * self.cache_ratio)

    def describe(self) -> list[str]:
        return [
            f"capacity, measured first: {self.capacity_per_s:.2f} prompts/s of {self.prompt_len} tokens when "
            f"nothing is cached; shared prefix comes at {self.shared_load:g} times that, no sharing at "
            f"{self.unshared_load:g} times: who finds 44 % of the tokens cached is busy for 80 % of the time",
            f"shared prefix: {self.num_groups} groups, {self.prefix_len} of {self.prompt_len} prompt tokens "
            f"shared ({self.share:.0%}), {self.shared_per_s:.2f} requests/s; each prefix is sent once before "
            f"the measurement; the prefixes are {self.working_set_blocks} blocks, a worker's cache "
            f"{self.worker_blocks}: too few for all of them in one worker, enough in two",
            f"no sharing: {self.prompt_len} tokens, {self.unshared_per_s:.2f} requests/s",
            f"chat: {self.num_sessions} sessions of {self.num_turns} turns, {self.sessions_per_s:g} begin a "
            "second, system prompts of 128 tokens in 2 groups, 96 new tokens a turn, answers of 32, "
            "2 s to think",
            f"{OUTPUT_LEN} output tokens but in chat; Poisson arrivals, the same for every policy",
        ]


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    warm_up: list[list[int]]  # prompts sent before, two at a time, not measured
    sessions: list[Session]
    arrivals_s: list[float]


def build_loads(names: Sequence[str], sizes: Sizes, repeat: int) -> list[Load]:
    builders = {"shared prefix": _shared, "no sharing": _unshared, "chat": _chat, "trace": _trace}
    return [builders[name](name, sizes, 1000 * (repeat + 1)) for name in names]


def capacity_probes(sizes: Sizes) -> list[list[list[int]]]:
    """Rounds of prompts that share nothing, to be sent a few at a time. The first one warms up."""
    workload = Workload(
        num_requests=5 * 8,
        prompt_len=sizes.prompt_len,
        output_len=OUTPUT_LEN,
        vocab_size=sizes.vocab_size,
        seed=7,
    )
    prompts = [list(turn.new_ids) for session in workload.sessions() for turn in session.turns]
    return [prompts[start : start + 8] for start in range(0, len(prompts), 8)]


def _shared(name: str, sizes: Sizes, seed: int) -> Load:
    workload = Workload(
        num_requests=sizes.num_shared,
        prompt_len=sizes.prompt_len,
        output_len=OUTPUT_LEN,
        shared_prefix_len=sizes.prefix_len,
        num_groups=sizes.num_groups,
        vocab_size=sizes.vocab_size,
        seed=seed,
    )
    arrivals_s = poisson_arrivals(sizes.num_shared, sizes.shared_per_s, seed)
    return Load(name, workload.prefixes(), workload.sessions(), arrivals_s)


def _unshared(name: str, sizes: Sizes, seed: int) -> Load:
    workload = Workload(
        num_requests=sizes.num_unshared,
        prompt_len=sizes.prompt_len,
        output_len=OUTPUT_LEN,
        vocab_size=sizes.vocab_size,
        seed=seed + 1,
    )
    return Load(
        name, [], workload.sessions(), poisson_arrivals(sizes.num_unshared, sizes.unshared_per_s, seed + 1)
    )


def _chat(name: str, sizes: Sizes, seed: int) -> Load:
    conversations = Conversations(
        num_sessions=sizes.num_sessions,
        num_turns=sizes.num_turns,
        prompt_len=96,
        output_len=32,
        system_len=128,
        num_groups=2,
        mean_think_s=2.0,
        vocab_size=sizes.vocab_size,
        seed=seed + 2,
    )
    arrivals_s = poisson_arrivals(sizes.num_sessions, sizes.sessions_per_s, seed + 2)
    return Load(name, [], conversations.sessions(), arrivals_s)


def _trace(name: str, sizes: Sizes, seed: int) -> Load:
    """A made trace with an eighth of its lengths, in a twentieth of its time."""
    shape = TraceShape(num_requests=sizes.num_traced, requests_per_s=0.05, seed=seed + 3)
    how = Replay(
        time_scale=0.05,
        length_scale=0.125,
        max_prompt_len=1_500,
        max_duration_s=60.0,
        vocab_size=sizes.vocab_size,
        seed=seed + 3,
    )
    sessions, arrivals_s = replay(make_trace(shape), how)
    return Load(name, [], sessions, arrivals_s)
