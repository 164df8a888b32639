"""BATON_DECODE_*."""

from __future__ import annotations

from dataclasses import dataclass

from servicekit.settings import setting
from worker.settings import WorkerSettings

PREFIX = "BATON_DECODE"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings(WorkerSettings):
    group_id: str = setting(
        "", doc="of the expert-parallel group, the same for all its ranks; empty: the worker id"
    )
    ep_rank: int = setting(0, doc="of this process in its group")
    ep_size: int = setting(
        1, doc="processes of the group, which share out the experts; without any, each is alone"
    )
    ep_address: str = setting("", doc="host:port where rank 0 listens for the others")

    def __post_init__(self) -> None:
        WorkerSettings.__post_init__(self)  # super() does not work in a class that slots=True remakes
        if not 0 <= self.ep_rank < self.ep_size:
            raise ValueError(f"ep_rank must be in [0, ep_size={self.ep_size}), got {self.ep_rank}")
        for name in ("ep_address", "group_id"):
            if self.ep_size > 1 and not getattr(self, name):
                raise ValueError(f"{name} must be set when ep_size is above 1")
