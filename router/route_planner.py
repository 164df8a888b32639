"""From what the fleet and the index say to a decision, corrected by what was routed but not yet told."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from kvstore.block_hash import BlockHash, HashChain
from kvstore.prefix_index import PrefixHit, PrefixIndex
from kvstore.registry import WorkerRecord
from router import policy
from router.fleet import Fleet
from router.host_load import with_neighbours
from router.link import Link
from router.own_load import OwnLoad
from router.route_cost import Candidate, RouteRequest
from servicekit.logging import get_logger

log = get_logger(__name__)


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


@dataclass(frozen=True, slots=True)
class RoutePeer:
    record: WorkerRecord
    num_blocks: int  # of the prompt, as the index says


@dataclass(slots=True, kw_only=True)
class Route:
    """A decision, with the workers it names. Counts as load on them until prefill_ended()."""

    decision: policy.Decision
    link: Link
    decode: WorkerRecord
    prefill: WorkerRecord | None
    peer: RoutePeer | None
    num_requests_ahead: int  # on the decode worker, those included that were just sent there
    _prefill_load: OwnLoad | None  # of `prefill`; the link counts the request itself
    _is_counted: bool = False

    def begin(self) -> None:
        self._is_counted = True
        if self._prefill_load is not None:
            self._prefill_load.begin()
            self.link.own.num_handing_off += 1
        self._computing.num_tokens += self.decision.num_computed_tokens

    def prefill_ended(self) -> None:
        """The first token came, or the request ended. Idempotent."""
        if self._is_counted:
            self._is_counted = False
            self._computing.num_tokens -= self.decision.num_computed_tokens
            if self._prefill_load is not None:
                self._prefill_load.end()
                self.link.own.num_handing_off -= 1

    def for_branch(self) -> Route:
        """The same way for another answer to the same prompt, which adds nothing to compute."""
        decision = replace(self.decision, num_computed_tokens=0)
        return replace(self, decision=decision, _prefill_load=None, _is_counted=False)

    @property
    def _computing(self) -> OwnLoad:
        return self.link.own if self._prefill_load is None else self._prefill_load


@dataclass(frozen=True, slots=True)
class TierTokens:
    """Leading prompt tokens in one worker's cache: whole blocks, without the last token of the prompt, which
    is always computed."""

    num_blocks: int = 0
    num_tokens: int = 0
    num_host_tokens: int = 0
    num_disk_tokens: int = 0


NO_HIT = TierTokens()


class RoutePlanner:
    def __init__(
        self,
        fleet: Fleet,
        index: PrefixIndex,
        config: policy.PolicyConfig,
        random: Random | None = None,
    ) -> None:
        self._fleet = fleet
        self._index = index
        self._config = config
        self._random = random or Random()
        self._turns = itertools.count()

    def plan(
        self,
        hashes: PromptHashes,
        max_tokens: int,
        *,
        excluded: Collection[Link] = (),
        allows_prefill: bool = True,
    ) -> Route | None:
        """None when no decode worker outside `excluded` takes requests. The caller begins the route.

        `max_tokens`: of the output, those included that the prompt ends with after a migration."""
        decode = [(record, link) for record, link in self._fleet.decode_workers() if link not in excluded]
        if not decode:
            return None
        prefill = self._fleet.prefill_workers() if allows_prefill else []
        num_tokens = len(hashes.token_ids)
        records = {record.worker_id: record for record in [*(record for record, _ in decode), *prefill]}
        hits = self._hits(hashes, list(records.values()))
        decode_workers = [self.decode_candidate(record, link, hits) for record, link in decode]
        prefill_workers = [self.prefill_candidate(record, hits) for record in prefill]
        workers = with_neighbours([*decode_workers, *prefill_workers])
        decode_workers, prefill_workers = workers[: len(decode)], workers[len(decode) :]
        num_requests = {worker.worker_id: worker.num_requests for worker in decode_workers}
        decision = policy.choose(
            self._config,
            RouteRequest(num_prompt_tokens=num_tokens, max_tokens=max_tokens),
            decode_workers,
            prefill_workers,
            policy.Chance(turn=next(self._turns), draw=self._random.random()),
        )
        helper = records[decision.prefill_id] if decision.prefill_id is not None else None
        peer = None
        if decision.peer_id is not None:
            peer = RoutePeer(records[decision.peer_id], hits[decision.peer_id].num_blocks)
        return Route(
            decision=decision,
            link=next(link for record, link in decode if record.worker_id == decision.decode_id),
            decode=records[decision.decode_id],
            prefill=helper,
            peer=peer,
            num_requests_ahead=num_requests[decision.decode_id],
            _prefill_load=None if helper is None else self._fleet.own_load(helper),
        )

    def decode_candidate(self, record: WorkerRecord, link: Link, hits: dict[str, TierTokens]) -> Candidate:
        load = record.load if link.load is None else link.load
        num_blocks = record.num_blocks if link.load is None else link.load.num_total_blocks
        num_told = load.num_running + load.num_waiting
        hit = hits.get(record.worker_id, NO_HIT)
        return Candidate(
            worker_id=record.worker_id,
            layout_fingerprint=record.layout_fingerprint,
            host_id=record.host_id,
            num_hit_tokens=hit.num_tokens,
            num_host_tokens=hit.num_host_tokens,
            num_disk_tokens=hit.num_disk_tokens,
            num_requests=link.own.requests(num_told),
            num_handing_off=link.own.handing_off(num_told, load.num_waiting),
            num_waiting_tokens=link.own.tokens(load.num_waiting_tokens, num_told),
            num_free_tokens=load.num_free_blocks * record.block_size,
            num_total_tokens=num_blocks * record.block_size,
            cpu_share=record.cpu_share,
            rates=self._fleet.rates(record.worker_id),
        )

    def prefill_candidate(self, record: WorkerRecord, hits: dict[str, TierTokens]) -> Candidate:
        load = record.load
        own = self._fleet.own_load(record)
        num_told = load.num_running + load.num_waiting
        hit = hits.get(record.worker_id, NO_HIT)
        return Candidate(
            worker_id=record.worker_id,
            layout_fingerprint=record.layout_fingerprint,
            host_id=record.host_id,
            num_hit_tokens=hit.num_tokens,
            num_host_tokens=hit.num_host_tokens,
            num_disk_tokens=hit.num_disk_tokens,
            num_requests=own.requests(num_told),
            num_waiting_tokens=own.tokens(load.num_waiting_tokens, num_told),
            cpu_share=record.cpu_share,
            rates=self._fleet.rates(record.worker_id),
        )

    def _hits(self, hashes: PromptHashes, workers: list[WorkerRecord]) -> dict[str, TierTokens]:
        """By worker id; workers that hold nothing are left out."""
        num_prompt_tokens = len(hashes.token_ids)
        found: dict[HashChain, dict[str, PrefixHit]] = {}
        hits = {}
        for worker in workers:
            chain = HashChain(model_fingerprint=worker.model_fingerprint, block_size=worker.block_size)
            if chain not in found:
                found[chain] = {hit.worker_id: hit for hit in self._index.lookup(hashes.of(chain))}
            hit = found[chain].get(worker.worker_id)
            if hit is not None:
                hits[worker.worker_id] = _tier_tokens(hit, worker.block_size, num_prompt_tokens)
        return hits


def _tier_tokens(hit: PrefixHit, block_size: int, num_prompt_tokens: int) -> TierTokens:
    num_tokens = min(hit.num_blocks, (num_prompt_tokens - 1) // block_size) * block_size
    _, num_host, num_disk = (num_blocks * block_size for num_blocks in hit.num_blocks_by_tier)
    num_disk = min(num_disk, num_tokens)
    return TierTokens(hit.num_blocks, num_tokens, min(num_host, num_tokens - num_disk), num_disk)


def log_route(request_id: str, num_prompt_tokens: int, decision: policy.Decision) -> None:
    """Why, with all that was considered, at DEBUG."""
    if not log.shows_debug:
        return
    log.debug(
        "route_considered",
        request_id=request_id,
        num_prompt_tokens=num_prompt_tokens,
        decode=decision.decode_id,
        prefill=decision.prefill_id or "local",
        decode_reason=decision.decode_reason,
        prefill_reason=decision.prefill_reason,
        options=[
            {
                "decode": option.decode_id,
                "prefill": option.prefill_id or "local",
                "peer": option.prompt.peer_id,
                "cost_s": round(option.cost_s, 6),
                **{name: round(value, 6) for name, value in option.terms._asdict().items()},
            }
            for option in decision.options
        ],
    )
