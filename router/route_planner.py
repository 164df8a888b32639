"""From what the fleet and the index say to a decision, corrected by what was routed but not yet told."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from kvstore.block_hash import BlockHash, HashChain
from kvstore.prefix_index import PrefixIndex
from kvstore.registry import WorkerRecord
from router import policy
from router.fleet import Fleet
from router.link import Link


@dataclass(slots=True)
class PromptHashes:
    """Block hashes of one prompt, computed once for each kind of worker that needs them."""

    token_ids: Sequence[int]
    cache_salt: str
    _by_chain: dict[HashChain, list[BlockHash]] = field(default_factory=dict)

    def of(self, chain: HashChain) -> list[BlockHash]:
        if chain not in self._by_chain:
            self._by_chain[chain] = chain.hashes(self.token_ids, self.cache_salt)
        return self._by_chain[chain]


@dataclass(slots=True, kw_only=True)
class Route:
    """A decision, with the workers it names. Counts as load on them until prefill_ended()."""

    decision: policy.Decision
    link: Link
    prefill: WorkerRecord | None
    num_uncached_tokens: int
    _pending: Counter[str]
    _is_counted: bool = False

    def begin(self) -> None:
        self._pending[self._computing_worker] += self.num_uncached_tokens
        self._is_counted = True

    def prefill_ended(self) -> None:
        """The first token came, or the request ended. Idempotent."""
        if self._is_counted:
            self._is_counted = False
            self._pending[self._computing_worker] -= self.num_uncached_tokens

    def for_branch(self) -> Route:
        """The same way for another answer to the same prompt, which adds nothing to compute."""
        return replace(self, num_uncached_tokens=0, _is_counted=False)

    @property
    def _computing_worker(self) -> str:
        return self.prefill.worker_id if self.prefill else self.decision.decode_id


class RoutePlanner:
    def __init__(
        self,
        fleet: Fleet,
        index: PrefixIndex,
        *,
        policy_name: policy.PolicyName,
        local_prefill_max_tokens: int,
    ) -> None:
        self._fleet = fleet
        self._index = index
        self._policy = policy_name
        self._local_prefill_max_tokens = local_prefill_max_tokens
        self._turns = itertools.count()
        self._pending: Counter[str] = Counter()  # worker id -> prompt tokens routed there, not yet computed

    def plan(
        self, hashes: PromptHashes, *, excluded: Collection[Link] = (), allows_prefill: bool = True
    ) -> Route | None:
        """None when no decode worker outside `excluded` takes requests. The caller begins the route."""
        decode = [(record, link) for record, link in self._fleet.decode_workers() if link not in excluded]
        if not decode:
            return None
        prefill = self._fleet.prefill_workers() if allows_prefill else []
        num_tokens = len(hashes.token_ids)
        hits = self._hit_tokens(hashes, [record for record, _ in decode] + prefill)
        decision = policy.choose(
            self._policy,
            num_tokens,
            [self._decode_candidate(record, link, hits) for record, link in decode],
            [self._prefill_candidate(record, hits) for record in prefill],
            local_prefill_max_tokens=self._local_prefill_max_tokens,
            turn=next(self._turns),
        )
        return Route(
            decision=decision,
            link=next(link for record, link in decode if record.worker_id == decision.decode_id),
            prefill=next((record for record in prefill if record.worker_id == decision.prefill_id), None),
            num_uncached_tokens=num_tokens - decision.num_hit_tokens,
            _pending=self._pending,
        )

    def _hit_tokens(self, hashes: PromptHashes, workers: list[WorkerRecord]) -> dict[str, int]:
        """Leading prompt tokens by worker id; the last token is always computed."""
        most = len(hashes.token_ids) - 1
        found: dict[HashChain, dict[str, int]] = {}
        hits = {}
        for worker in workers:
            chain = HashChain(model_fingerprint=worker.model_fingerprint, block_size=worker.block_size)
            if chain not in found:
                found[chain] = {hit.worker_id: hit.num_blocks for hit in self._index.lookup(hashes.of(chain))}
            hits[worker.worker_id] = min(most, found[chain].get(worker.worker_id, 0) * worker.block_size)
        return hits

    def _decode_candidate(self, record: WorkerRecord, link: Link, hits: dict[str, int]) -> policy.Candidate:
        load = record.load if link.load is None else link.load
        told = load.num_running + load.num_waiting + link.num_submitted_since_load
        return policy.Candidate(
            worker_id=record.worker_id,
            layout_fingerprint=record.layout_fingerprint,
            num_hit_tokens=hits[record.worker_id],
            num_requests=max(told, link.num_streams),
            num_waiting_tokens=max(load.num_waiting_tokens, self._pending[record.worker_id]),
            prefill_tokens_per_s=record.load.prefill_tokens_per_s,
        )

    def _prefill_candidate(self, record: WorkerRecord, hits: dict[str, int]) -> policy.Candidate:
        load = record.load
        return policy.Candidate(
            worker_id=record.worker_id,
            layout_fingerprint=record.layout_fingerprint,
            num_hit_tokens=hits[record.worker_id],
            num_requests=load.num_running + load.num_waiting,
            num_waiting_tokens=max(load.num_waiting_tokens, self._pending[record.worker_id]),
            prefill_tokens_per_s=load.prefill_tokens_per_s,
        )
