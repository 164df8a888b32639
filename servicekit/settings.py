"""Settings from the environment: one frozen dataclass per service, one prefix, read once.

A field `max_running: int = 64` of a class loaded with prefix BATON_DECODE is set by BATON_DECODE_MAX_RUNNING.
A bad value is an error that names variable, value and accepted form. So is an unknown variable of the prefix.
A secret may lie in a file: BATON_ROUTER_ADMIN_KEY_FILE names the file that holds BATON_ROUTER_ADMIN_KEY.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from servicekit.logging import without_passwords

T = TypeVar("T")

_ACCEPTED = {int: "a whole number", float: "a number"}
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
_FILE_SUFFIX = "_FILE"


class SettingsError(ValueError):
    """One line for a person: which variable, which value, what is accepted."""


def setting(default: Any = dataclasses.MISSING, *, doc: str, secret: bool = False) -> Any:
    """A dataclass field with its documentation (say the unit) and whether logs must mask it."""
    return dataclasses.field(default=default, metadata={"doc": doc, "secret": secret})


def load_settings(cls: type[T], prefix: str, environment: Mapping[str, str] | None = None) -> T:
    """Build `cls` from variables named PREFIX_FIELD. Raises SettingsError.

    A ValueError of the class whose message begins with a field's name is reported under the variable's name.
    """
    environment = os.environ if environment is None else environment
    hints = get_type_hints(cls)
    fields = {f"{prefix}_{f.name.upper()}": f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    secrets = [variable for variable, field in fields.items() if field.metadata.get("secret")]
    environment = _with_secrets_from_files(environment, secrets)
    unknown = sorted(name for name in environment if name.startswith(f"{prefix}_") and name not in fields)
    if unknown:
        raise SettingsError(_unknown_message(unknown[0], sorted(fields)))
    values: dict[str, Any] = {}
    for variable, field in fields.items():
        if variable in environment:
            values[field.name] = _parse(
                environment[variable], hints[field.name], variable, is_secret=variable in secrets
            )
        elif field.default is dataclasses.MISSING:
            raise SettingsError(f"{variable} must be set: {field.metadata.get('doc', '')}")
    try:
        return cls(**values)
    except SettingsError:
        raise
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        variable = f"{prefix}_{name.upper()}"
        raise SettingsError(f"{variable} {rest}" if variable in fields else f"{prefix}_*: {error}") from error


def describe_settings(settings: Any, prefix: str) -> str:
    """One line a setting, `VARIABLE=value  # doc`, secrets and passwords in URLs masked."""
    lines = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        shown = "***" if field.metadata.get("secret") and value else without_passwords(str(value))
        lines.append(f"{prefix}_{field.name.upper()}={shown}  # {field.metadata.get('doc', '')}")
    return "\n".join(lines)


def _with_secrets_from_files(environment: Mapping[str, str], secrets: list[str]) -> dict[str, str]:
    """`environment` with X instead of X_FILE for each secret X, without the line break at the file's end."""
    values = dict(environment)
    for variable in secrets:
        path = values.pop(f"{variable}{_FILE_SUFFIX}", None)
        if path is None:
            continue
        if variable in values:
            raise SettingsError(f"{variable} and {variable}{_FILE_SUFFIX} are both set: set one of them")
        try:
            values[variable] = Path(path).read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise SettingsError(f"{variable}{_FILE_SUFFIX}={path}: {reason}") from None
        if not values[variable]:
            raise SettingsError(f"{variable}{_FILE_SUFFIX}={path}: the file is empty")
    return values


def _unknown_message(variable: str, known: list[str]) -> str:
    close = difflib.get_close_matches(variable, known, n=1, cutoff=0.8)
    return f"unknown setting {variable}; " + (
        f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
    )


def _parse(text: str, hint: Any, variable: str, is_secret: bool) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (option for option in get_args(hint) if option is not type(None))
        return None if text == "" else _parse(text, inner, variable, is_secret)
    try:
        return _parse_plain(text, hint)
    except ValueError as error:
        shown = "***" if is_secret else without_passwords(repr(text))
        raise SettingsError(f"{variable}={shown}: must be {error}") from None


def _parse_plain(text: str, hint: Any) -> Any:
    """ValueError says what is accepted."""
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise ValueError(f"one of {', '.join(get_args(hint))}")
        return text
    if hint is bool:
        if text.lower() not in _TRUE | _FALSE:
            raise ValueError("true or false")
        return text.lower() in _TRUE
    if hint is Path and not text:
        raise ValueError("a path")
    try:
        value = hint(text)
    except ValueError:
        raise ValueError(_ACCEPTED[hint]) from None
    if value != value:
        raise ValueError(_ACCEPTED[hint])
    return value
