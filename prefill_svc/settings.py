"""BATON_PREFILL_*."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from worker.settings import WorkerSettings

PREFIX = "BATON_PREFILL"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSettings(WorkerSettings):
    decodes: ClassVar[bool] = False
