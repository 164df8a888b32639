"""What a worker says about itself in the registry."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

WorkerRole = Literal["prefill", "decode"]
# How KV gets into a worker's cache: with a hand-off (inside the stream, or through memory of the host), by a
# fetch from a peer, from its own host memory, from its own disk.
KvPath = Literal["stream", "shared_memory", "peer", "host", "disk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRate:
    """As measured: n bytes take latency_s + n / bytes_per_s."""

    bytes_per_s: float  # 0: not yet, only the latency
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """As of the last renewal.

    What its steps take: a step of p prompt tokens and d decoding sequences lasts
    step_s + p * prefill_token_s + d * decode_seq_s seconds. None: not measured yet.
    """

    num_running: int = 0
    num_waiting: int = 0  # not yet computing
    num_waiting_tokens: int = 0  # prompt tokens still to compute
    num_free_blocks: int = 0  # free or only cached
    prefill_tokens_per_s: float = 0.0  # mean over the steps that prefill; 0: not yet
    step_s: float | None = None
    prefill_token_s: float | None = None
    decode_seq_s: float | None = None
    kv_rates: dict[KvPath, KvRate] = field(default_factory=dict)  # those that were measured


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    worker_id: str
    incarnation: str  # random per start of the process
    role: WorkerRole
    model: str  # served name
    address: str  # host:port of its gRPC server
    metrics_address: str  # host:port of its Prometheus page
    group_id: str  # decode ranks of one expert-parallel group share it
    ep_rank: int
    ep_size: int
    model_fingerprint: str
    layout_fingerprint: str
    block_size: int  # tokens
    max_model_len: int  # tokens
    num_blocks: int
    host_id: str
    block_bytes: int = 0  # of KV; 0: not told
    cpu_share: float = 0.0  # of the host's processors that its computing takes; 0: a device of its own
    is_draining: bool = False
    max_running: int = 0  # sequences in its batch; 0: not told
    load: WorkerLoad = field(default_factory=WorkerLoad)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> WorkerRecord:
        """ValueError when it is not a record. Fields of a newer version are ignored."""
        values = json.loads(text)
        try:
            load = _load(values["load"])
            return cls(**_known(cls, values) | {"load": load})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a worker record: {error}") from error


def _load(values: dict[str, Any]) -> WorkerLoad:
    known = _known(WorkerLoad, values)
    rates = {path: KvRate(**_known(KvRate, rate)) for path, rate in known.get("kv_rates", {}).items()}
    return WorkerLoad(**known | {"kv_rates": rates})


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in names}
