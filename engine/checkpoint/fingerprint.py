"""A short name for "these weights in this dtype", equal on every worker that would compute the same KV."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import torch

from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.model_config import load_model_config
from engine.checkpoint.safetensors_file import checkpoint_files, read_header

_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 16  # per file, evenly spread


def model_fingerprint(model_dir: Path, load_format: str, dtype: torch.dtype) -> str:
    """16 hex digits over config, weight file headers and samples, and dtype. Raises CheckpointError.

    The samples tell fine-tunes of one model apart (equal headers) without reading hundreds of gigabytes.
    """
    model_dir = Path(model_dir)
    config = replace(load_model_config(model_dir), eos_token_ids=frozenset(), bos_token_id=None)
    digest = blake2b(f"{config}|{load_format}|{dtype}".encode(), digest_size=8)
    if load_format != "dummy":
        for path in sorted(checkpoint_files(model_dir)):
            file = read_header(path)
            digest.update(f"|{path.name}|{file.num_bytes}|".encode() + file.header)
            digest.update(content_samples(path, 8 + len(file.header)))
    return digest.hexdigest()


def content_samples(path: Path, first: int = 0) -> bytes:
    """64 KiB from byte `first` to the end, evenly spread. Raises CheckpointError."""
    try:
        with path.open("rb") as stream:
            last = max(first, stream.seek(0, 2) - _SAMPLE_BYTES)
            samples = []
            for i in range(_NUM_SAMPLES):
                stream.seek(first + (last - first) * i // (_NUM_SAMPLES - 1))
                samples.append(stream.read(_SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    return b"".join(samples)
