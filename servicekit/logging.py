"""Events as single lines: a snake_case name and fields.

log = get_logger(__name__)
log.info("handoff_committed", request_id=request_id, num_blocks=12, elapsed_s=0.031)

Prompts and outputs are never logged. Fields with the name of a secret, and passwords inside URLs, are masked
here as a second line of defence. Only an exception's traceback spans lines, and only in the console format.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LogFormat = Literal["console", "json"]

_MASK = "***"
_SECRET_NAMES = frozenset({"password", "secret", "token", "api_key", "authorization"})
_URL_PASSWORD = re.compile(r"(\w://[^\s/@:]*):[^\s/]*@")
_BARE_WORD = re.compile(r"[^\s\"'=]+")


class Logger:
    """Writes events of one module. Values are shown as they are: pass plain numbers and strings."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    @property
    def shows_debug(self) -> bool:
        """For fields that take a while to put together."""
        return self._logger.isEnabledFor(logging.DEBUG)

    def debug(self, event: str, **fields: Any) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """An error with the traceback of the exception being handled."""
        self._write(logging.ERROR, event, fields, exc_info=True)

    def _write(self, level: int, event: str, fields: dict[str, Any], exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={"fields": fields}, exc_info=exc_info)


def get_logger(name: str) -> Logger:
    return Logger(name)


def configure_logging(
    format: LogFormat = "console", level: str = "INFO", stream: TextIO | None = None, **context: Any
) -> None:
    """Send all logging of this process, libraries included, to `stream` (None: stderr).

    `context` is added to every event, for example service="prefill", worker_id="prefill-0".
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter(context) if format == "json" else _ConsoleFormatter(context))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


class _EventFormatter(logging.Formatter):
    def __init__(self, context: Mapping[str, Any]) -> None:
        super().__init__()
        self._context = dict(context)

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        fields = self._context | getattr(record, "fields", {})
        return {name: _masked(name, value) for name, value in fields.items()}

    def event(self, record: logging.LogRecord) -> str:
        # Libraries put whole sentences, sometimes with line breaks, where we put an event name.
        return " ".join(without_passwords(record.getMessage()).split())

    def traceback(self, record: logging.LogRecord) -> str:
        return without_passwords(self.formatException(record.exc_info)) if record.exc_info else ""


class _ConsoleFormatter(_EventFormatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        shown = "".join(f" {name}={_shown(value)}" for name, value in self.fields(record).items())
        traceback = self.traceback(record)
        return f"{time} {record.levelname:<7} {record.name} {self.event(record)}{shown}" + (
            f"\n{traceback}" if traceback else ""
        )


class _JsonFormatter(_EventFormatter):
    def format(self, record: logging.LogRecord) -> str:
        # Our own names come last, so that a field can never pass for the level or the event.
        entry = self.fields(record) | {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": self.event(record),
        }
        if record.exc_info:
            entry["traceback"] = self.traceback(record)
        return json.dumps(entry, default=str)


def _masked(name: str, value: Any) -> Any:
    if name.lower() in _SECRET_NAMES:
        return _MASK
    if isinstance(value, bool | int | float) or value is None:
        return value
    return without_passwords(str(value))


def without_passwords(text: str) -> str:
    """`text` with the passwords of its URLs masked."""
    return _URL_PASSWORD.sub(rf"\1:{_MASK}@", text)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if _BARE_WORD.fullmatch(text) else json.dumps(text)
