from proto import prefill_pb2 as _prefill_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FetchRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "cache_salt", "tenant", "kv_layout", "first_block", "num_blocks", "host_id", "accepts_shared_memory", "time_left_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_salt: str
    tenant: str
    kv_layout: _prefill_pb2.KvLayout
    first_block: int
    num_blocks: int
    host_id: str
    accepts_shared_memory: bool
    time_left_s: float
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., cache_salt: _Optional[str] = ..., tenant: _Optional[str] = ..., kv_layout: _Optional[_Union[_prefill_pb2.KvLayout, _Mapping]] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., host_id: _Optional[str] = ..., accepts_shared_memory: _Optional[bool] = ..., time_left_s: _Optional[float] = ...) -> None: ...

class FetchStarted(_message.Message):
    __slots__ = ("worker_id", "num_blocks", "shared_kv_cache", "shared_host_cache")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SHARED_KV_CACHE_FIELD_NUMBER: _ClassVar[int]
    SHARED_HOST_CACHE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    num_blocks: int
    shared_kv_cache: _prefill_pb2.SharedKvCache
    shared_host_cache: _prefill_pb2.SharedKvCache
    def __init__(self, worker_id: _Optional[str] = ..., num_blocks: _Optional[int] = ..., shared_kv_cache: _Optional[_Union[_prefill_pb2.SharedKvCache, _Mapping]] = ..., shared_host_cache: _Optional[_Union[_prefill_pb2.SharedKvCache, _Mapping]] = ...) -> None: ...

class FetchFinished(_message.Message):
    __slots__ = ("num_chunks", "num_bytes", "checksum")
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    num_chunks: int
    num_bytes: int
    checksum: int
    def __init__(self, num_chunks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...
