"""A rank that dies, leaves early, hangs or never comes ends the others' work with an exception, soon."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import pytest
import torch
from ep_ranks import end, free_address, run_doomed_ranks, run_ranks, start_apart

from engine.ep.ep_group import EpGroup, EpGroupLost

MAX_DETECTION_S = 3.0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def loss_of(body) -> tuple[str, bool]:
    started = time.monotonic()
    try:
        body()
    except EpGroupLost as error:
        return str(error), time.monotonic() - started < MAX_DETECTION_S
    return "nothing raised", False


def sleep_while_rank_2_dies(group: EpGroup) -> tuple[str, bool]:
    if group.rank == 2:
        die()
    wake = threading.Event()
    group.subscribe(wake.set)

    def sleep() -> None:
        while not group.is_awake:
            wake.wait()
            wake.clear()

    return loss_of(sleep)


def test_a_rank_killed_while_idle_wakes_the_others_with_an_error():
    results = run_doomed_ranks(3, sleep_while_rank_2_dies)

    assert results == [("EP rank 0: lost rank 2", True), ("EP rank 1: lost rank 2", True), None]


def agree_while_rank_1_dies(group: EpGroup) -> tuple[str, bool]:
    group.agree(1)
    if group.rank == 1:
        threading.Event().wait(0.3)  # the others are inside their second agree() by now
        die()
    return loss_of(lambda: group.agree(1))


def test_a_rank_killed_before_a_collective_fails_it_on_the_others():
    results = run_doomed_ranks(3, agree_while_rank_1_dies)

    assert results == [("EP rank 0: lost rank 1", True), None, ("EP rank 2: lost rank 1", True)]


def step_until_rank_0_dies(group: EpGroup) -> tuple[str, bool]:
    if group.rank == 0:
        threading.Timer(0.3, die).start()

    def step_for_ever() -> None:
        dispatcher = group.dispatcher(4)
        while True:
            group.agree(16)
            ids_TK = torch.arange(32).view(16, 2) % 4
            routed = dispatcher.dispatch(torch.ones(16, 64), ids_TK)
            dispatcher.combine(routed.x_RD, torch.ones(16, 2), routed)

    return loss_of(step_for_ever)


def test_a_rank_killed_in_the_middle_of_a_step_fails_the_others():
    results = run_doomed_ranks(3, step_until_rank_0_dies)

    assert results == [None, ("EP rank 1: lost rank 0", True), ("EP rank 2: lost rank 0", True)]


def agree_while_rank_1_closes(group: EpGroup) -> tuple[str, bool]:
    if group.rank == 1:
        threading.Event().wait(0.3)
        group.close()
        threading.Event().wait(MAX_DETECTION_S + 1.0)  # the process lives on, its engine does not
        return "closed", True
    return loss_of(lambda: group.agree(1))


def test_a_rank_that_closes_early_counts_as_lost_though_its_process_lives():
    results = run_doomed_ranks(2, agree_while_rank_1_closes)

    assert results == [("EP rank 0: lost rank 1", True), ("closed", True)]


def agree_with_a_rank_that_hangs(group: EpGroup) -> tuple[str, bool]:
    if group.rank == 1:
        threading.Event().wait(2.0)
        die()
    return loss_of(lambda: group.agree(1))


def test_a_rank_that_hangs_fails_the_others_after_the_timeout():
    message, was_soon = run_doomed_ranks(2, agree_with_a_rank_that_hangs, group_timeout_s=1.0)[0]

    assert message.startswith("EP rank 0: a collective failed: ")
    assert was_soon


def load_weights_while_rank_1_dies(address: str, rank: int) -> tuple[str, bool]:
    group = EpGroup(rank, 2, address, 20.0)
    if rank == 1:
        die()
    try:
        return loss_of(lambda: group.wait_for_peers(20.0))
    finally:
        group.close()


def test_a_rank_that_dies_while_loading_fails_those_that_wait_for_it():
    address = free_address()

    results = start_apart([(load_weights_while_rank_1_dies, (address, rank)) for rank in range(2)])

    assert results == [("EP rank 0: lost rank 1", True), None]


def wait_for_a_slow_peer(address: str, rank: int) -> tuple[str, bool]:
    group = EpGroup(rank, 2, address, 20.0)
    try:
        if rank == 1:
            threading.Event().wait(2.0)
            return "slow", True
        return loss_of(lambda: group.wait_for_peers(0.5))
    finally:
        group.close()


def test_waiting_for_a_slow_peer_is_bounded():
    address = free_address()

    results = start_apart([(wait_for_a_slow_peer, (address, rank)) for rank in range(2)])

    assert results == [("EP rank 0: not all 2 ranks were ready after 0.5 s", True), ("slow", True)]


def join_error(rank: int, size: int, address: str, timeout_s: float = 5.0) -> str:
    try:
        EpGroup(rank, size, address, timeout_s).close()
    except (ValueError, EpGroupLost) as error:
        return f"{type(error).__name__}: {error}"
    return "joined"


@pytest.mark.parametrize("rank", [0, 1])
def test_joining_alone_is_bounded_in_time(rank):
    address = free_address()

    found = join_error(rank, 2, address, timeout_s=1.0)

    assert found.startswith(f"EpGroupLost: EP rank {rank}: the 2 ranks did not come together at {address}")


def test_ranks_that_disagree_on_the_size_are_told():
    address = free_address()

    results = start_apart([(join_error, (0, 2, address, 3.0)), (join_error, (1, 3, address, 3.0))])

    assert results[1] == "ValueError: EP rank 1 expects a group of 3, rank 0 one of 2"


def test_two_processes_with_one_rank_are_told():
    address = free_address()

    results = start_apart([(join_error, (rank, 3, address, 3.0)) for rank in (0, 1, 1)])

    assert "ValueError: two processes claim EP rank 1" in results


def test_an_address_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        assert "Address already in use" in join_error(0, 2, address)


@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:", ":80", "localhost:http", "localhost:70000"]
)
def test_an_address_without_host_or_port_is_refused(address):
    assert join_error(0, 2, address).startswith("ValueError: EP address")


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_group_is_refused(rank, size):
    assert join_error(rank, size, "127.0.0.1:1").startswith(f"ValueError: EP rank {rank} of {size}")


def close_twice_after_the_end(group: EpGroup) -> bool:
    end(group)
    group.close()
    group.close()
    return any(thread.name == "ep-doorbell" for thread in threading.enumerate())


def test_close_ends_the_doorbell_thread_and_may_be_repeated():
    assert run_ranks(2, close_twice_after_the_end) == [False, False]
