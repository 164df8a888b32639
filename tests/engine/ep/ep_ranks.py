"""Runs a function on every rank of a real group, one process each."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from engine.ep.ep_group import EpGroup

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["torch", "pytest", "engine.ep.ep_group"])  # once, not once a rank


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def run_ranks(size: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """body(group, *args) of every rank, by rank; afterwards the group ends as it should. Fails after 40 s."""
    address = free_address()
    ranks = [_start(_run_and_end, rank, size, address, body, args) for rank in range(size)]
    return collect(ranks, timeout_s=40.0)


def run_doomed_ranks(
    size: int, body: Callable[..., Any], *args: Any, group_timeout_s: float = 20.0
) -> list[Any]:
    """As run_ranks, without the proper end. None for a rank that was killed."""
    address = free_address()
    ranks = [_start(_run_rank, rank, size, address, group_timeout_s, body, args) for rank in range(size)]
    return collect(ranks, timeout_s=40.0)


def start_apart(bodies: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """Run plain functions in processes of their own."""
    return collect([_start(body, *args) for body, args in bodies], timeout_s=40.0)


def collect(ranks: list[tuple[Any, multiprocessing.connection.Connection]], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    reports = []
    try:
        for rank, (process, connection) in enumerate(ranks):
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"process {rank} hangs"
            reports.append((None, None) if process.exitcode < 0 else connection.recv())
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
    failures = [f"process {rank}: {failure}" for rank, (failure, _) in enumerate(reports) if failure]
    assert not failures, "\n".join(failures)
    return [result for _, result in reports]


def _start(target: Callable[..., Any], *args: Any) -> tuple[Any, multiprocessing.connection.Connection]:
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_report, args=(sender, target, args))
    process.start()
    sender.close()
    return process, receiver


def _report(
    sender: multiprocessing.connection.Connection, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        sender.send((None, target(*args)))
    except BaseException:  # noqa: BLE001 - the parent fails with it
        sender.send((traceback.format_exc(), None))


def _run_rank(
    rank: int, size: int, address: str, timeout_s: float, body: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    group = EpGroup(rank, size, address, timeout_s)
    try:
        group.wait_for_peers(20.0)
        return body(group, *args)
    finally:
        group.close()


def _run_and_end(rank: int, size: int, address: str, body: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return _run_rank(rank, size, address, 20.0, _then_end, (body, args))


def _then_end(group: EpGroup, body: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    result = body(group, *args)
    end(group)
    return result


def end(group: EpGroup) -> None:
    """Leave, and step until the others have left too."""
    group.leave()
    while not group.has_ended:
        group.agree(0)
