"""What the demo model can do, measured with transformers in float32 on a CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from tools.demo_model.loading import load_student
from tools.demo_model.student import rope_angles
from tools.demo_model.texts import user_turn

_END = 2


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of answers given their prompts."""

    nats: float
    tokens: int
    characters: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def nats_per_character(self) -> float:
        return self.nats / self.characters


class ChatModel:
    """A checkpoint with its tokenizer, asked by one user turn, with `system` before it."""

    def __init__(self, directory: Path, system: str = "") -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self._system = system

    def answer(self, prompt: str, max_tokens: int) -> list[int]:
        """Greedy tokens, without the one that ends them."""
        ids = self.prompt_ids(prompt)
        made = self.model.generate(
            torch.tensor([ids]),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=_END,
            pad_token_id=_END,
            temperature=None,
            top_p=None,
            repetition_penalty=1.0,
        )
        tokens: list[int] = made[0, len(ids) :].tolist()
        return tokens[:-1] if tokens and tokens[-1] == _END else tokens

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens)).strip()

    def prompt_ids(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(self._system + user_turn(prompt)).ids
        return ids

    @torch.inference_mode()
    def likelihood(self, pairs: list[tuple[str, str]]) -> Likelihood:
        """Of the answers and the token that ends them."""
        nats, tokens = 0.0, 0
        for prompt, answer in pairs:
            head = self.prompt_ids(prompt)
            tail = self.tokenizer.encode(answer + "<|im_end|>").ids
            logits = self.model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
            nats += float(F.cross_entropy(logits, torch.tensor(tail), reduction="sum"))
            tokens += len(tail)
        return Likelihood(nats, tokens, sum(len(answer) for _, answer in pairs))


@dataclass(frozen=True, slots=True)
class Acceptance:
    accepted: int
    drafted: int

    @property
    def share(self) -> float:
        return self.accepted / self.drafted


@torch.inference_mode()
def mtp_acceptance(directory: Path, prompts: list[list[int]], answers: list[list[int]]) -> Acceptance:
    """How often the MTP layer, given the model's own greedy answer so far and its next token, names the one
    after that."""
    student = load_student(directory)
    accepted = drafted = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt + answer])
        hidden = student.hidden(tokens)
        angles = rope_angles(tokens.shape[1] - 1, student.config, tokens.device)
        draft = student.mtp.draft(student.embed_tokens(tokens[:, 1:]), hidden[:, :-1], angles)
        guesses = F.linear(draft, student.embed_tokens.weight).argmax(-1)[0, :-1]
        is_right = guesses == tokens[0, 2:]
        accepted += int(is_right[len(prompt) - 1 :].sum())
        drafted += len(is_right) - len(prompt) + 1
    return Acceptance(accepted, drafted)


@torch.inference_mode()
def expert_load(directory: Path, texts: list[list[int]]) -> list[list[float]]:
    """Share of a layer's choices that each expert gets: [MoE layer, the MTP layer last][expert]."""
    student = load_student(directory)
    for experts in student.moe_layers():
        experts.load_E.zero_()
    with _counting(student):
        for text in texts:
            student.losses(torch.tensor([text]), torch.ones(1, len(text), dtype=torch.bool))
    return [(experts.load_E / experts.load_E.sum()).tolist() for experts in student.moe_layers()]


@contextmanager
def _counting(student: nn.Module) -> Iterator[None]:
    """Experts count only while training."""
    student.train()
    try:
        yield
    finally:
        student.eval()
