"""Multi-token prediction on against off, in one run: tokens a step, acceptance, and speed.

    python -m benchmarks.speculation MODEL_DIR [--device cuda] [--streams 1 8 32] [--drafts 0 1 2] \\
        [--temperature 0 1] [--fp8] [--kv-cache-dtype fp8] [--write NAME]

The engine alone. Every stream asks an everyday question in the model's chat format (without a template: as
plain text) and gets an answer of --output-len tokens, end-of-sequence tokens ignored. Engines of all kinds
are in memory at once and take turns, --repeats times after one round that warms up. The speed is tokens a
second of the steps without prompt tokens, the speed-up the median over the rounds of the ratio to the first
kind.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.results_file import table, write_result
from engine.build import build_engine
from engine.engine import Engine
from engine.engine_config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from router.chat_template import ChatTemplate
from router.model_dir import load_model_dir

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a short story about a dog who finds a key.",
    "How do I make a cup of tea?",
    "Explain why the sky is blue to a child.",
    "Give me three tips for sleeping better.",
    "What is the difference between a frog and a toad?",
    "Write a poem about the sea.",
    "How does a bicycle stay upright?",
    "Tell me about the history of the Roman Empire.",
    "What should I pack for a weekend in the mountains?",
    "Write an email to a colleague to move a meeting.",
    "Why do leaves change colour in autumn?",
    "Describe a busy market in one paragraph.",
    "How can I learn to play the guitar?",
    "What are the planets of the solar system?",
    "Tell a story about a girl who builds a boat.",
)
COLUMNS = ("temperature", "streams", "drafts", "tokens a step", "accepted", "tok/s", "speed-up", "step ms")


@dataclass(frozen=True, slots=True)
class Measured:
    tokens_per_s: float
    step_s: float  # median
    tokens_per_step: float  # of a sequence
    accepted_at: tuple[float, ...]  # share of the drafts in each place that were right


def main() -> None:
    args = _arguments()
    prompts = list(_prompts(args.model, max(args.streams)))
    engines = {drafts: _engine(args, drafts) for drafts in args.drafts}
    rows: list[dict[str, Any]] = []
    for temperature in args.temperature:
        for num_streams in args.streams:
            rounds: dict[int, list[Measured]] = {drafts: [] for drafts in args.drafts}
            for i in range(args.repeats + 1):
                for drafts, engine in engines.items():
                    found = measure(engine, prompts[:num_streams], args.output_len, temperature)
                    if i:
                        rounds[drafts].append(found)
            rows += [_row(temperature, num_streams, drafts, rounds, args.drafts[0]) for drafts in args.drafts]
            print("\n".join(table(COLUMNS, rows[-len(args.drafts) :])), flush=True)
    formats = args.dtype + ", FP8 weights" * args.fp8 + ", FP8 KV" * (args.kv_cache_dtype == "fp8")
    notes = [
        f"{args.model.resolve().name} in {formats} on {_device_name(args.device)}, "
        f"{torch.get_num_threads()} threads, {args.output_len} tokens a stream, "
        f"medians of {args.repeats} rounds",
        "accepted: of the drafts in the first place, in the second, and so on",
    ]
    if args.write:
        print(write_result(args.write, "Multi-token prediction on against off", COLUMNS, rows, notes))


def measure(engine: Engine, prompts: list[list[int]], output_len: int, temperature: float) -> Measured:
    for seq_id, prompt_ids in enumerate(prompts):
        sampling = SamplingParams(
            temperature=temperature, seed=seq_id, max_tokens=output_len, ignore_eos=True
        )
        engine.add(Sequence(seq_id, prompt_ids, sampling))
    num_tokens, num_decodes, steps_s = 0, 0, []
    num_drafts = 0
    accepted: Counter[int] = Counter()
    while engine.has_work:
        began = perf_counter()
        step = engine.step()
        step_s = perf_counter() - began
        stats = step.stats
        if stats.num_prefill_tokens or not stats.num_decode_tokens:
            continue
        steps_s.append(step_s)
        num_decodes += stats.num_decode_tokens
        num_tokens += sum(len(output.token_ids) for output in step.outputs)
        num_drafts += stats.speculation.num_drafts
        accepted.update(dict(enumerate(stats.speculation.num_accepted_at)))
    shares = tuple(accepted[place] / num_drafts for place in sorted(accepted) if num_drafts)
    return Measured(num_tokens / sum(steps_s), median(steps_s), num_tokens / num_decodes, shares)


def _row(
    temperature: float, num_streams: int, drafts: int, rounds: dict[int, list[Measured]], base: int
) -> dict[str, Any]:
    found = rounds[drafts]
    pairs = zip(found, rounds[base], strict=True)
    return {
        "temperature": temperature,
        "streams": num_streams,
        "drafts": drafts,
        "tokens a step": median(m.tokens_per_step for m in found),
        "accepted": " ".join(f"{share:.0%}" for share in found[-1].accepted_at),
        "tok/s": median(m.tokens_per_s for m in found),
        "speed-up": median(mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in pairs),
        "step ms": 1e3 * median(m.step_s for m in found),
    }


def _engine(args: argparse.Namespace, drafts: int) -> Engine:
    most = max(args.streams)
    return build_engine(
        EngineConfig(
            model_dir=args.model,
            device=args.device,
            dtype=args.dtype,
            num_blocks=most * (-(-(args.output_len + 128) // 16) + 1),
            max_model_len=args.output_len + 128,
            max_running=most,
            num_speculative_tokens=drafts,
            has_fp8_weights=args.fp8,
            kv_cache_dtype=args.kv_cache_dtype,
        )
    )


def _prompts(model: Path, num_prompts: int) -> Iterator[list[int]]:
    model_dir = load_model_dir(model)
    tokenizer = Tokenizer.from_file(str(model_dir.tokenizer_file))
    template = model_dir.chat_template and ChatTemplate(model_dir.chat_template, model_dir.special_tokens)
    for i in range(num_prompts):
        text = QUESTIONS[i % len(QUESTIONS)]
        if template:
            text = template.render([{"role": "user", "content": text}])
        yield tokenizer.encode(text, add_special_tokens=not template).ids


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "the CPU"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--fp8", action="store_true", help="weights in FP8")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--drafts", type=int, nargs="+", default=[0, 1, 2], help="the others are compared with the first"
    )
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0])
    parser.add_argument("--output-len", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", metavar="NAME", help="write a dated result under benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
