from proto import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvLayout(_message.Message):
    __slots__ = ("model_fingerprint", "num_layers", "token_shape", "dtype", "block_size")
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    model_fingerprint: str
    num_layers: int
    token_shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    block_size: int
    def __init__(self, model_fingerprint: _Optional[str] = ..., num_layers: _Optional[int] = ..., token_shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("sequence", "kv_layout", "num_held_blocks", "host_id", "accepts_shared_memory", "peer", "accepts_device_memory", "mapped_cache")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_DEVICE_MEMORY_FIELD_NUMBER: _ClassVar[int]
    MAPPED_CACHE_FIELD_NUMBER: _ClassVar[int]
    sequence: _common_pb2.SequenceSpec
    kv_layout: KvLayout
    num_held_blocks: int
    host_id: str
    accepts_shared_memory: bool
    peer: _common_pb2.KvPeer
    accepts_device_memory: bool
    mapped_cache: str
    def __init__(self, sequence: _Optional[_Union[_common_pb2.SequenceSpec, _Mapping]] = ..., kv_layout: _Optional[_Union[KvLayout, _Mapping]] = ..., num_held_blocks: _Optional[int] = ..., host_id: _Optional[str] = ..., accepts_shared_memory: _Optional[bool] = ..., peer: _Optional[_Union[_common_pb2.KvPeer, _Mapping]] = ..., accepts_device_memory: _Optional[bool] = ..., mapped_cache: _Optional[str] = ...) -> None: ...

class PrefillStarted(_message.Message):
    __slots__ = ("worker_id", "num_blocks", "num_hit_tokens", "queue_s", "shared_kv_cache", "is_in_mapped_cache", "device_kv_cache")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    SHARED_KV_CACHE_FIELD_NUMBER: _ClassVar[int]
    IS_IN_MAPPED_CACHE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_KV_CACHE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    num_blocks: int
    num_hit_tokens: int
    queue_s: float
    shared_kv_cache: SharedKvCache
    is_in_mapped_cache: bool
    device_kv_cache: DeviceKvCache
    def __init__(self, worker_id: _Optional[str] = ..., num_blocks: _Optional[int] = ..., num_hit_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., shared_kv_cache: _Optional[_Union[SharedKvCache, _Mapping]] = ..., is_in_mapped_cache: _Optional[bool] = ..., device_kv_cache: _Optional[_Union[DeviceKvCache, _Mapping]] = ...) -> None: ...

class DeviceKvCache(_message.Message):
    __slots__ = ("name", "pid", "num_blocks", "handle", "offset_bytes", "device_uuid")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    name: str
    pid: int
    num_blocks: int
    handle: bytes
    offset_bytes: int
    device_uuid: str
    def __init__(self, name: _Optional[str] = ..., pid: _Optional[int] = ..., num_blocks: _Optional[int] = ..., handle: _Optional[bytes] = ..., offset_bytes: _Optional[int] = ..., device_uuid: _Optional[str] = ...) -> None: ...

class SharedKvCache(_message.Message):
    __slots__ = ("name", "size_bytes", "num_blocks")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    num_blocks: int
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class KvChunk(_message.Message):
    __slots__ = ("first_layer", "num_layers", "first_block", "num_blocks", "checksum", "source_block_ids", "is_in_host_memory")
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    IS_IN_HOST_MEMORY_FIELD_NUMBER: _ClassVar[int]
    first_layer: int
    num_layers: int
    first_block: int
    num_blocks: int
    checksum: int
    source_block_ids: _containers.RepeatedScalarFieldContainer[int]
    is_in_host_memory: bool
    def __init__(self, first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., checksum: _Optional[int] = ..., source_block_ids: _Optional[_Iterable[int]] = ..., is_in_host_memory: _Optional[bool] = ...) -> None: ...

class PrefillFinished(_message.Message):
    __slots__ = ("num_chunks", "num_bytes", "checksum", "first_token_id", "first_token_logprobs", "prompt_logprobs", "prefill_s", "num_loaded_tokens", "num_fetched_tokens", "load_s", "draft")
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    NUM_LOADED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_FETCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    num_chunks: int
    num_bytes: int
    checksum: int
    first_token_id: int
    first_token_logprobs: _common_pb2.TokenLogprobs
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    prefill_s: float
    num_loaded_tokens: int
    num_fetched_tokens: int
    load_s: float
    draft: DraftState
    def __init__(self, num_chunks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., checksum: _Optional[int] = ..., first_token_id: _Optional[int] = ..., first_token_logprobs: _Optional[_Union[_common_pb2.TokenLogprobs, _Mapping]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., prefill_s: _Optional[float] = ..., num_loaded_tokens: _Optional[int] = ..., num_fetched_tokens: _Optional[int] = ..., load_s: _Optional[float] = ..., draft: _Optional[_Union[DraftState, _Mapping]] = ...) -> None: ...

class DraftState(_message.Message):
    __slots__ = ("token_ids", "hidden")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    hidden: bytes
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., hidden: _Optional[bytes] = ...) -> None: ...

class PrefillCommitted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
