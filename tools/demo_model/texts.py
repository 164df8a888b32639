"""From what the teacher wrote to documents in the student's tokens."""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from tools.demo_model.prompts import is_good_answer

_MAX_WORDS = 110
_SENTENCE_END = re.compile(r"(?<=[a-z)\"'])[.!?][\"']?(?=\s|$)")
_PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"}
)
_CHUNK = 4000
_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a helpful AI assistant.",
    "Answer the user's question.",
    "You are a small language model that chats with people.",
)
_ONE_IN_WITH_SYSTEM = 8
_ONE_IN_HELD_OUT = 200


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents one after another: the chat template's text of one prompt and its answer."""

    tokens: torch.Tensor  # int32 [total]
    starts: torch.Tensor  # int64 [documents]
    lengths: torch.Tensor  # int64 [documents]
    prompt_lengths: torch.Tensor  # int64 [documents]: the rest is what the student learns to say

    def is_target(self) -> torch.Tensor:
        """bool [total]"""
        ends = (self.starts + self.prompt_lengths).repeat_interleave(self.lengths)
        return torch.arange(len(self.tokens)) >= ends


def system_turn(text: str) -> str:
    return f"<|im_start|>system\n{text}<|im_end|>\n"


# What the teacher was trained to see before every conversation.
TEACHER_SYSTEM = system_turn("You are a helpful AI assistant named SmolLM, trained by Hugging Face")


def user_turn(prompt: str) -> str:
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def cleaned(answer: str, has_ended: bool) -> str | None:
    """Plain text of whole sentences, or None for an answer that nobody should learn from."""
    text = answer.translate(_PLAIN).replace("**", "").strip()
    text = re.sub(r"[ \t]+\n", "\n", text)
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    fitting = [end for end in ends if len(text[:end].split()) <= _MAX_WORDS]
    if not has_ended or len(text.split()) > _MAX_WORDS:
        if not fitting:
            return None
        text = text[: fitting[-1]]
    is_readable = is_good_answer(text) and _variety(text) > 0.75 and len(re.findall(r"\d\d+", text)) <= 2
    return text if is_readable else None


def is_held_out(prompt: str) -> bool:
    """By the prompt alone, so that no answer to a held-out prompt is ever learned from."""
    return int.from_bytes(blake2b(prompt.encode(), digest_size=4).digest()) % _ONE_IN_HELD_OUT == 0


def clean_pairs(
    prompts: list[str], generated_NG: torch.Tensor, teacher_tokenizer: Path, workers: int
) -> list[tuple[str, str]]:
    """generated int32, -1 where nothing was."""
    chunks = [
        (prompts[i : i + _CHUNK], generated_NG[i : i + _CHUNK].numpy())
        for i in range(0, len(prompts), _CHUNK)
    ]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        cleaned_chunks = pool.map(partial(_clean_chunk, teacher_tokenizer), chunks)
        return [pair for chunk in cleaned_chunks for pair in chunk]


def decoded(tokenizer: Tokenizer, generated_NG: np.ndarray) -> list[tuple[str, bool]]:
    """Text, and whether it has come to its end."""
    rows = generated_NG.tolist()
    texts = tokenizer.decode_batch([[token for token in row if token > 2] for row in rows])
    return list(zip(texts, (generated_NG == 2).any(axis=1).tolist(), strict=True))


def _clean_chunk(tokenizer_file: Path, chunk: tuple[list[str], np.ndarray]) -> list[tuple[str, str]]:
    prompts, generated_NG = chunk
    pairs = []
    answers = decoded(Tokenizer.from_file(str(tokenizer_file)), generated_NG)
    for prompt, (answer, has_ended) in zip(prompts, answers, strict=True):
        text = cleaned(answer, has_ended)
        if text is not None:
            pairs.append((prompt, text))
    return pairs


def encode(pairs: list[tuple[str, str]], tokenizer: Tokenizer) -> Corpus:
    """One document in eight begins with a system turn, lest a caller's own confuse the student."""
    heads = []
    for i, (prompt, _) in enumerate(pairs):
        has_system = i % _ONE_IN_WITH_SYSTEM == 0
        system = system_turn(_SYSTEMS[i // _ONE_IN_WITH_SYSTEM % len(_SYSTEMS)]) if has_system else ""
        heads.append(system + user_turn(prompt))
    head_ids = [row.ids for row in tokenizer.encode_batch(heads)]
    tail_ids = [row.ids for row in tokenizer.encode_batch([f"{answer}<|im_end|>\n" for _, answer in pairs])]
    prompt_lengths = torch.tensor([len(row) for row in head_ids])
    lengths = prompt_lengths + torch.tensor([len(row) for row in tail_ids])
    flat = [token for head, tail in zip(head_ids, tail_ids, strict=True) for token in (*head, *tail)]
    return Corpus(
        tokens=torch.tensor(flat, dtype=torch.int32),
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
        prompt_lengths=prompt_lengths,
    )


def _variety(text: str) -> float:
    """Distinct groups of three words over all of them: 1 when nothing is said twice."""
    words = text.lower().split()
    groups = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(groups)) / len(groups) if groups else 1.0
