"""Ranks wake, step, sleep and end together, whatever the timing."""

from __future__ import annotations

import random
import threading
import time

import torch
from ep_ranks import end, run_ranks

from engine.ep.ep_group import EpGroup


class FakeEngineThread:
    """The loop that EpGroup is made for, with a number of tokens instead of an engine."""

    def __init__(self, group: EpGroup) -> None:
        self._group = group
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._num_steps_left = 0
        self._done = threading.Condition(self._lock)
        self.num_forwards = 0
        self.num_agrees = 0
        self.num_bursts = 0
        group.subscribe(self._wake.set)

    def add(self, num_steps: int) -> None:
        with self._lock:
            self.num_bursts += self._num_steps_left == 0
            self._num_steps_left += num_steps
        self._wake.set()

    def wait_until_done(self) -> None:
        with self._done:
            assert self._done.wait_for(lambda: self._num_steps_left == 0, 20.0), "a wake-up was lost"

    def run(self) -> None:
        while not self._group.has_ended:
            self._wake.clear()
            if self._num_steps_left or self._group.is_awake:
                self._step()
            else:
                self._wake.wait()

    def _step(self) -> None:
        with self._lock:
            num_tokens = int(self._num_steps_left > 0)
        self.num_agrees += 1
        if not self._group.agree(num_tokens):
            return
        self._check_lockstep()
        self.num_forwards += 1
        with self._done:
            self._num_steps_left -= num_tokens
            self._done.notify_all()

    def _check_lockstep(self) -> None:
        sent = torch.full((self._group.size,), self.num_forwards)
        received = torch.empty_like(sent)
        self._group.all_to_all(received, sent)
        assert received.tolist() == sent.tolist(), "ranks are in different steps"


def serve_bursts(group: EpGroup, num_bursts: int, seed: int) -> tuple[int, int, int, int]:
    """Work arrives at random moments, often just as the group falls asleep; then the rank leaves."""
    engine = FakeEngineThread(group)
    chance = random.Random(seed * 100 + group.rank)
    feeder_failures: list[BaseException] = []

    def feed() -> None:
        try:
            for _ in range(num_bursts):
                engine.add(chance.randint(1, 3))
                if chance.random() < 0.7:
                    engine.wait_until_done()
                if chance.random() < 0.5:
                    threading.Event().wait(chance.random() * 0.004)
            engine.wait_until_done()
        except BaseException as error:  # noqa: BLE001 - reported by the assertion below
            feeder_failures.append(error)
        group.leave()

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    engine.run()
    feeder.join()
    assert not feeder_failures, feeder_failures
    return engine.num_forwards, engine.num_agrees, engine.num_bursts, engine._num_steps_left


def check_bursts(results: list[tuple[int, int, int, int]], size: int) -> None:
    num_forwards, num_agrees, num_bursts, num_left = map(list, zip(*results, strict=True))
    assert num_left == [0] * size
    assert len(set(num_forwards)) == 1
    assert len(set(num_agrees)) == 1
    # Each sleep was earned by a burst or by a rank leaving: nobody spins through empty agreements.
    assert num_agrees[0] - num_forwards[0] <= sum(num_bursts) + size


def test_two_ranks_with_random_work_lose_no_wake_up():
    check_bursts(run_ranks(2, serve_bursts, 400, 1), 2)


def test_four_ranks_with_random_work_lose_no_wake_up():
    check_bursts(run_ranks(4, serve_bursts, 60, 2), 4)


def serve_on_rank_0_only(group: EpGroup) -> tuple[int, int]:
    engine = FakeEngineThread(group)
    if group.rank == 0:
        engine.add(5)
    group.leave()
    engine.run()
    return engine.num_forwards, group.num_tokens_per_rank.count(0)


def test_a_rank_without_work_takes_idle_steps_until_the_others_are_done():
    assert run_ranks(3, serve_on_rank_0_only) == [(5, 3)] * 3


def watch_peer_leave(group: EpGroup) -> list[int]:
    """Rank 1 leaves; rank 0, asleep, must hear of it, and rank 1 must not end before rank 0 leaves."""
    if group.rank == 1:
        engine = FakeEngineThread(group)
        group.leave()
        engine.run()
        return sorted(group.leaving_ranks)
    heard = threading.Event()
    group.subscribe(lambda: heard.set() if group.leaving_ranks else None)
    engine = FakeEngineThread(group)
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    assert heard.wait(10.0)
    leaving = sorted(group.leaving_ranks)
    assert not group.has_ended
    group.leave()
    thread.join(10.0)
    return leaving


def test_a_leaving_rank_tells_the_others_and_waits_for_them():
    assert run_ranks(2, watch_peer_leave) == [[1], [0, 1]]


def sleep_through_idle_time(group: EpGroup) -> float:
    engine = FakeEngineThread(group)
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    started_cpu_s = time.process_time()
    threading.Event().wait(1.0)
    used_cpu_s = time.process_time() - started_cpu_s
    group.leave()
    thread.join(10.0)
    return used_cpu_s


def test_an_idle_group_uses_no_processor_time():
    assert max(run_ranks(2, sleep_through_idle_time)) < 0.05


def late_ring_for_an_ended_epoch(group: EpGroup) -> list[bool]:
    """Both ranks ring epoch 0 themselves, so each hears the other's, late or not."""
    seen = [group.agree(1), group.agree(0)]
    threading.Event().wait(0.1)
    seen.append(group.is_awake)
    group.all_to_all(torch.empty(group.size), torch.zeros(group.size))  # nobody rings before all have looked
    end(group)
    return seen


def test_a_ring_for_an_epoch_that_has_ended_wakes_nobody():
    assert run_ranks(2, late_ring_for_an_ended_epoch) == [[True, False, False]] * 2


def test_a_group_of_one_needs_no_peers():
    num_threads = threading.active_count()
    group = EpGroup()

    agreed = [group.agree(4), group.agree(0)]
    group.wait_for_peers(0.0)

    assert agreed == [True, False]
    assert not group.is_awake
    assert threading.active_count() == num_threads
    assert group.dispatcher(5).local_experts == range(5)
    group.leave()
    assert group.has_ended
    group.close()
