"""What structured output costs an engine step, and how much of it the forward pass hides.

    python -m benchmarks.grammar_masks [--checkpoint DIR] [--sequences N ...]

One engine decodes N sequences with a JSON schema and then N without, in turns, on one checkpoint. `hidden` is
1 - waited / computing: the part of the masks' time in which the engine thread did not wait for them. The
schema's strings are long, so that all sequences decode for as long as they are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results_file import table, write_result
from engine.build import build_engine
from engine.checkpoint.random_checkpoint import make_random_checkpoint
from engine.engine import Engine
from engine.engine_config import EngineConfig
from engine.grammar.compiler import GrammarCompiler, compiler_for_model
from engine.grammar.grammar import Grammar, GrammarKind
from engine.outputs import StepStats
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

COLUMNS = ("sequences", "step ms", "step ms with masks", "masks ms", "waited ms", "hidden", "compile ms")
NUM_STEPS = 60
WARM_STEPS = 5
PROMPT_LEN = 32
SCHEMA = {
    "type": "object",
    "properties": {
        "names": {"type": "array", "items": {"type": "string", "minLength": 200}, "minItems": 4},
        "kind": {"enum": ["a", "b", "c"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9999},
    },
    "required": ["names", "kind", "count"],
    "additionalProperties": False,
}


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = args.checkpoint or Path(directory) / "small576"
        if not checkpoint.exists():
            make_random_checkpoint(checkpoint, "deepseek_v3", "small576")
        engine = build_engine(EngineConfig(model_dir=checkpoint, dtype=args.dtype, device=args.device))
        compiler = compiler_for_model(checkpoint, engine.vocab_size, engine.eos_token_ids)
        rows = [measure(engine, compiler, num, args.repeats) for num in args.sequences]
        compiler.close()
    print("\n".join(table(COLUMNS, rows)))
    if args.writes:
        notes = [
            f"vocabulary of {engine.vocab_size}; medians of {NUM_STEPS} steps, {args.repeats} repeats",
            "step ms: temperature 1, without a grammar",
        ]
        print(write_result("grammar-masks", "Masks of structured output", COLUMNS, rows, notes))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grammar_masks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", type=Path, help="default: small576, made for this run")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--writes", action="store_true", help="a result file, too")
    return parser.parse_args()


def measure(engine: Engine, compiler: GrammarCompiler, num_seqs: int, repeats: int) -> dict[str, Any]:
    # A text of its own: the compiler knows none of it.
    grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(SCHEMA | {"title": str(num_seqs)}))
    compiler.compile(Grammar(kind=GrammarKind.CHOICE, text='["a"]')).result()  # loads the vocabulary
    began = time.monotonic()
    compiler.compile(grammar).result()
    compile_s = time.monotonic() - began
    free, masked = [], []
    for _ in range(repeats):
        free += steps(engine, compiler, num_seqs, None)
        masked += steps(engine, compiler, num_seqs, grammar)
    mask_s = statistics.median(step.grammar.mask_s for step in masked)
    wait_s = statistics.median(step.grammar.wait_s for step in masked)
    return {
        "sequences": num_seqs,
        "step ms": 1e3 * statistics.median(step.step_s for step in free),
        "step ms with masks": 1e3 * statistics.median(step.step_s for step in masked),
        "masks ms": 1e3 * mask_s,
        "waited ms": 1e3 * wait_s,
        "hidden": 1 - wait_s / mask_s,
        "compile ms": 1e3 * compile_s,
    }


def steps(
    engine: Engine, compiler: GrammarCompiler, num_seqs: int, grammar: Grammar | None
) -> list[StepStats]:
    """Of steps in which all sequences decode."""
    sampling = SamplingParams(temperature=1.0, max_tokens=10_000, ignore_eos=True, grammar=grammar)
    for seq_id in range(num_seqs):
        matcher = None if grammar is None else compiler.compile(grammar).result()
        prompt = [(seq_id * 7919 + i) % 1000 + 3 for i in range(PROMPT_LEN)]
        engine.add(Sequence(seq_id, prompt, sampling, matcher=matcher))
    found: list[StepStats] = []
    while len(found) < WARM_STEPS + NUM_STEPS:
        stats = engine.step().stats
        if stats.num_decode_tokens == num_seqs and not stats.num_prefill_tokens:
            found.append(stats)
    engine.abort_all()
    return found[WARM_STEPS:]


if __name__ == "__main__":
    main()
