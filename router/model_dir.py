"""The facts of a model directory that the router needs; weights are none of its business."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class ModelDirError(ValueError):
    """One line for a person: which file, what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDir:
    path: Path
    vocab_size: int | None  # of the embedding; None: config.json does not say
    max_position_embeddings: int | None
    special_tokens: dict[str, str] = field(default_factory=dict)  # "bos_token" -> its text
    chat_template: str | None = None
    sampling_defaults: dict[str, float] = field(default_factory=dict)  # of generation_config.json

    @property
    def tokenizer_file(self) -> Path:
        return self.path / "tokenizer.json"


def load_model_dir(path: Path) -> ModelDir:
    """Raises ModelDirError."""
    if not path.is_dir():
        raise ModelDirError(f"model directory {path} does not exist")
    config = _read_json(path / "config.json", required=True)
    tokenizer_config = _read_json(path / "tokenizer_config.json")
    generation_config = _read_json(path / "generation_config.json")
    defaults = {
        name: generation_config[name] for name in _SAMPLING_DEFAULTS if _is_number(generation_config, name)
    }
    return ModelDir(
        path=path,
        vocab_size=config.get("vocab_size"),
        max_position_embeddings=config.get("max_position_embeddings"),
        special_tokens=_special_tokens(tokenizer_config),
        chat_template=_chat_template(path, tokenizer_config),
        sampling_defaults=defaults,
    )


def _read_json(path: Path, required: bool = False) -> dict[str, Any]:
    if not path.exists() and not required:
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelDirError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ModelDirError(f"{path}: expected an object, found {type(values).__name__}")
    return values


def _is_number(values: dict[str, Any], name: str) -> bool:
    return isinstance(values.get(name), int | float) and not isinstance(values[name], bool)


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Entries are texts, or serialised AddedTokens with a "content"."""
    tokens = {}
    for name, value in tokenizer_config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _chat_template(path: Path, tokenizer_config: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
