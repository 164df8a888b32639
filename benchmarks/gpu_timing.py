"""Device time of kernels: calls captured in one CUDA graph, replayed between events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

Call = Callable[[], object]
BYTES_PER_S = 3.35e12  # of an H100's memory, by its data sheet
BF16_FLOPS_PER_S = 790e12  # of its matrix units on random numbers, measured
FP8_FLOPS_PER_S = 2 * BF16_FLOPS_PER_S


def graph_time(calls: Sequence[Call], *, num_replays: int = 10, num_rounds: int = 1) -> float:
    """Median seconds of one call; the calls should work on different memory, or the cache is measured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(num_rounds):
            for call in calls:
                call()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [first.elapsed_time(second) for first, second in zip(events, events[1:], strict=False)]
    return median(times) * 1e-3 / (num_rounds * len(calls))


def eager_time(call: Call, *, num_repeats: int = 5) -> float:
    """Median seconds of a call that waits for the device itself."""
    call()
    times = []
    for _ in range(num_repeats):
        first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        second.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(second) * 1e-3)
    return median(times)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
