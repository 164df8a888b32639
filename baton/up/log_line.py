"""Reads a line of a service's log: JSON with level and event, or anything a library printed."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

_WARNINGS = {"warning", "error", "critical", "fatal"}
_NOT_SHOWN = {"level", "event", "message", "ts", "time", "timestamp", "logger", "service", "worker_id", "pid"}


@dataclass(frozen=True, slots=True)
class LogLine:
    level: str  # lower case; empty when the line is not structured
    event: str
    text: str  # for a person, one line
    progress: str = ""  # shorter, for what a process does while it starts

    @property
    def is_warning(self) -> bool:
        return self.level in _WARNINGS


def parse_log_line(line: str) -> LogLine:
    if not line.startswith("{"):
        return LogLine("", "", line)
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return LogLine("", "", line)
    level = str(record.get("level", "")).lower()
    event = str(record.get("event") or record.get("message") or "")
    fields = [f"{name}={_short(value)}" for name, value in record.items() if name not in _NOT_SHOWN]
    percent = record.get("percent")
    progress = event.replace("_", " ") + (f" {percent} %" if percent is not None else "")
    return LogLine(level, event, " ".join([event, *fields]), progress)


def _short(value: object) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    first_line, *rest = text.strip().split("\n")
    return f"{first_line} ... {rest[-1].strip()}" if rest else first_line
