"""Typed reading of foreign JSON objects: a mistake names file, field, value and what is accepted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.errors import CheckpointError

_REQUIRED: Any = object()


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises CheckpointError when the file is missing, unreadable, not JSON or not an object."""
    try:
        loaded = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(loaded).__name__}")
    return loaded


class JsonFields:
    """One JSON object and where it came from. A default stands for an absent field and for null."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: Any = _REQUIRED, *, minimum: int = 1) -> Any:
        """An int of at least `minimum`, or the default as it is."""
        value = self._value(name, default)
        if value is default and not self.has(name):
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, f"must be an integer of at least {minimum}, found {value!r}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A finite float, or the default as it is."""
        value = self._value(name, default)
        if value is default and not self.has(name):
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(name, f"must be a finite number, found {value!r}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, found {value!r}")
        return value

    def choice(self, name: str, default: str, accepted: tuple[str, ...]) -> str:
        value = self._value(name, default)
        if value not in accepted:
            raise self.error(name, f"must be one of {', '.join(accepted)}, found {value!r}")
        return str(value)

    def child(self, name: str) -> JsonFields:
        """The object under `name`; empty when absent or null."""
        value = self._value(name, {})
        if not isinstance(value, Mapping):
            raise self.error(name, f"must be an object, found {value!r}")
        return JsonFields(f"{self.source}: {name}", value)

    def error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {name} {problem}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.error(name, "is missing")
        return default
