"""What expert parallelism costs per MoE layer: dispatch and combine over real processes, without the experts.

    python benchmarks/ep_dispatch.py --ranks 2

Every rank sends the same number of tokens; times are medians on rank 0. `local` is the same routing with
all experts on one rank: the difference is the price of the exchange. `agree` is paid once a step, the rest
once a MoE layer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from engine.ep.ep_group import EpGroup
from engine.moe.dispatch import Dispatcher, LocalDispatcher

NUM_TOKENS = (1, 8, 32, 128, 512)  # of each rank


def measure(rank: int, address: str, options: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    group = EpGroup(rank, options.ranks, address)
    for num_tokens in NUM_TOKENS:
        generator = torch.Generator().manual_seed(rank)
        x_TD = torch.randn(num_tokens, options.hidden, generator=generator).to(getattr(torch, options.dtype))
        scores_TE = torch.rand(num_tokens, options.experts, generator=generator)
        inputs = (x_TD, scores_TE.topk(options.top_k).indices, torch.rand(num_tokens, options.top_k))
        times = [time_layer(group, inputs, options.experts) for _ in range(options.repeats + 20)][20:]
        results.put((num_tokens, *(statistics.median(column) for column in zip(*times, strict=True))))
    group.leave()
    while not group.has_ended:
        group.agree(0)
    group.close()


def time_layer(group: EpGroup, inputs: tuple[torch.Tensor, ...], num_experts: int) -> tuple[float, ...]:
    """Seconds of agree, dispatch, combine, and of dispatch and combine without peers."""
    began = time.perf_counter()
    group.agree(inputs[0].shape[0])
    agreed = time.perf_counter()
    dispatched, combined = time_exchange(group.dispatcher(num_experts), *inputs)
    local = sum(time_exchange(LocalDispatcher(num_experts), *inputs))
    return agreed - began, dispatched, combined, local


def time_exchange(
    dispatcher: Dispatcher, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> tuple[float, float]:
    began = time.perf_counter()
    routed = dispatcher.dispatch(x_TD, ids_TK)
    dispatched = time.perf_counter()
    dispatcher.combine(routed.x_RD, weights_TK, routed)
    return dispatched - began, time.perf_counter() - dispatched


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    queues = [context.Queue() for _ in range(options.ranks)]
    processes = [
        context.Process(target=measure, args=(rank, address, options, queues[rank]))
        for rank in range(options.ranks)
    ]
    for process in processes:
        process.start()
    print("| tokens a rank | agree us | dispatch us | combine us | local dispatch + combine us |")
    print("| --- | --- | --- | --- | --- |")
    for _ in NUM_TOKENS:
        num_tokens, *times_s = queues[0].get(timeout=120)
        print(
            f"| {num_tokens} | " + " | ".join(f"{time_s * 1e6:.0f}" for time_s in times_s) + " |", flush=True
        )
    for process in processes:
        process.join(30)


if __name__ == "__main__":
    main()
