"""The header of a safetensors file, checked against the file's size, and which files make up a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.json_fields import read_json_object

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    dtype: str  # the format's name: "F32", "BF16", "F8_E4M3", ...
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    path: Path
    num_bytes: int
    header: bytes
    tensors: dict[str, StoredTensor]


def checkpoint_files(model_dir: Path) -> dict[Path, list[str] | None]:
    """File -> tensors that the index places in it (None: all that it holds). Raises CheckpointError."""
    index_path = model_dir / INDEX_NAME
    if not index_path.exists():
        if not (model_dir / SINGLE_NAME).exists():
            raise CheckpointError(f"{model_dir}: neither {SINGLE_NAME} nor {INDEX_NAME} is there")
        return {model_dir / SINGLE_NAME: None}
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index_path}: weight_map must map tensor names to file names")
    files: dict[Path, list[str] | None] = {}
    for tensor, file in weight_map.items():
        if Path(file).name != file:
            raise CheckpointError(f"{index_path}: {file!r} must be a file name without a directory")
        names = files.setdefault(model_dir / file, [])
        assert names is not None
        names.append(tensor)
    missing = sorted(path.name for path in files if not path.exists())
    if missing:
        raise CheckpointError(
            f"{index_path}: {missing[0]} is not there ({len(missing)} of {len(files)} files missing)"
        )
    return files


def read_header(path: Path) -> SafetensorsFile:
    """Raises CheckpointError for a file that is missing, truncated or not safetensors."""
    try:
        with path.open("rb") as file:
            num_bytes = file.seek(0, 2)
            file.seek(0)
            header_bytes = int.from_bytes(file.read(8), "little")
            if num_bytes < 8 or header_bytes > min(_MAX_HEADER_BYTES, num_bytes - 8):
                raise CheckpointError(f"{path}: truncated or not a safetensors file ({num_bytes} bytes)")
            header = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    try:
        tensors, data_bytes = _stored_tensors(json.loads(header))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header is not that of a safetensors file: {error}") from error
    if 8 + header_bytes + data_bytes != num_bytes:
        expected = 8 + header_bytes + data_bytes
        raise CheckpointError(
            f"{path}: truncated: its header describes {expected} bytes, the file has {num_bytes}"
        )
    return SafetensorsFile(path, num_bytes, header, tensors)


def _stored_tensors(header: dict[str, Any]) -> tuple[dict[str, StoredTensor], int]:
    tensors, data_bytes = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        shape = tuple(int(n) for n in entry["shape"])
        if not 0 <= begin <= end or (math.prod(shape) > 0) != (end > begin):
            raise ValueError(f"data_offsets of {name} are {begin}, {end}")
        tensors[name] = StoredTensor(str(entry["dtype"]), shape, end - begin)
        data_bytes = max(data_bytes, end)
    return tensors, data_bytes
