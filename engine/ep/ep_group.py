"""One expert-parallel group: the ranks that hold one replica's experts between them and step together.

Life of a group, seen from one rank:
1. Join. Construction blocks until all ranks are there (rendezvous at rank 0's address): a torch.distributed process
   group for the collectives, and a doorbell, one TCP connection to each peer with a thread that listens.
2. Ready. After its weights are loaded a rank calls wait_for_peers().
3. Asleep in epoch e. No rank is in a collective or about to enter one. The engine thread waits for its own event;
   the subscribed callback sets it.
4. Awake in epoch e. A rank with tokens calls agree(), which first rings epoch e at all peers. A peer that hears
   epoch e steps too (is_awake), with tokens or without (idle step). From here all ranks call agree() once a step.
5. agree() is true on every rank when any rank has tokens: all run the forward pass. It is false on every rank when
   none has: all enter epoch e + 1, asleep (3).
6. leave() announces that this rank wants to stop. It keeps taking idle steps for the others until every rank has
   left and none has tokens: then agree() is false and has_ended is true, everywhere in the same agree().
7. close() in any state. Before the end it counts as loss: the others raise EpGroupLost.

Why no wake-up is lost: only an agree() that is common to all ranks ends an epoch, so all count the same epochs. A
ring carries its epoch, and is_awake compares the largest epoch heard with the present one. A ring for e + 1 that
arrives before this rank has learnt the end of e is remembered and found when it gets there (it never sleeps); a late
ring for e that arrives in e + 1 compares as old and wakes nobody into a collective that nobody else joins. Between
the comparison and the sleep lies the callback: it sets the event that the engine thread cleared before it compared.
leave() is not a ring: it leaves a flag that keeps is_awake true until an agree() has carried it.

Failure: a peer's death closes its doorbell connection. Whoever is asleep is woken by the callback and gets
EpGroupLost from is_awake; whoever is in a collective gets it there. A peer that lives but hangs ends the collective
after timeout_s. After EpGroupLost the group is of no use: close() and end the process.

A group of one rank opens no socket, starts no thread and never waits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.moe.dispatch import Dispatcher


class EpGroupLost(RuntimeError):
    """A rank of the group died, left early, did not come, or hangs. The message names the ranks known to be gone."""


class EpGroup:
    """agree, all_to_all and what they need belong to one thread (the engine's); the rest may be called from any."""

    rank: int
    size: int
    num_tokens_per_rank: list[int]  # of the present step, set by agree()

    def __init__(self, rank: int = 0, size: int = 1, address: str = "", timeout_s: float = 60.0) -> None:
        """Join as `rank` of `size`; address is host:port where rank 0 listens. Blocks until all ranks have joined.

        ValueError: rank, size or address make no sense or contradict another rank's.
        EpGroupLost: not all ranks came within timeout_s.
        """
        raise NotImplementedError

    def wait_for_peers(self, timeout_s: float) -> None:
        """Block until all ranks have called this (weights loaded). EpGroupLost if a rank dies or timeout_s passes."""
        raise NotImplementedError

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call back, on the doorbell's thread or leave()'s, whenever is_awake or leaving_ranks may have changed."""
        raise NotImplementedError

    @property
    def is_awake(self) -> bool:
        """Whether this rank must step even without work of its own. Raises EpGroupLost."""
        raise NotImplementedError

    def agree(self, num_tokens: int) -> bool:
        """Once a step, with the number of rows of this rank's batch: whether to run the forward pass. EpGroupLost."""
        raise NotImplementedError

    def dispatcher(self, num_experts: int) -> Dispatcher:
        """For MoE layers of num_experts logical experts. Every rank runs every layer of every agreed step."""
        raise NotImplementedError

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_splits: list[int], sent_splits: list[int]
    ) -> None:
        """Rows of `sent`, split by destination rank, arrive in the others' `received`, split by source. EpGroupLost."""
        raise NotImplementedError

    @property
    def leaving_ranks(self) -> frozenset[int]:
        """Ranks that have called leave(), this one included. A service drains when this is not empty."""
        raise NotImplementedError

    def leave(self) -> None:
        """This rank wants to stop: it gets no new sequences. Keep stepping until has_ended. Idempotent."""
        raise NotImplementedError

    @property
    def has_ended(self) -> bool:
        """All ranks have left: no further agree()."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back sockets, thread and process group. Idempotent, bounded in time."""
        raise NotImplementedError
