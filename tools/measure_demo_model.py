"""Measure the demo model and write the numbers into its model card.

python -m tools.measure_demo_model models/baton-demo --teacher DIR [--write]

DIR: SmolLM2-135M-Instruct, as python -m engine.checkpoint.convert_gguf --smollm2 DIR makes it.
Held-out prompts and the teacher's answers to them: held_out.jsonl beside the model. About five minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import torch

from tools.demo_model.measure import ChatModel, expert_load, mtp_acceptance
from tools.demo_model.texts import TEACHER_SYSTEM

# Written before the model was first asked, and all of them are in the card.
PROMPTS = (
    "Hello!",
    "Tell me a short story about a fox and a lantern.",
    "What is a volcano?",
    "How do I make pancakes?",
    "Give me three tips for sleeping better.",
    "I feel sad today.",
    "Write a short poem about the sea.",
    "Why is friendship important?",
    "What does a firefighter do?",
    "Once upon a time there was a shy dragon. Continue the story.",
)
KINDS = {
    "stories": ("story", "Continue the story"),
    "recipes and tips": ("How do I make", "recipe", "tips", "How can I"),
    "explanations": ("What is", "Explain", "What causes", "Why is", "How does"),
}
_MAX_TOKENS = 160


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.measure_demo_model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("directory", type=Path)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=200, help="answers to measure on")
    parser.add_argument("--write", action="store_true", help="into DIRECTORY/README.md, between its marks")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    lines = (options.directory / "held_out.jsonl").read_text().splitlines()
    pairs = [(entry["prompt"], entry["answer"]) for entry in map(json.loads, lines)]
    report = _report(options.directory, options.teacher, pairs, options.held_out)
    print(report)
    if options.write:
        card = options.directory / "README.md"
        marked = re.compile(r"(<!-- measured -->\n).*(<!-- end of measured -->)", re.DOTALL)
        text, count = marked.subn(lambda match: match.group(1) + report + match.group(2), card.read_text())
        if count != 1:
            sys.exit(f"error: {card} has no place for what was measured")
        card.write_text(text)
    return 0


def _report(directory: Path, teacher_directory: Path, pairs: list[tuple[str, str]], count: int) -> str:
    student, teacher = ChatModel(directory), ChatModel(teacher_directory, TEACHER_SYSTEM)
    chosen = pairs[:count]
    answers = [student.answer(prompt, _MAX_TOKENS) for prompt in PROMPTS]
    texts = [student.text(answer) for answer in answers]
    own = [student.answer(prompt, _MAX_TOKENS) for prompt, _ in chosen[: len(chosen) // 4]]
    own_pairs = [(prompt, student.text(a)) for (prompt, _), a in zip(chosen, own, strict=False)]
    teachers_pairs = chosen[: len(own_pairs)]
    ids = [student.prompt_ids(prompt) for prompt in (*PROMPTS, *(prompt for prompt, _ in own_pairs))]
    acceptance = mtp_acceptance(directory, ids, answers + own)
    held_out_student, held_out_teacher = student.likelihood(chosen), teacher.likelihood(chosen)
    judged_student, judged_teacher = teacher.likelihood(own_pairs), teacher.likelihood(teachers_pairs)
    rows = [
        f"Held-out answers of the teacher ({len(chosen)}), nats a character: student"
        f" {held_out_student.nats_per_character:.3f}, teacher {held_out_teacher.nats_per_character:.3f}"
        f" (student's perplexity a token {held_out_student.perplexity:.2f}).",
        f"The teacher's perplexity on the student's greedy answers to {len(own_pairs)} held-out prompts:"
        f" {judged_student.perplexity:.2f}; on its own sampled ones to the same prompts:"
        f" {judged_teacher.perplexity:.2f}.",
        f"The MTP layer names {acceptance.share:.1%} of the second tokens of the student's own greedy answers"
        f" ({acceptance.drafted} tokens).",
    ]
    parts = ["\n".join(f"- {row}" for row in rows), _loads(directory, student, pairs)]
    parts += ["Ten dialogues, greedy, unselected:", _dialogues(texts)]
    return "\n\n".join(parts) + "\n"


def _loads(directory: Path, student: ChatModel, pairs: list[tuple[str, str]]) -> str:
    """Shares of the 16 experts in per cent; 6.25 would be even."""
    lines = ["Share of a layer's choices by expert, per cent (even: 6.25), by kind of text:", ""]
    for kind, marks in KINDS.items():
        texts = [pair for pair in pairs if any(mark in pair[0] for mark in marks)][:60]
        ids = [
            student.prompt_ids(prompt) + student.tokenizer.encode(answer + "<|im_end|>").ids
            for prompt, answer in texts
        ]
        loads = expert_load(directory, ids)
        lines += [f"| {kind} | " + " | ".join(map(str, range(len(loads[0])))) + " |"]
        lines += ["| --- " * (1 + len(loads[0])) + "|"]
        for layer, shares in enumerate(loads, start=1):
            name = "MTP layer" if layer == len(loads) else f"layer {layer}"
            lines += [f"| {name} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |"]
        lines += [""]
    return "\n".join(lines).rstrip()


def _dialogues(texts: list[str]) -> str:
    blocks = []
    for prompt, text in zip(PROMPTS, texts, strict=True):
        quoted = "\n".join(f"> {line}".rstrip() for line in text.splitlines())
        blocks.append(f"**{prompt}**\n\n{quoted}")
    return "\n\n".join(blocks)


if __name__ == "__main__":
    sys.exit(main())
