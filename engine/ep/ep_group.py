"""One expert-parallel group: the ranks that hold one replica's experts between them and step together.

Life of a group, seen from one rank:
1. Join. Construction blocks until all ranks are there (rendezvous at rank 0's address): a
   torch.distributed process group for the collectives, and a doorbell, one TCP connection to each peer
   with a thread that listens.
2. Ready. After its weights are loaded a rank calls wait_for_peers().
3. Asleep in epoch e. No rank is in a collective or about to enter one. The engine thread waits for its
   own event; the subscribed callback sets it.
4. Awake in epoch e. A rank with tokens calls agree(), which first rings epoch e at all peers. A peer that
   hears epoch e steps too (is_awake), with tokens or without (idle step). From here all ranks call
   agree() once a step.
5. agree() is true on every rank when any rank has tokens: all run the forward pass. It is false on every
   rank when none has: all enter epoch e + 1, asleep (3).
6. leave() announces that this rank wants to stop. It keeps taking idle steps for the others until every
   rank has left and none has tokens: then agree() is false and has_ended is true, everywhere in the same
   agree().
7. close() in any state. Before the end it counts as loss: the others raise EpGroupLost.

Why no wake-up is lost: only an agree() that is common to all ranks ends an epoch, so all count the same
epochs. A ring carries its epoch, and is_awake compares the largest epoch heard with the present one. A
ring for e + 1 that arrives before this rank has learnt the end of e is remembered and found when it gets
there (it never sleeps); a late ring for e that arrives in e + 1 compares as old and wakes nobody into a
collective that nobody else joins. Between the comparison and the sleep lies the callback: it sets the
event that the engine thread cleared before it compared. leave() is not a ring: it leaves a flag that
keeps is_awake true until an agree() has carried it.

Failure: a peer's death closes its doorbell connection. Whoever is asleep is woken by the callback and
gets EpGroupLost from is_awake; whoever is in a collective gets it there. A peer that lives but hangs ends
the collective after timeout_s. After EpGroupLost the group is of no use: close() and end the process.

A group of one rank opens no socket, starts no thread and never waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from engine.ep.all_to_all import AllToAllDispatcher
from engine.ep.doorbell import Doorbell
from engine.ep.rendezvous import Joined, join, parse_address
from engine.moe.dispatch import Dispatcher, LocalDispatcher

_LEAVING = -1  # in place of a number of tokens: none, and no more will come
_MAX_BYE_S = 5.0
_MAX_BLAME_S = 0.5


class EpGroupLost(RuntimeError):
    """A rank died, left early, did not come, or hangs. The message names the first one if it is known."""


class EpGroup:
    """agree, is_awake and all_to_all belong to one thread (the engine's); the rest may be called from any."""

    def __init__(self, rank: int = 0, size: int = 1, address: str = "", timeout_s: float = 60.0) -> None:
        """Join as `rank` of `size`; address: host:port where rank 0 listens. Blocks until all have joined.

        ValueError: rank, size or address make no sense or contradict another rank's.
        EpGroupLost: not all ranks came within timeout_s.
        """
        if size < 1 or not 0 <= rank < size:
            raise ValueError(f"EP rank {rank} of {size}: must be 0 <= rank < size")
        self.rank = rank
        self.size = size
        self.num_tokens_per_rank = [0] * size  # of the present step, set by agree()
        self._epoch = 0
        self._is_leaving = False
        self._has_announced_leave = False
        self._has_ended = False
        self._is_closed = False
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._joined: Joined | None = None
        if size > 1:
            self._joined = self._join(address, timeout_s)
            self._doorbell = Doorbell(self._joined.connections, self._notify)
            self._counts_sent = torch.empty(size, dtype=torch.int64)
            self._counts_received = torch.empty(size, dtype=torch.int64)

    def _join(self, address: str, timeout_s: float) -> Joined:
        parse_address(address)
        try:
            return join(self.rank, self.size, address, timeout_s)
        except (RuntimeError, OSError) as error:
            raise EpGroupLost(
                f"EP rank {self.rank}: the {self.size} ranks did not come together at {address}: {error}"
            ) from error

    def wait_for_peers(self, timeout_s: float) -> None:
        """Once, with the weights loaded: block until all ranks have. EpGroupLost after timeout_s."""
        if self.size == 1:
            return
        self._doorbell.announce_ready()
        if not self._doorbell.wait_until_all_ready(timeout_s):
            self._raise_if_lost()
            raise EpGroupLost(
                f"EP rank {self.rank}: not all {self.size} ranks were ready after {timeout_s:g} s"
            )

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call back now, and whenever is_awake or leaving_ranks may have changed.

        On the doorbell's thread, or the caller's of leave(). It must not block and must not raise.
        """
        with self._lock:
            self._callbacks.append(callback)
        callback()

    @property
    def is_awake(self) -> bool:
        """Whether this rank must step even without work of its own. Raises EpGroupLost."""
        if self.size == 1 or self._has_ended:
            return False
        self._raise_if_lost()
        return self._doorbell.rung_epoch >= self._epoch or (
            self._is_leaving and not self._has_announced_leave
        )

    def agree(self, num_tokens: int) -> bool:
        """Once a step, with the rows of this rank's batch: whether to run the forward pass. EpGroupLost."""
        if self.size == 1:
            self.num_tokens_per_rank = [num_tokens]
            return num_tokens > 0
        assert not self._has_ended, "agree() after the group's end"
        self._raise_if_lost()
        if self._doorbell.rung_epoch < self._epoch:
            self._doorbell.ring(self._epoch)
        is_leaving = self._is_leaving and num_tokens == 0
        self._counts_sent.fill_(_LEAVING if is_leaving else num_tokens)
        self.all_to_all(self._counts_received, self._counts_sent)
        counts: list[int] = self._counts_received.tolist()
        self.num_tokens_per_rank = [max(count, 0) for count in counts]
        self._has_announced_leave = is_leaving
        if any(self.num_tokens_per_rank):
            return True
        self._epoch += 1
        self._has_ended = all(count == _LEAVING for count in counts)
        return False

    def recount(self, num_tokens: int) -> None:
        """Within an agreed step, before a pass over other rows than the last one's. Every rank calls it."""
        self._counts_sent.fill_(num_tokens)
        self.all_to_all(self._counts_received, self._counts_sent)
        self.num_tokens_per_rank = self._counts_received.tolist()

    def dispatcher(self, num_experts: int) -> Dispatcher:
        """For MoE layers of num_experts logical experts. Every rank runs every layer of every agreed step."""
        return LocalDispatcher(num_experts) if self.size == 1 else AllToAllDispatcher(self, num_experts)

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_splits: list[int] | None = None,
        sent_splits: list[int] | None = None,
    ) -> None:
        """Rows of `sent`, split by destination rank, arrive in the others' `received`, split by source rank.

        None: even splits. Both tensors are contiguous and of one dtype. EpGroupLost.
        """
        assert self._joined is not None, "a group of one, or closed, has no collectives"
        try:
            work = self._joined.process_group.alltoall_base(  # type: ignore[attr-defined]
                received, sent, received_splits or [], sent_splits or []
            )
            work.wait()
        except RuntimeError as error:
            self._doorbell.wait_for_loss(_MAX_BLAME_S)
            self._raise_if_lost(error)
            raise EpGroupLost(f"EP rank {self.rank}: a collective failed: {error}") from error

    @property
    def leaving_ranks(self) -> frozenset[int]:
        """Ranks that have called leave(), this one included. A service drains when this is not empty."""
        own = {self.rank} if self._is_leaving else set()
        return frozenset(own) if self.size == 1 else self._doorbell.leaving_ranks | own

    def leave(self) -> None:
        """This rank wants to stop: it gets no new sequences. Keep stepping until has_ended. Idempotent."""
        with self._lock:
            if self._is_leaving:
                return
            self._is_leaving = True
        if self.size == 1:
            self._has_ended = True
        else:
            self._doorbell.announce_leaving()
        self._notify()

    @property
    def has_ended(self) -> bool:
        """All ranks have left: no further agree()."""
        return self._has_ended

    def close(self) -> None:
        """Give back sockets, thread and process group. Idempotent, bounded in time."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        if self.size == 1:
            return
        if self._has_ended:
            self._doorbell.say_bye(_MAX_BYE_S)
        self._doorbell.close()
        self._joined = None

    def _notify(self) -> None:
        with self._lock:
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()

    def _raise_if_lost(self, cause: BaseException | None = None) -> None:
        lost = self._doorbell.lost_ranks
        if lost:  # the first is the cause: the others close because they lost it too
            raise EpGroupLost(f"EP rank {self.rank}: lost rank {lost[0]}") from cause
