"""Random traffic for a simulated fleet: chats that grow, think and are cancelled, routed by what the mirror
knows."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass

from benchmarks.simulated_fleet import Fleet, Prompt, Request
from kvstore.block_hash import HashChain
from kvstore.prefix_index import PrefixIndex

FIRST_ID = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficShape:
    chats_per_s: float = 0.4  # simulated seconds
    max_chats: int = 400  # that think or run; more are turned away
    num_groups: int = 16  # system prompts, some much more popular than others
    max_system_tokens: int = 60
    max_turn_tokens: int = 40
    max_answer_tokens: int = 24
    max_context_tokens: int = 240
    continues: float = 0.6  # chance that an answer is followed by another turn
    mean_think_s: float = 30.0
    follows_hit: float = 0.8  # chance that a prompt goes where most of it is cached
    hands_off: float = 0.3  # chance that another worker prefills
    cancels: float = 0.01  # chance that a running request is cancelled, a second
    num_tenants: int = 2
    vocab_size: int = 211


class Traffic:
    def __init__(
        self, fleet: Fleet, index: PrefixIndex, chain: HashChain, shape: TrafficShape, seed: int
    ) -> None:
        self._fleet = fleet
        self._index = index
        self._chain = chain
        self._shape = shape
        self._draw = random.Random(seed)
        self._systems = [
            self._ids(self._draw.randint(4, shape.max_system_tokens)) for _ in range(shape.num_groups)
        ]
        self._thinking: list[tuple[float, int, list[int], str]] = []  # a heap: due, order, history, tenant
        self._order = itertools.count()
        self._now_s = 0.0
        self.finished: list[Request] = []  # since the caller took them
        self.num_sent = 0
        self.num_cancelled = 0
        self.num_turned_away = 0

    def tick(self, seconds: float) -> None:
        """What users do in that time."""
        shape, draw = self._shape, self._draw
        self._now_s += seconds
        for request in self._fleet.requests():
            if draw.random() < shape.cancels * seconds:
                self._fleet.cancel(request)
                self.num_cancelled += 1
        while self._thinking and self._thinking[0][0] <= self._now_s:
            _, _, history, tenant = heapq.heappop(self._thinking)
            self._send(history, tenant)
        for _ in range(self._num_arrivals(shape.chats_per_s * seconds)):
            if len(self._thinking) + len(self._fleet.requests()) >= shape.max_chats:
                self.num_turned_away += 1
                continue
            # The square makes the first groups popular.
            system = self._systems[int(draw.random() ** 2 * shape.num_groups)]
            self._send(list(system), f"tenant-{draw.randrange(shape.num_tenants)}")

    def _send(self, history: list[int], tenant: str) -> None:
        draw, shape = self._draw, self._shape
        token_ids = history + self._ids(draw.randint(1, shape.max_turn_tokens))
        room = shape.max_context_tokens - len(token_ids)
        if room < 1:
            return
        max_tokens = min(room, draw.randint(1, shape.max_answer_tokens))
        prompt = Prompt(token_ids=token_ids, max_tokens=max_tokens, tenant=tenant)
        names = list(self._fleet.workers)
        hits = self._index.lookup(self._chain.hashes(token_ids, "", tenant))
        decode_id = draw.choice(names)
        if hits and draw.random() < shape.follows_hit:
            decode_id = hits[0].worker_id
        prefill_id = draw.choice(names) if draw.random() < shape.hands_off else None
        self.num_sent += 1
        self._fleet.submit(prompt, decode_id, prefill_id, self._done)

    def _done(self, request: Request) -> None:
        self.finished.append(request)
        draw, shape = self._draw, self._shape
        if draw.random() < shape.continues:
            due_s = self._now_s + draw.expovariate(1 / shape.mean_think_s)
            history = request.prompt.token_ids + request.output_ids
            heapq.heappush(self._thinking, (due_s, next(self._order), history, request.prompt.tenant))

    def _num_arrivals(self, mean: float) -> int:
        """Poisson, by the gaps of a process of rate 1."""
        number, at = 0, self._draw.expovariate(1.0)
        while at < mean:
            number += 1
            at += self._draw.expovariate(1.0)
        return number

    def _ids(self, count: int) -> list[int]:
        return self._draw.choices(range(FIRST_ID, self._shape.vocab_size), k=count)
