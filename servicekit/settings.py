"""Settings from the environment: one frozen dataclass per service, one prefix, read once.

A field `max_running: int = 64` of a class loaded with prefix BATON_DECODE is set by BATON_DECODE_MAX_RUNNING.
A bad value is an error that names variable, value and accepted form. So is an unknown variable of the prefix.
"""

from __future__ import annotations

import dataclasses
import os
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


class SettingsError(ValueError):
    """One line for a person: which variable, which value, what is accepted."""


def setting(default: Any = dataclasses.MISSING, *, doc: str, secret: bool = False) -> Any:
    """A dataclass field with its documentation (say the unit) and whether logs must mask it."""
    return dataclasses.field(default=default, metadata={"doc": doc, "secret": secret})


def load_settings(cls: type[T], prefix: str, environment: Mapping[str, str] | None = None) -> T:
    """Build `cls` from variables named PREFIX_FIELD. Raises SettingsError."""
    environment = os.environ if environment is None else environment
    hints = get_type_hints(cls)
    fields = {f"{prefix}_{f.name.upper()}": f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(name for name in environment if name.startswith(f"{prefix}_") and name not in fields)
    if unknown:
        raise SettingsError(f"unknown setting {unknown[0]}; known: {', '.join(sorted(fields))}")
    values: dict[str, Any] = {}
    for variable, field in fields.items():
        if variable in environment:
            values[field.name] = _parse(environment[variable], hints[field.name], variable)
        elif field.default is dataclasses.MISSING:
            raise SettingsError(f"{variable} must be set: {field.metadata.get('doc', '')}")
    try:
        return cls(**values)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"{prefix}_*: {error}") from error


def describe_settings(settings: Any, prefix: str) -> str:
    """One line a setting, `VARIABLE=value  # doc`, secrets masked."""
    lines = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        shown = "***" if field.metadata.get("secret") and value else value
        lines.append(f"{prefix}_{field.name.upper()}={shown}  # {field.metadata.get('doc', '')}")
    return "\n".join(lines)


def _parse(text: str, hint: Any, variable: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        return None if text == "" else _parse(text, options[0], variable)
    if get_origin(hint) is not None and getattr(hint, "__origin__", None).__name__ == "Literal":
        if text not in get_args(hint):
            raise SettingsError(f"{variable}={text!r}: must be one of {', '.join(map(str, get_args(hint)))}")
        return text
    if hint is bool:
        if text.lower() not in _TRUE | _FALSE:
            raise SettingsError(f"{variable}={text!r}: must be true or false")
        return text.lower() in _TRUE
    try:
        return hint(text)
    except ValueError:
        raise SettingsError(f"{variable}={text!r}: must be {hint.__name__}") from None
