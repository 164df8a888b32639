"""From the options of `baton bench` to what is sent and when."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from baton.bench.trace import Replay, read_trace, replay
from baton.bench.workload import (
    Conversations,
    RequestClass,
    Session,
    Workload,
    mixed_sessions,
    poisson_arrivals,
)

_SHARE = 0.8  # of a prompt, for shared-prefix
_NUM_GROUPS = 8  # the same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset",
        choices=("random", "shared-prefix", "multi-turn", "trace"),
        help="(default: random, or trace with --trace)",
    )
    parser.add_argument(
        "--num-requests",
        type=int,
        default=32,
        help="for each rate; of a trace: at most (default %(default)s)",
    )
    parser.add_argument(
        "--prompt-len",
        type=int,
        default=128,
        help="tokens; multi-turn: new ones a turn (default %(default)s)",
    )
    parser.add_argument("--output-len", type=int, default=64, help="tokens (default %(default)s)")
    parser.add_argument(
        "--shared-prefix-len",
        type=int,
        help="leading tokens common to the prompts of a group; multi-turn: the system prompt "
        f"(default 0; shared-prefix: {_SHARE:.0%}% of the prompt)",
    )
    parser.add_argument(
        "--num-groups", type=int, help=f"different shared prefixes (default 1; shared-prefix: {_NUM_GROUPS})"
    )
    parser.add_argument("--num-turns", type=int, default=4, help="multi-turn (default %(default)s)")
    parser.add_argument(
        "--think-s", type=float, default=0.0, help="multi-turn: mean time to the next turn (default 0)"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="requests in Mooncake's JSON-lines format")
    parser.add_argument(
        "--trace-time-scale", type=float, default=1.0, help="0.5: twice as fast (default %(default)s)"
    )
    parser.add_argument(
        "--trace-length-scale", type=float, default=1.0, help="of prompts and answers (default %(default)s)"
    )
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="NAME=WEIGHT:IN:OUT",
        help="a share of the requests with lengths of their own; may be repeated",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=4_000, help="random ids below it (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default %(default)s)")


def dataset_name(args: argparse.Namespace) -> str:
    """ValueError for options that contradict each other."""
    name = args.dataset or ("trace" if args.trace else "random")
    if (name == "trace") != (args.trace is not None):
        raise ValueError("--dataset trace needs --trace FILE, and --trace no other dataset")
    if args.classes and name != "random":
        raise ValueError(f"--class does not go with --dataset {name}")
    return str(name)


def build_sessions(args: argparse.Namespace, seed: int) -> tuple[list[Session], list[float] | None]:
    """And when they begin, where the dataset says so. ValueError, OSError."""
    name = dataset_name(args)
    if name == "trace":
        how = Replay(
            time_scale=args.trace_time_scale,
            length_scale=args.trace_length_scale,
            max_requests=args.num_requests,
            vocab_size=args.vocab_size,
            seed=seed,
        )
        return replay(read_trace(args.trace), how)
    if name == "multi-turn":
        return _conversations(args, seed).sessions(), None
    if args.classes:
        classes = [RequestClass.parse(text) for text in args.classes]
        return mixed_sessions(classes, args.num_requests, args.vocab_size, seed), None
    return _workload(args, name, seed).sessions(), None


def arrivals(sessions: list[Session], requests_per_s: float, seed: int) -> list[float]:
    """Poisson; of sessions, so that their turns come to about that many requests a second."""
    num_requests = sum(session.num_requests for session in sessions)
    return poisson_arrivals(len(sessions), requests_per_s * len(sessions) / num_requests, seed)


def describe(args: argparse.Namespace) -> str:
    name = dataset_name(args)
    if name == "trace":
        return f"trace {args.trace.name}"
    if args.classes:
        return ", ".join(args.classes)
    lengths = f"{args.prompt_len} tokens in, {args.output_len} out"
    return lengths if name == "random" else f"{name}, {lengths}"


def _workload(args: argparse.Namespace, name: str, seed: int) -> Workload:
    is_shared = name == "shared-prefix"
    shared_len = round(_SHARE * args.prompt_len) if is_shared else 0
    return Workload(
        num_requests=args.num_requests,
        prompt_len=args.prompt_len,
        output_len=args.output_len,
        shared_prefix_len=shared_len if args.shared_prefix_len is None else args.shared_prefix_len,
        num_groups=args.num_groups or (_NUM_GROUPS if is_shared else 1),
        vocab_size=args.vocab_size,
        seed=seed,
    )


def _conversations(args: argparse.Namespace, seed: int) -> Conversations:
    return Conversations(
        num_sessions=math.ceil(args.num_requests / max(1, args.num_turns)),
        num_turns=args.num_turns,
        prompt_len=args.prompt_len,
        output_len=args.output_len,
        system_len=args.shared_prefix_len or 0,
        num_groups=args.num_groups or 1,
        mean_think_s=args.think_s,
        vocab_size=args.vocab_size,
        seed=seed,
    )
