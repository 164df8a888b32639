"""What lower precision changes in a real model: perplexity of a text, and places where it decides otherwise.

    python -m benchmarks.accuracy [MODEL_DIR] [--text FILE ...] [--device cuda] [--modes float32 bfloat16 fp8]

The first mode is what the others are compared with. Every place of the text is scored given what stands
before it in its piece of at most --prompt-len tokens. Without MODEL_DIR the built-in small model; without
--text the conversations of held_out.jsonl beside the model, each a piece, or the pages of this repository.
"fp8" holds experts and dense layers in block-scaled FP8 and the rest in bfloat16: for models with experts, on
CUDA.
"fp8kv" holds latent attention's KV in FP8 and the rest in bfloat16, on CUDA. Only what came before a chunk of
a prompt is read from the cache, so it needs a --token-budget that cuts the pieces, for all modes alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Sequence as ManyOf
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from baton.settings import load_command_settings
from baton.up.model_store import DEFAULT_MODEL, resolve_model
from benchmarks.results_file import table, write_result
from benchmarks.serving import ROOT
from engine.build import build_engine
from engine.engine import Engine
from engine.engine_config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

COLUMNS = (
    "mode",
    "perplexity",
    "times",
    "mean |logprob difference|",
    "at most",
    "same likeliest token",
    "places",
)
HELD_OUT = "held_out.jsonl"
MODES = ("float32", "bfloat16", "fp8", "fp8kv")
_Floats = np.ndarray[Any, np.dtype[np.float64]]
_Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Scores:
    """By place: the logprob of the token that stands there, and the likeliest token."""

    logprobs: _Floats
    likeliest: _Ints

    @property
    def perplexity(self) -> float:
        return float(np.exp(-self.logprobs.mean()))


def main(argv: ManyOf[str] | None = None) -> int:
    parser = _arguments()
    args = parser.parse_args(argv)
    if "fp8kv" in args.modes and not 0 < (args.token_budget or 0) < args.prompt_len:
        parser.error("fp8kv needs a --token-budget below --prompt-len: nothing else is read from the cache")
    model_dir = resolve_model(str(args.model), load_command_settings().cache_dir)
    if args.text is None and (model_dir / HELD_OUT).exists():
        pieces = read_conversations(model_dir, args.prompt_len, args.pieces)
    else:
        pieces = read_pieces(model_dir, args.text or default_text(), args.prompt_len, args.pieces)
    found: dict[str, Scores] = {}
    for mode in args.modes:
        engine = build(model_dir, mode, args)
        found[mode] = score(engine, pieces)
        engine.close()
        del engine
        gc.collect()
        if args.device != "cpu":
            torch.cuda.empty_cache()
    rows = compare(found)
    print("\n".join(table(COLUMNS, rows)))
    if args.write:
        device = torch.cuda.get_device_name() if args.device != "cpu" else "CPU"
        notes = [
            f"model {model_dir.name}, {len(pieces)} pieces of at most {args.prompt_len} tokens, {device}"
        ]
        if args.token_budget is not None:
            notes.append(f"steps of {args.token_budget} tokens: what came before is read from the cache")
        notes.append(f"times, differences and sameness are against {args.modes[0]}")
        print(
            write_result(f"accuracy-{model_dir.name.lower()}", "Accuracy by precision", COLUMNS, rows, notes)
        )
    return 0


def default_text() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read_conversations(model_dir: Path, length: int, num_pieces: int) -> list[list[int]]:
    """Token ids of a question and its answer, through the model's chat template."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    template = ImmutableSandboxedEnvironment().from_string((model_dir / "chat_template.jinja").read_text())
    pieces = []
    with (model_dir / HELD_OUT).open() as file:
        for line in islice(file, num_pieces):
            pair = json.loads(line)
            roles = {"user": pair["prompt"], "assistant": pair["answer"]}
            messages = [{"role": role, "content": content} for role, content in roles.items()]
            text = template.render(messages=messages, add_generation_prompt=False)
            pieces.append(tokenizer.encode(text, add_special_tokens=False).ids[:length])
    return pieces


def read_pieces(model_dir: Path, paths: ManyOf[Path], length: int, num_pieces: int) -> list[list[int]]:
    """Token ids. ValueError when the text is too short for one piece of two tokens."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    token_ids: list[int] = []
    for path in paths:
        token_ids += tokenizer.encode(path.read_text(errors="replace"), add_special_tokens=False).ids
        if len(token_ids) >= length * num_pieces:
            break
    pieces = [token_ids[start : start + length] for start in range(0, length * num_pieces, length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise ValueError("the text has fewer than two tokens")
    return pieces


def build(model_dir: Path, mode: str, args: argparse.Namespace) -> Engine:
    length = args.prompt_len + 1
    return build_engine(
        EngineConfig(
            model_dir=model_dir,
            load_format=args.load_format,
            dtype="bfloat16" if mode.startswith("fp8") else mode,
            kv_cache_dtype="fp8" if mode == "fp8kv" else "auto",
            device=args.device,
            max_model_len=length,
            max_running=16,  # steps as full as those of a prefill worker: the same kernels
            token_budget=args.token_budget or max(1024, length + 16),
            num_blocks=16 * -(-length // 16) + 8,
            uses_graphs=False,
            num_speculative_tokens=0,
            has_fp8_weights=mode == "fp8",
        )
    )


def score(engine: Engine, pieces: ManyOf[list[int]]) -> Scores:
    for seq_id, piece in enumerate(pieces):
        sampling = SamplingParams(temperature=0.0, max_tokens=1, num_prompt_logprobs=1)
        engine.add(Sequence(seq_id, piece, sampling))
    places: dict[int, list[tuple[float, int]]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            entries = output.prompt_logprobs or ()
            places[output.seq_id] = [(entry.logprob, entry.top_token_ids[0]) for entry in entries]
    flat = [place for seq_id in range(len(pieces)) for place in places[seq_id]]
    return Scores(np.array([logprob for logprob, _ in flat]), np.array([token_id for _, token_id in flat]))


def compare(found: dict[str, Scores]) -> list[dict[str, Any]]:
    base = next(iter(found.values()))
    rows = []
    for mode, scores in found.items():
        difference = np.abs(scores.logprobs - base.logprobs)
        rows.append(
            {
                "mode": mode,
                "perplexity": f"{scores.perplexity:.4f}",
                "times": f"{scores.perplexity / base.perplexity:.5f}",
                "mean |logprob difference|": f"{difference.mean():.5f}",
                "at most": f"{difference.max():.4f}",
                "same likeliest token": f"{np.mean(scores.likeliest == base.likeliest):.2%}",
                "places": len(scores.logprobs),
            }
        )
        assert math.isfinite(scores.perplexity), f"{mode}: the perplexity is not a number"
    return rows


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="directory (default: %(default)s)")
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["float32", "bfloat16"])
    parser.add_argument("--pieces", type=int, default=64, help="at most (default %(default)s)")
    parser.add_argument("--prompt-len", type=int, default=512, help="tokens of a piece (default %(default)s)")
    parser.add_argument("--token-budget", type=int, help="tokens of a step (default: pieces stay whole)")
    parser.add_argument("--load-format", choices=("safetensors", "dummy"), default="safetensors")
    parser.add_argument("--write", action="store_true", help="a page in benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
