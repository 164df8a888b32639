"""What all KV transfers of one worker share: ways to its peers, and how it may read from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from engine.kv_cache import KvCache
from proto.kv_pb2 import FetchRequest, FetchStarted
from proto.prefill_pb2 import DeviceKvCache, PrefillRequest, PrefillStarted
from servicekit.logging import get_logger
from servicekit.rpc import ChannelFactory, build_channel
from servicekit.tracing import NO_TRACER, Tracer
from worker.async_engine import AsyncEngine
from worker.device_mappings import DeviceMappings, MappedCache, export_to_pb
from worker.kv_carrier import (
    BytesCarrier,
    KvCarrier,
    MappedCacheCarrier,
    SharedMemoryCarrier,
    StreamCarrier,
    sending_carrier,
)
from worker.peer_channels import PeerChannels
from worker.shared_caches import SharedCaches
from worker.transfer_rates import TransferRates

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferEnvironment:
    engine: AsyncEngine
    host_id: str  # processes with equal host ids may share memory
    accepts_shared_memory: bool
    accepts_device_memory: bool
    shared_caches: SharedCaches
    device_mappings: DeviceMappings
    channels: PeerChannels = field(default_factory=PeerChannels)
    tracer: Tracer = NO_TRACER
    rates: TransferRates = field(default_factory=TransferRates)  # of hand-offs to this worker

    @classmethod
    def build(
        cls,
        engine: AsyncEngine,
        host_id: str,
        *,
        accepts_shared_memory: bool,
        accepts_device_memory: bool = False,
        channels: ChannelFactory = build_channel,
        tracer: Tracer = NO_TRACER,
    ) -> TransferEnvironment:
        kv_cache = engine.engine.kv_cache
        if accepts_device_memory and kv_cache.export_refusal:
            log.warning("device_memory_not_offered", reason=kv_cache.export_refusal)
        return cls(
            engine=engine,
            host_id=host_id,
            accepts_shared_memory=accepts_shared_memory,
            accepts_device_memory=accepts_device_memory,
            shared_caches=SharedCaches(engine.engine.kv_layout),
            device_mappings=DeviceMappings(kv_cache.open_peer),
            channels=PeerChannels(channels),
            tracer=tracer,
        )

    def accepts_shared_memory_of(self, address: str) -> bool:
        return self.accepts_shared_memory and self.shared_caches.can_attach(address)

    def sending_carrier(
        self, request_pb: PrefillRequest | FetchRequest, origin: KvCache | None = None
    ) -> BytesCarrier:
        """For blocks of `origin`, or of the engine's cache."""
        is_shared = request_pb.accepts_shared_memory and request_pb.host_id == self.host_id
        engine = self.engine.engine
        host = engine.host_cache if isinstance(request_pb, FetchRequest) else None
        return sending_carrier(origin or engine.kv_cache, host, is_shared=is_shared)

    @contextmanager
    def receiving_carrier(
        self, started_pb: PrefillStarted | FetchStarted, address: str, *, is_shared_accepted: bool
    ) -> Iterator[BytesCarrier]:
        """The carrier that the sender at `address` chose. ValueError when it may not; HandoffFailed when its
        cache cannot be attached."""
        if not started_pb.HasField("shared_kv_cache"):
            yield StreamCarrier(self.engine.engine.kv_cache)
            return
        if not is_shared_accepted:
            raise ValueError("offers shared memory that was not asked for")
        with ExitStack() as attached:
            source = attached.enter_context(self.shared_caches.cache(started_pb.shared_kv_cache, address))
            host = None
            if isinstance(started_pb, FetchStarted) and started_pb.HasField("shared_host_cache"):
                host = attached.enter_context(self.shared_caches.cache(started_pb.shared_host_cache, address))
            yield SharedMemoryCarrier(source, host)

    def device_offer(self, request_pb: PrefillRequest) -> DeviceKvCache | None:
        """The engine's cache, for a receiver that can map it; None: it cannot, or may not."""
        exported = self.engine.engine.kv_cache.exported
        is_wanted = request_pb.accepts_device_memory and request_pb.host_id == self.host_id
        if exported is None or not (is_wanted and self.accepts_device_memory):
            return None
        return export_to_pb(exported)

    @contextmanager
    def handoff_carrier(
        self,
        started_pb: PrefillStarted,
        address: str,
        mapped: MappedCache | None,
        *,
        is_shared_accepted: bool,
    ) -> Iterator[KvCarrier]:
        """As receiving_carrier(); `mapped` is the cache that was named to the sender."""
        if started_pb.is_in_mapped_cache:
            if mapped is None:
                raise ValueError("names blocks of a mapped cache, and was told of none")
            yield MappedCacheCarrier(mapped.cache)
            return
        if started_pb.HasField("device_kv_cache"):
            self.device_mappings.offered(started_pb.device_kv_cache, address)
        with self.receiving_carrier(started_pb, address, is_shared_accepted=is_shared_accepted) as carrier:
            yield carrier

    async def close(self) -> None:
        """After the last transfer."""
        await self.channels.close()
        self.shared_caches.close()
        await self.device_mappings.close()
