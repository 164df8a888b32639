"""What a worker says about itself in the registry."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

WorkerRole = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """As of the last renewal."""

    num_running: int = 0
    num_waiting: int = 0  # not yet computing
    num_waiting_tokens: int = 0  # prompt tokens still to compute
    num_free_blocks: int = 0  # free or only cached
    prefill_tokens_per_s: float = 0.0  # measured; 0: not yet


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
            load = WorkerLoad(**_known(WorkerLoad, values["load"]))
            return cls(**_known(cls, values) | {"load": load})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a worker record: {error}") from error


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in names}
