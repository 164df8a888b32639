"""Reading GGUF (version 2 and 3, little endian): metadata at once, tensors one by one.

Format: github.com/ggml-org/ggml docs/gguf.md. Own reading of the metadata, because gguf.GGUFReader keeps a
numpy array per string and so takes 7 s for a vocabulary of 49,152 tokens; gguf.quants dequantises the blocks.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from engine.checkpoint.errors import CheckpointError

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GgufTensor:
    shape: tuple[int, ...]  # outermost dimension first, as in torch
    kind: GGMLQuantizationType
    offset: int  # in the file
    num_bytes: int


class GgufFile:
    """Owns the mapped file until exit."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a file that is missing, truncated or not GGUF."""
        self.path = path
        try:
            self._data = np.memmap(path, mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        try:
            self.metadata, self.tensors = _Cursor(self._data).read_file()
        except (struct.error, IndexError) as error:
            raise CheckpointError(f"{path}: truncated in its metadata") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        end = max((tensor.offset + tensor.num_bytes for tensor in self.tensors.values()), default=0)
        if end > len(self._data):
            raise CheckpointError(
                f"{path}: truncated: tensors end at byte {end}, the file has {len(self._data)}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del self._data

    def read(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The tensor dequantised to float32. Raises CheckpointError."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        rows = self._data[tensor.offset : tensor.offset + tensor.num_bytes]
        try:
            values = dequantize(rows.reshape(math.prod(tensor.shape[:-1]), -1), tensor.kind)
        except NotImplementedError as error:
            raise CheckpointError(f"{self.path}: tensor {name}: {error}") from error
        return np.asarray(values, dtype=np.float32).reshape(tensor.shape)


class _Cursor:
    """Walks over the head of the file. struct.error and IndexError: its end; ValueError: bad content."""

    def __init__(self, data: np.ndarray[Any, Any]) -> None:
        self._data = data.data
        self._at = 0

    def read_file(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if bytes(self._data[:4]) != b"GGUF":
            raise ValueError("not a GGUF file")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not supported, expected 2 or 3")
        num_tensors, num_fields = self._scalar("<Q"), self._scalar("<Q")
        metadata = {}
        for _ in range(num_fields):
            name = self._string()
            metadata[name] = self._value(self._scalar("<I"))
        heads = [self._tensor_head() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        first = -(-self._at // alignment) * alignment
        return metadata, {name: _tensor(first, shape, kind, offset) for name, shape, kind, offset in heads}

    def _tensor_head(self) -> tuple[str, list[int], int, int]:
        name = self._string()
        num_dimensions = self._scalar("<I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {num_dimensions} dimensions")
        shape = [self._scalar("<Q") for _ in range(num_dimensions)]
        return name, shape, self._scalar("<I"), self._scalar("<Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"metadata of unknown type {kind}")
        item_kind, length = self._scalar("<I"), self._scalar("<Q")
        if item_kind in _SCALARS:
            letter = _SCALARS[item_kind][1]
            values = struct.unpack_from(f"<{length}{letter}", self._data, self._at)
            self._at += struct.calcsize(f"<{length}{letter}")
            return list(values)
        return [self._value(item_kind) for _ in range(length)]

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise IndexError(self._at)
        return bytes(self._data[start : self._at]).decode("utf-8", errors="replace")


def _tensor(first: int, shape: list[int], kind_id: int, offset: int) -> GgufTensor:
    kind = GGMLQuantizationType(kind_id)
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    num_bytes = math.prod(shape) // block_values * block_bytes
    return GgufTensor(tuple(reversed(shape)), kind, first + offset, num_bytes)
