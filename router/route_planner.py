"""From what the fleet and the index say to a decision, corrected by what was routed but not yet told."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

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
    tenant: str = ""  # whose blocks it may share
    _by_chain: dict[HashChain, list[BlockHash]] = field(default_factory=dict)

    def of(self, chain: HashChain) -> list[BlockHash]:
        if chain not in self._by_chain:
            self._by_chain[chain] = chain.hashes(self.token_ids, self.cache_salt, self.tenant)
        return self._by_chain[chain]


@dataclass(slots=True, kw_only=True)
class Route:
    """A decision, with the workers it names. Counts as load on them until prefill_ended()."""

    decision: policy.Decision
    link: Link
    decode: WorkerRecord
    prefill: WorkerRecord | None
    num_uncached_tokens: int
    num_requests_ahead: int  # on the decode worker
    num_tokens_ahead: int  # prompt tokens queued where this prompt is computed
    prefill_tokens_per_s: float  # measured there; 0: not yet
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
        decode_candidates = [self._decode_candidate(record, link, hits) for record, link in decode]
        prefill_candidates = [self._prefill_candidate(record, hits) for record in prefill]
        decision = policy.choose(
            self._policy,
            num_tokens,
            decode_candidates,
            prefill_candidates,
            local_prefill_max_tokens=self._local_prefill_max_tokens,
            turn=next(self._turns),
        )
        record, link = next(pair for pair in decode if pair[0].worker_id == decision.decode_id)
        decoding = next(each for each in decode_candidates if each.worker_id == decision.decode_id)
        computing = next(
            (each for each in prefill_candidates if each.worker_id == decision.prefill_id), decoding
        )
        return Route(
            decision=decision,
            link=link,
            decode=record,
            prefill=next((record for record in prefill if record.worker_id == decision.prefill_id), None),
            num_uncached_tokens=num_tokens - decision.num_hit_tokens,
            num_requests_ahead=decoding.num_requests,
            num_tokens_ahead=computing.num_waiting_tokens,
            prefill_tokens_per_s=computing.prefill_tokens_per_s,
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
