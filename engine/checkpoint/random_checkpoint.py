"""A small checkpoint with random weights that Baton, transformers, vLLM and llama.cpp's converter load.

python -m engine.checkpoint.random_checkpoint DIR --arch deepseek_v3 --preset tiny
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers

from engine.checkpoint import fp8
from engine.checkpoint.convert_gguf import find_smollm2
from engine.checkpoint.dtypes import DTYPES
from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.gguf_file import GgufFile
from engine.checkpoint.gguf_tokenizer import tokenizer_spec
from engine.checkpoint.hub_tensors import hub_tensors
from engine.checkpoint.made_directory import make_directory
from engine.checkpoint.model_config import ModelConfig, load_model_config
from engine.checkpoint.random_presets import ARCHITECTURES, PRESETS, hub_config
from engine.checkpoint.safetensors_writer import TensorToWrite, write_tensors
from engine.checkpoint.tokenizer_files import CHATML, TokenizerSpec, write_tokenizer

_FORMAT = 1
_FP8_BLOCK_SHAPE = (128, 128)
_logger = logging.getLogger(__name__)


def make_random_checkpoint(
    target: Path,
    arch: str,
    preset: str = "tiny",
    *,
    is_fp8: bool = False,
    dtype: str = "float32",
    seed: int = 0,
) -> bool:
    """Make `target`. False when it was already made with these arguments. Raises CheckpointError."""
    config = hub_config(arch, preset, dtype)
    if is_fp8:
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(_FP8_BLOCK_SHAPE),
        }
    origin = {"format": _FORMAT, "random": {"seed": seed, "config": config}}
    return make_directory(target, origin, partial(_fill, config, seed))


def smallest_tokenizer(vocab_size: int, max_length: int) -> TokenizerSpec:
    """SmolLM2's tokenizer cut to `vocab_size` ids if its package is installed, else one token per byte."""
    try:
        with GgufFile(find_smollm2()) as gguf:
            whole = tokenizer_spec(gguf)
    except CheckpointError:
        return _byte_tokenizer(max_length)
    return whole.cut(vocab_size, max_length)


def _byte_tokenizer(max_length: int) -> TokenizerSpec:
    return TokenizerSpec(
        tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())],
        merges=[],
        special_ids=[0, 1, 2],
        user_defined_ids=[],
        pre_tokenizer="gpt-2",
        add_bos=False,
        add_space_prefix=False,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        pad_id=2,
        chat_template=CHATML,
        max_length=max_length,
    )


def _fill(hub: dict[str, Any], seed: int, directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(hub, indent=2) + "\n")
    generation = {"bos_token_id": hub["bos_token_id"], "eos_token_id": [hub["eos_token_id"]]}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    config = load_model_config(directory)
    write_tokenizer(directory, smallest_tokenizer(config.vocab_size, config.max_position_embeddings))
    tensors: list[TensorToWrite] = []
    shapes = hub_tensors(config, has_mtp=config.num_mtp_layers > 0)
    for name, shape in shapes.items():
        tensors += _tensors_to_write(name, shape, config, DTYPES[hub["torch_dtype"]], seed)
    write_tensors(directory, tensors)
    _logger.info("%.1f M parameters", sum(map(math.prod, shapes.values())) / 1e6)


def _tensors_to_write(
    name: str, shape: tuple[int, ...], config: ModelConfig, dtype: torch.dtype, seed: int
) -> list[TensorToWrite]:
    make = partial(_random_tensor, name, shape, config.num_layers, seed)
    is_projection = name.endswith(("_proj.weight", "_proj_with_mqa.weight"))
    if config.fp8_block_shape is not None and is_projection:
        quantise = partial(fp8.quantise, block_shape=_FP8_BLOCK_SHAPE)
        num_scales = math.prod(fp8.num_blocks((shape[0], shape[1]), config.fp8_block_shape))
        return [
            TensorToWrite(name, math.prod(shape), lambda: quantise(make())[0]),
            TensorToWrite(f"{name}_scale_inv", 4 * num_scales, lambda: quantise(make())[1]),
        ]
    # As on the hub: the bias decides between experts, and bfloat16 would move it by more than training did.
    stored = torch.float32 if name.endswith("e_score_correction_bias") else dtype
    return [TensorToWrite(name, math.prod(shape) * stored.itemsize, lambda: make().to(stored))]


def _random_tensor(name: str, shape: tuple[int, ...], num_layers: int, seed: int) -> torch.Tensor:
    """Scaled so that activations keep their size over the layers and logits spread to clear maxima."""
    key = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1))
    if name.endswith("norm.weight"):
        return values.mul_(0.1).add_(1.0)
    if name.endswith("e_score_correction_bias"):
        return values.mul_(0.05)
    if name == "model.embed_tokens.weight":
        return values
    gain = 2.0 if name == "lm_head.weight" else 1.0
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        gain = 1.0 / math.sqrt(2 * num_layers)
    return values.mul_(gain / math.sqrt(shape[-1]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m engine.checkpoint.random_checkpoint", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("directory", type=Path, help="where to write; a rerun finds it done")
    parser.add_argument("--arch", choices=tuple(ARCHITECTURES), required=True)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument(
        "--fp8", action="store_true", help="projections in float8_e4m3fn with 128x128 block scales"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    try:
        is_new = make_random_checkpoint(
            options.directory,
            options.arch,
            options.preset,
            is_fp8=options.fp8,
            dtype=options.dtype,
            seed=options.seed,
        )
    except (CheckpointError, OSError) as error:
        _logger.error("error: %s", error)
        return 2
    except KeyboardInterrupt:
        return 130
    _logger.info("%s %s", "wrote" if is_new else "already there:", options.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
